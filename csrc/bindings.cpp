// The only file that knows Python: addresses and sizes in, nothing out but what the kernels write.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.h"
#include "unvanish.h"

namespace nb = nanobind;
using namespace unvanish;

namespace {

template <class Real>
Real* at(uintptr_t address) {
  return reinterpret_cast<Real*>(address);
}

template <class Real>
const Kernels<Real>& chosen(const std::optional<std::string>& isa) {
  const Kernels<Real>* found = kernels<Real>(isa ? isa->c_str() : nullptr);
  if (found == nullptr) throw std::invalid_argument("isa: this machine has no '" + *isa + "'");
  return *found;
}

// Sizes T, B, I, H, R and the addresses of Layer's pointers in their order; 0 is null.
template <class Real>
Layer<Real> layer(int cell, bool reverse, const std::array<int64_t, 5>& n, const std::array<uintptr_t, 12>& p) {
  return {static_cast<Cell>(cell), reverse, n[0], n[1], n[2], n[3], n[4], at<int64_t>(p[0]), at<Real>(p[1]), at<Real>(p[2]),
          at<Real>(p[3]), at<Real>(p[4]), at<Real>(p[5]), at<Real>(p[6]), at<Real>(p[7]), at<Real>(p[8]), at<Real>(p[9]),
          at<Real>(p[10]), at<Real>(p[11])};
}

template <size_t N, class Item = int64_t>
std::array<Item, N> numbers(nb::sequence items) {
  std::array<Item, N> out{};
  size_t i = 0;
  for (nb::handle item : items) {
    if (i == N) break;
    out[i++] = nb::cast<Item>(item);
  }
  if (i != N || nb::len(items) != N) throw std::invalid_argument("wrong number of sizes or addresses");
  return out;
}

template <class Real>
void forward(int cell, bool reverse, nb::sequence sizes, nb::sequence pointers, nb::sequence outs, double closed,
             nb::sequence statistics, int threads, std::optional<std::string> isa) {
  auto n = numbers<5>(sizes);
  auto p = numbers<12, uintptr_t>(pointers);
  auto o = numbers<2, uintptr_t>(outs);
  auto q = numbers<3, uintptr_t>(statistics);
  const Kernels<Real>& k = chosen<Real>(isa);
  nb::gil_scoped_release release;
  Layer<Real> l = layer<Real>(cell, reverse, n, p);
  const Statistics wanted{closed, at<double>(q[0]), at<double>(q[1]), at<double>(q[2])};
  k.forward(l, {at<Real>(o[0]), at<Real>(o[1])}, wanted.mean == nullptr ? nullptr : &wanted, threads);
}

template <class Real>
void backward(int cell, bool reverse, nb::sequence sizes, nb::sequence pointers, nb::sequence gradients, double clip,
              nb::sequence norms, int threads, std::optional<std::string> isa) {
  auto n = numbers<5>(sizes);
  auto p = numbers<12, uintptr_t>(pointers);
  auto q = numbers<15, uintptr_t>(gradients);
  auto m = numbers<4, uintptr_t>(norms);
  const Kernels<Real>& k = chosen<Real>(isa);
  nb::gil_scoped_release release;
  Layer<Real> l = layer<Real>(cell, reverse, n, p);
  Gradients<Real> g{at<Real>(q[0]), at<Real>(q[1]), at<Real>(q[2]),  clip,
                    at<Real>(q[3]), at<Real>(q[4]), at<Real>(q[5]),  at<Real>(q[6]),
                    at<Real>(q[7]), at<Real>(q[8]), at<Real>(q[9]),  at<Real>(q[10]),
                    at<Real>(q[11]), at<Real>(q[12]), at<Real>(q[13]), at<Real>(q[14])};
  const Norms wanted{at<double>(m[0]), at<double>(m[1]), at<double>(m[2]), at<double>(m[3])};
  k.backward(l, g, wanted.h == nullptr ? nullptr : &wanted, threads);
}

#include "step_bindings.h"

template <class Real>
void bind(nb::module_& m, const char* suffix) {
  auto name = [&](const char* stem) { return std::string(stem) + suffix; };
  m.def(name("forward_").c_str(), &forward<Real>);
  m.def(name("backward_").c_str(), &backward<Real>);
  m.def(name("step_forward_").c_str(), &step_forward<Real>);
  m.def(name("step_backward_").c_str(), &step_backward<Real>);
  m.def(name("layout_").c_str(), [](int cell, int64_t H, std::optional<std::string> isa) {
    const Kernels<Real>& k = chosen<Real>(isa);
    return nb::make_tuple(k.lanes, k.padded(static_cast<Cell>(cell), H), k.saved_width(static_cast<Cell>(cell), H));
  });
  m.def(name("peak_").c_str(), [](int64_t rounds, std::optional<std::string> isa) {
    const Kernels<Real>& k = chosen<Real>(isa);
    nb::gil_scoped_release release;
    return k.peak(rounds);
  });
  m.def(name("isa_").c_str(), [] { return std::string(kernels<Real>()->isa); });
  m.def(name("empty_").c_str(), [](size_t count) {
    Real* data = static_cast<Real*>(acquire(count * sizeof(Real)));
    nb::capsule owner(data, [](void* p) noexcept { release(p); });
    return nb::ndarray<nb::pytorch, Real>(data, {count}, owner);
  });
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("block_rows", &block_rows);
  m.def("step_cell", [](nb::tuple given) {
    return nb::capsule(new OwnedCell(given), kOwned, [](void* cell) noexcept { delete static_cast<OwnedCell*>(cell); });
  });
  m.def("step_operations", [] { return std::vector<std::string>(kOps, kOps + kOpCount); });
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}
