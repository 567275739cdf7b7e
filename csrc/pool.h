// Threads and memory that outlive a call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unvanish {

// Runs work(context, member, members) for all members concurrently, each on its own thread, one of them the caller's: on OpenMP's threads
// if torch has loaded OpenMP, with a team of all `threads`, else on our own workers. There are `wanted` ≤ threads members, or fewer if no
// more threads are available.
void run_team(int wanted, int threads, void (*work)(void* context, int member, int members), void* context);

// Runs work(context, i, member) for i in [0, count), taken in order, on up to `threads` threads, the members.
void parallel_for(int64_t count, int threads, void (*work)(void* context, int64_t i, int member), void* context);

// Returns *counter and increments it.
int64_t take(int64_t* counter);

// Waits until *counter, which other threads `signal`, has reached `value`.
void wait_for(const int64_t* counter, int64_t value);
void signal(int64_t* counter);

// A barrier for the members of a team; zero-initialised.
struct alignas(64) Barrier {
  int64_t arrived, round;
};
void arrive_and_wait(Barrier* barrier, int members);

// Uninitialised memory, aligned to 64 bytes, from a cache of freed blocks: fresh pages cost as much as the arithmetic.
void* acquire(size_t bytes);
void release(void* block);

// A block for the length of a scope.
template <class Real>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<Real*>(acquire(static_cast<size_t>(count) * sizeof(Real)))) {}
  ~Scratch() { release(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Real* get() const { return data_; }

 private:
  Real* data_;
};

}  // namespace unvanish
