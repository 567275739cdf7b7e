// Threads and memory that outlive a call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unvanish {

// Runs work(context, i) for i in [0, count) on up to `threads` threads, the caller's among them. If other callers hold the workers, or in
// a freshly forked child, the caller does it all: the result is the same.
void parallel_for(int64_t count, int threads, void (*work)(void* context, int64_t i), void* context);

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
