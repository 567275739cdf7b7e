#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace unvanish {
namespace {

using Work = void (*)(void* context, int member, int members);

class Workers {
 public:
  // One caller at a time owns the workers.
  std::unique_lock<std::mutex> own() { return std::unique_lock(owner_, std::try_to_lock); }

  // With fewer members if no more threads can be created.
  void run(Work work, void* context, int members) {
    {
      std::lock_guard lock(mutex_);
      while (static_cast<int>(threads_.size()) < members - 1) {
        int id = static_cast<int>(threads_.size()) + 1;
        try {
          threads_.emplace_back([this, id] { loop(id); });
        } catch (const std::system_error&) {
          members = id;
          break;
        }
        threads_.back().detach();
      }
      work_ = work;
      context_ = context;
      members_ = members;
      busy_ = members - 1;
      ++generation_;
    }
    wake_.notify_all();
    work(context, 0, members);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void loop(int id) {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen && id < members_; });
      seen = generation_;
      const Work work = work_;
      void* context = context_;
      const int members = members_;
      lock.unlock();
      work(context, id, members);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Work work_ = nullptr;
  void* context_ = nullptr;
  int members_ = 0, busy_ = 0;
  uint64_t generation_ = 0;
};

constexpr size_t kAlign = 64, kHeader = 64;
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kKept = size_t{1} << 30;  // the most bytes of freed blocks to keep

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

// The OpenMP runtime that torch has loaded. Its threads stay awake for some milliseconds after each of torch's operations, and our own
// threads would have to share the cores with them.
struct OpenMp {
  void (*parallel)(void (*work)(void*), void* context, unsigned threads, unsigned flags);
  int (*number)();
  int (*count)();
};

template <class Function>
void look_up(Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

// Null if there is none.
const OpenMp* openmp() {
  static const OpenMp found = [] {
    OpenMp all{};
    look_up(all.parallel, "GOMP_parallel");
    look_up(all.number, "omp_get_thread_num");
    look_up(all.count, "omp_get_num_threads");
    return all;
  }();
  return found.parallel == nullptr || found.number == nullptr || found.count == nullptr ? nullptr : &found;
}

// A child process has only the thread that forked, and its locks may be held by threads that no longer exist: it starts with new objects,
// and with workers of our own, since OpenMP would wait for the parent's threads.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] {
  workers = nullptr;
  cache = nullptr;
  forked = true;
});

}  // namespace

int64_t take(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

void wait_for(const int64_t* counter, int64_t value) {
  for (int tries = 2000; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value;) {
    if (tries > 0)
      --tries;
    else
      std::this_thread::yield();
  }
}

void signal(int64_t* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE); }

void arrive_and_wait(Barrier* barrier, int members) {
  const int64_t round = __atomic_load_n(&barrier->round, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&barrier->arrived, 1, __ATOMIC_ACQ_REL) < members) return wait_for(&barrier->round, round + 1);
  __atomic_store_n(&barrier->arrived, 0, __ATOMIC_RELAXED);
  __atomic_store_n(&barrier->round, round + 1, __ATOMIC_RELEASE);
}

void run_team(int wanted, int threads, void (*work)(void*, int, int), void* context) {
  if (wanted > 1 && openmp() != nullptr && !forked) {
    // All of torch's threads, so that the team is the one that its operations use.
    struct Call {
      Work work;
      void* context;
      int wanted;
    } call{work, context, wanted};
    openmp()->parallel(
        [](void* context) {
          const Call& call = *static_cast<Call*>(context);
          const int granted = openmp()->count(), members = granted < call.wanted ? granted : call.wanted;
          const int member = openmp()->number();
          if (member < members) call.work(call.context, member, members);
        },
        &call, static_cast<unsigned>(threads), 0);
    return;
  }
  if (wanted <= 1) return work(context, 0, 1);
  Workers& pool = instance(workers);
  const auto owner = pool.own();
  if (!owner) return work(context, 0, 1);
  pool.run(work, context, wanted);
}

void parallel_for(int64_t count, int threads, void (*work)(void*, int64_t, int), void* context) {
  struct Run {
    void (*work)(void*, int64_t, int);
    void* context;
    int64_t count, next;
  } run{work, context, count, 0};
  run_team(
      static_cast<int>(count < threads ? count : threads), threads,
      [](void* context, int member, int) {
        Run& run = *static_cast<Run*>(context);
        for (int64_t i = take(&run.next); i < run.count; i = take(&run.next)) run.work(run.context, i, member);
      },
      &run);
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
  const bool large = bytes >= kHugePage;
  const size_t all = large ? (bytes + kHeader + kHugePage - 1) / kHugePage * kHugePage : bytes + kHeader;
  char* raw = static_cast<char*>(std::aligned_alloc(large ? kHugePage : kAlign, all));
  if (raw == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (large) madvise(raw, all, MADV_HUGEPAGE);  // a step touches all of it, and TLB misses would take part of its time
#endif
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
