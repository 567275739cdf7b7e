#include "pool.h"

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

// A child has no threads but the one that forked, and locks as they happened to be: it starts anew.
const int registered = pthread_atfork(nullptr, nullptr, [] {
  workers = nullptr;
  cache = nullptr;
});

}  // namespace

void parallel_for(int64_t count, int threads, void (*work)(void*, int64_t), void* context) {
  Job job{work, context, count};
  int helpers = static_cast<int>(count < threads ? count : threads) - 1;
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
