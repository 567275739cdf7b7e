// The only file that uses Python: sizes and addresses are passed by name, and the kernels' output is the only result.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "pool.h"
#include "unvanish.h"

namespace nb = nanobind;
using namespace unvanish;

namespace {

template <class Real>
const Kernels<Real>& chosen(const std::optional<std::string>& isa) {
  const Kernels<Real>* found = kernels<Real>(isa ? isa->c_str() : nullptr);
  if (found == nullptr) throw std::invalid_argument("isa: this machine has no '" + *isa + "'");
  return *found;
}

// The name of a keyword argument, as a template argument.
template <size_t N>
struct Name {
  char text[N];
  constexpr Name(const char (&name)[N]) { std::copy_n(name, N, text); }
};

// Keyword arguments, each read into the field of the same name: two pointers can't be swapped unnoticed, as they could be in a list. A
// missing or unknown argument, or one of the wrong type, raises a TypeError.
class Arguments {
 public:
  explicit Arguments(const nb::kwargs& given) : given_(given) {}

  // A number; an address as a pointer, 0 as null.
  template <class Value, Name name>
  Value get() {
    PyObject* item = found<name>();
    if constexpr (std::is_pointer_v<Value>) {
      return reinterpret_cast<Value>(converted<uintptr_t, name>(item));
    } else {
      return converted<Value, name>(item);
    }
  }

  // One address per state, as pointers.
  template <class Pointer, Name name>
  std::vector<Pointer> addresses(int32_t count) {
    std::vector<Pointer> all;
    for (nb::handle address : nb::handle(found<name>())) all.push_back(reinterpret_cast<Pointer>(converted<uintptr_t, name>(address.ptr())));
    if (all.size() != static_cast<size_t>(count))
      throw std::invalid_argument(std::string(name.text) + ": expected one address per state");
    return all;
  }

  void all_read() const {
    if (given_.size() != read_) throw nb::type_error("an argument that the kernels do not know");
  }

 private:
  template <Name name>
  PyObject* found() {
    // Interned once: a call is short and reads some thirty names.
    static PyObject* const key = PyUnicode_InternFromString(name.text);
    PyObject* item = PyDict_GetItemWithError(given_.ptr(), key);
    if (item == nullptr) throw nb::type_error((std::string(name.text) + ": missing").c_str());
    ++read_;
    return item;
  }

  template <class Value, Name name>
  static Value converted(PyObject* item) {
    Value value;
    if (!nb::try_cast<Value>(nb::handle(item), value, std::is_floating_point_v<Value>)) throw nb::type_error((std::string(name.text) + ": wrong type").c_str());
    return value;
  }

