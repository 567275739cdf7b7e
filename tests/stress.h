// What the stress tests of both kinds of kernel share: arrays that end where an inaccessible page begins, and what is demanded of a run.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/unvanish.h"

namespace stress {

using namespace unvanish;
using Random = std::mt19937_64;

int64_t between(Random& random, int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(random); }

// Items up to the edge of a page behind which nothing may be touched.
template <class Item>
class Edge {
 public:
  Edge() = default;
  explicit Edge(int64_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<size_t>(count) * sizeof(Item);
    const size_t used = (bytes + page - 1) / page * page;
    size_ = used + page;
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + used, page, PROT_NONE) != 0) throw std::bad_alloc();
    memory_.reset(memory, [size = size_](void* m) { munmap(m, size); });
    data_ = reinterpret_cast<Item*>(static_cast<char*>(memory) + used - bytes);
  }
  Item* get() const { return data_; }
  int64_t count() const { return count_; }

 private:
  std::shared_ptr<void> memory_;
  Item* data_ = nullptr;
  int64_t count_ = 0;
  size_t size_ = 0;
};

template <class Real>
Edge<Real> filled(int64_t count, Random& random, double scale) {
  Edge<Real> out(count);
  std::uniform_real_distribution<double> uniform(-scale, scale);
  for (int64_t k = 0; k < count; ++k) out.get()[k] = static_cast<Real>(static_cast<float>(uniform(random)));
  return out;
}

// Drawn for the whole batch, [steps, B, width]; `only` ≥ 0 keeps one sample of it.
template <class Real>
Edge<Real> batch(int64_t steps, int64_t B, int64_t width, Random& random, int64_t only) {
  Edge<Real> whole = filled<Real>(steps * B * width, random, 1);
  if (only < 0) return whole;
  Edge<Real> one(steps * width);
  for (int64_t t = 0; t < steps; ++t)
    std::memcpy(one.get() + t * width, whole.get() + (t * B + only) * width, static_cast<size_t>(width) * sizeof(Real));
  return one;
}

inline Edge<bool> cut_steps(int64_t T, Random& random) {
  Edge<bool> drawn(T);
  for (int64_t t = 0; t < T; ++t) drawn.get()[t] = between(random, 0, 1) != 0;
  return drawn;
}

// An array that a kernel writes: [steps, B, ·], or of the layer as a whole where steps is 0.
template <class Real>
struct Output {
  Edge<Real> data;
  int64_t steps;
};

// What a run writes, in an order of its own that does not depend on the dtype.
template <class Real>
struct Written {
  std::vector<Output<Real>> outputs;

  Real* array(int64_t steps, int64_t count) {
    outputs.push_back({Edge<Real>(count), steps});
    return outputs.back().data.get();
  }
};

// Bit for bit, except that one NaN is as good as another: the sign of the one that an operation returns depends on the order of its operands.
template <class Item>
bool identical(const Item* a, const Item* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (std::memcmp(a + i, b + i, sizeof(Item)) != 0 && !(a[i] != a[i] && b[i] != b[i])) return false;
  return true;
}

template <class Item>
bool same(const Edge<Item>& a, const Edge<Item>& b) {
  return a.count() == b.count() && identical(a.get(), b.get(), a.count());
}

inline void demand(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// The run of one thread, once the same bits came from 2, 3 and 4 and, where they are a sample's own, from one sample alone.
template <template <class> class Run, class Real, class Shape>
Run<Real> check(const Shape& s, const char* isa, Random& random) {
  const Kernels<Real>& k = *kernels<Real>(isa);
  Run<Real> one(s, k, 1);
  for (int threads = 2; threads <= 4; ++threads) {
    const Run<Real> more(s, k, threads);
    for (size_t i = 0; i < one.outputs.size(); ++i)
      demand(same(one.outputs[i].data, more.outputs[i].data), std::to_string(threads) + " threads differ, array " + std::to_string(i));
    for (size_t i = 0; i < one.measured.size(); ++i) demand(same(one.measured[i], more.measured[i]), "measurements differ");
  }
  const int64_t b = between(random, 0, s.B - 1);
  const Run<Real> alone(s, k, 2, b);
  for (size_t i = 0; i < one.outputs.size(); ++i) {
    const auto& [data, steps] = one.outputs[i];
    const int64_t width = steps == 0 ? 0 : data.count() / (steps * s.B);
    for (int64_t t = 0; t < steps; ++t)
      demand(identical(data.get() + (t * s.B + b) * width, alone.outputs[i].data.get() + t * width, width),
             "a sample alone differs, array " + std::to_string(i));
  }
  return one;
}

inline void agree(const Written<float>& narrow, const Written<double>& wide, double tolerance, const char* isa) {
  for (size_t i = 0; i < narrow.outputs.size(); ++i) {
    const Edge<float>& a = narrow.outputs[i].data;
    const Edge<double>& b = wide.outputs[i].data;
    double off = 0, size = 0;
    for (int64_t k = 0; k < a.count(); ++k) {
      const double apart = static_cast<double>(a.get()[k]) - b.get()[k];
      off += apart * apart, size += b.get()[k] * b.get()[k];
    }
    demand(std::sqrt(off) <= tolerance * std::sqrt(size) + 1e-6, std::string(isa) + ": precisions differ, array " + std::to_string(i));
  }
}

}  // namespace stress
