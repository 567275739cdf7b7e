#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace unvanish {
namespace {

struct Job {
  void (*work)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t i = next++; i < count; i = next++) work(context, i);
  }
};

class Workers {
 public:
  // One caller at a time owns the workers.
  bool try_own() { return owner_.try_lock(); }
  void disown() { owner_.unlock(); }

  void run(Job& job, int helpers) {
    {
      std::lock_guard lock(mutex_);
      while (static_cast<int>(threads_.size()) < helpers) {
        int id = static_cast<int>(threads_.size());
        threads_.emplace_back([this, id] { loop(id); });
        threads_.back().detach();
      }
      job_ = &job;
      wanted_ = helpers;
      busy_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.run();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void loop(int id) {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen && id < wanted_; });
      seen = generation_;
      Job* job = job_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int wanted_ = 0, busy_ = 0;
  uint64_t generation_ = 0;
};

constexpr size_t kAlign = 64, kHeader = 64;
constexpr size_t kKept = size_t{1} << 30;  // bytes of freed blocks to hold on to

struct Cache {
  std::mutex mutex;
  std::multimap<size_t, void*> freed;
  size_t bytes = 0;
};

// Both are leaked on purpose: detached workers and late deleters may still need them while the process ends.
std::atomic<Workers*> workers{nullptr};
std::atomic<Cache*> cache{nullptr};

template <class Object>
Object& instance(std::atomic<Object*>& slot) {
  Object* found = slot.load();
  if (found == nullptr) {
    auto* fresh = new Object;
    if (slot.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

// The OpenMP runtime that torch has loaded. Its threads stay awake for some milliseconds after each of torch's operations: threads of
// ours would have to share the cores with them. Null where there is none.
using OpenMp = void (*)(void (*work)(void*), void* context, unsigned threads, unsigned flags);
OpenMp openmp() {
  static const auto found = reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// A child has no threads but the one that forked, and locks as they happened to be: it starts anew, and with threads of its own, since
// OpenMP would wait for its parent's.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] {
  workers = nullptr;
  cache = nullptr;
  forked = true;
});

}  // namespace

void wait_for(const int64_t* counter, int64_t value) {
  for (int tries = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; ++tries)
    if (tries > 2000) std::this_thread::yield();
}

void signal(int64_t* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE); }

void parallel_for(int64_t count, int threads, void (*work)(void*, int64_t), void* context) {
  Job job{work, context, count};
  int helpers = static_cast<int>(count < threads ? count : threads) - 1;
  if (helpers > 0 && openmp() != nullptr && !forked) {
    // All of torch's threads, so that the team is the one that its operations use.
    openmp()([](void* job) { static_cast<Job*>(job)->run(); }, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  Workers& pool = instance(workers);
  if (helpers <= 0 || !pool.try_own()) {
    job.run();
    return;
  }
  pool.run(job, helpers);
  pool.disown();
}

void* acquire(size_t bytes) {
  bytes = (bytes + kAlign - 1) / kAlign * kAlign;
  Cache& c = instance(cache);
  {
    std::lock_guard lock(c.mutex);
    auto found = c.freed.lower_bound(bytes);
    if (found != c.freed.end() && found->first <= bytes + bytes / 4) {
      void* block = found->second;
      c.bytes -= found->first;
      c.freed.erase(found);
      return block;
    }
  }
  char* raw = static_cast<char*>(std::aligned_alloc(kAlign, bytes + kHeader));
  if (raw == nullptr) throw std::bad_alloc();
  *reinterpret_cast<size_t*>(raw) = bytes;
  return raw + kHeader;
}

void release(void* block) {
  if (block == nullptr) return;
  char* raw = static_cast<char*>(block) - kHeader;
  size_t bytes = *reinterpret_cast<size_t*>(raw);
  Cache& c = instance(cache);
  std::lock_guard lock(c.mutex);
  c.freed.emplace(bytes, block);
  c.bytes += bytes;
  while (c.bytes > kKept) {
    auto largest = std::prev(c.freed.end());
    c.bytes -= largest->first;
    std::free(static_cast<char*>(largest->second) - kHeader);
    c.freed.erase(largest);
  }
}

}  // namespace unvanish