  const nb::kwargs& given_;
  size_t read_ = 0;
};

template <class Real>
LayerInput<Real> layer_input(Arguments& a) {
  return {
      .reverse = a.get<bool, "reverse">(),
      .T = a.get<int64_t, "T">(),
      .B = a.get<int64_t, "B">(),
      .I = a.get<int64_t, "I">(),
      .H = a.get<int64_t, "H">(),
      .lengths = a.get<const int64_t*, "lengths">(),
      .x = a.get<const Real*, "x">(),
      .w_ih = a.get<const Real*, "w_ih">(),
      .w_hh = a.get<const Real*, "w_hh">(),
      .b_ih = a.get<const Real*, "b_ih">(),
      .b_hh = a.get<const Real*, "b_hh">(),
  };
}

template <class Real>
LayerGradients<Real> layer_gradients(Arguments& a) {
  return {
      .dy = a.get<const Real*, "dy">(),
      .clip = a.get<double, "clip">(),
      .cut = a.get<const bool*, "cut">(),
      .dx = a.get<Real*, "dx">(),
      .dw_ih = a.get<Real*, "dw_ih">(),
      .dw_hh = a.get<Real*, "dw_hh">(),
      .db_ih = a.get<Real*, "db_ih">(),
      .db_hh = a.get<Real*, "db_hh">(),
  };
}

// A struct with a base has no designated initialisers, so its own fields are assigned.
template <class Real>
Layer<Real> layer(Arguments& a) {
  Layer<Real> l{layer_input<Real>(a)};
  l.cell = static_cast<Cell>(a.get<int, "cell">());
  l.R = a.get<int64_t, "R">();
  l.h0 = a.get<const Real*, "h0">();
  l.c0 = a.get<const Real*, "c0">();
  l.w_hr = a.get<const Real*, "w_hr">();
  l.y = a.get<Real*, "y">();
  l.y_again = a.get<Real*, "y_again">();
  l.gates = a.get<Real*, "gates">();
  l.cells = a.get<Real*, "cells">();
  return l;
}

template <class Real>
Gradients<Real> gradients(Arguments& a) {
  Gradients<Real> g{layer_gradients<Real>(a)};
  g.dhn = a.get<const Real*, "dh">();
  g.dcn = a.get<const Real*, "dc">();
  g.dw_hr = a.get<Real*, "dw_hr">();
  g.dh0 = a.get<Real*, "dh0">();
  g.dc0 = a.get<Real*, "dc0">();
  g.delta_h = a.get<Real*, "delta_h">();
  g.delta_c = a.get<Real*, "delta_c">();
  g.delta_a = a.get<Real*, "delta_a">();
  g.delta_a_hh = a.get<Real*, "delta_a_hh">();
  g.probes = a.get<const Real*, "probes">();
  g.sketch = a.get<Real*, "sketch">();
  return g;
}

template <class Real>
void forward(const std::optional<std::string>& isa, int threads, const nb::kwargs& arguments) {
  Arguments a(arguments);
  const Layer<Real> l = layer<Real>(a);
  const Final<Real> final{.h = a.get<Real*, "h">(), .c = a.get<Real*, "c">()};
  const Statistics statistics{
      .closed = a.get<double, "closed">(),
      .mean = a.get<double*, "mean">(),
      .saturated = a.get<double*, "saturated">(),
      .log_carry = a.get<double*, "log_carry">(),
  };
  a.all_read();
  const Kernels<Real>& k = chosen<Real>(isa);
  nb::gil_scoped_release release;
  k.forward(l, final, statistics.mean == nullptr ? nullptr : &statistics, threads);
}

template <class Real>
void backward(const std::optional<std::string>& isa, int threads, const nb::kwargs& arguments) {
  Arguments a(arguments);
  const Layer<Real> l = layer<Real>(a);
  const Gradients<Real> wanted = gradients<Real>(a);
  const Norms norms{
      .h = a.get<double*, "norm_h">(),
      .c = a.get<double*, "norm_c">(),
      .a = a.get<double*, "norm_a">(),
      .w = a.get<double*, "norm_w">(),
  };
  a.all_read();
  const Kernels<Real>& k = chosen<Real>(isa);
  nb::gil_scoped_release release;
  k.backward(l, wanted, norms.h == nullptr ? nullptr : &norms, threads);
}

template <class Real>
void propagate(const std::optional<std::string>& isa, int threads, const nb::kwargs& arguments) {
  Arguments a(arguments);
  const Propagation<Real> given{
      .reverse = a.get<bool, "reverse">(),
      .first = a.get<int64_t, "first">(),
      .steps = a.get<int64_t, "steps">(),
      .B = a.get<int64_t, "B">(),
      .K = a.get<int64_t, "K">(),
      .H = a.get<int64_t, "H">(),
      .states = a.get<int64_t, "states">(),
      .measured = a.get<int64_t, "measured">(),
      .sources = a.get<const int64_t*, "sources">(),
      .matrices = a.get<const Real*, "matrices">(),
      .shared = a.get<bool, "shared">(),
      .scale = a.get<const Real*, "scale">(),
      .made = a.get<const Real*, "made">(),
      .carried = a.get<const Real*, "carried">(),
      .rows = a.get<Real*, "rows">(),
      .exponents = a.get<double*, "exponents">(),
      .log_norms = a.get<double*, "log_norms">(),
  };
  a.all_read();
  const Kernels<Real>& k = chosen<Real>(isa);
  nb::gil_scoped_release release;
  k.propagate(given, threads);
}

#include "step_bindings.h"

template <class Real>
void bind(nb::module_& m, const char* suffix) {
  auto name = [&](const char* stem) { return std::string(stem) + suffix; };
  m.def(name("forward_").c_str(), &forward<Real>, nb::arg("isa").none(), nb::arg("threads"), nb::arg("arguments"));
  m.def(name("backward_").c_str(), &backward<Real>, nb::arg("isa").none(), nb::arg("threads"), nb::arg("arguments"));
  m.def(name("step_forward_").c_str(), &step_forward<Real>, nb::arg("cell"), nb::arg("isa").none(), nb::arg("threads"), nb::arg("arguments"));
  m.def(name("step_backward_").c_str(), &step_backward<Real>, nb::arg("cell"), nb::arg("isa").none(), nb::arg("threads"), nb::arg("arguments"));
  m.def(name("propagate_").c_str(), &propagate<Real>, nb::arg("isa").none(), nb::arg("threads"), nb::arg("arguments"));
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
