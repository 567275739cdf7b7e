// Runs an elementwise program over tiles, a chunk at a time, so that its temporaries stay in the first cache.
#pragma once

#include <cstdint>

#include "functions.h"
#include "program.h"
#include "pool.h"
#include "sequence.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

template <class Real>
class Interpreter {
 public:
  static constexpr int L = kLanes<Real>;
  static constexpr int64_t kChunk = 2048 / static_cast<int64_t>(sizeof(Real));

  static int64_t memory(const Program& p) { return (p.n_constants + p.n_temporaries) * kChunk; }

  // `memory` holds memory(p) numbers.
  Interpreter(const Program& p, Real* memory) : p(p), local_(memory), tiles_(p.n_inputs + p.n_outputs + 1) {
    for (int64_t c = 0; c < p.n_constants; ++c)
      for (int64_t k = 0; k < kChunk; ++k) local_[c * kChunk + k] = static_cast<Real>(p.constants[c]);
  }

  // tile(place) is the address of an input or output; each has n elements, whole vectors.
  template <class Tile>
  void run(int64_t n, Tile tile) const {
    Real** tiles = tiles_.get();
    for (int64_t i = 0; i < p.n_inputs; ++i) tiles[i] = tile(p.inputs[i]);
    for (int64_t i = 0; i < p.n_outputs; ++i) tiles[p.n_inputs + i] = tile(p.outputs[i]);
    for (int64_t from = 0; from < n; from += kChunk) chunk(from, smaller(kChunk, n - from));
  }

 private:
  Real* at(int32_t number, int64_t from) const {
    const int64_t shared = p.n_inputs + p.n_outputs;
    return number < shared ? tiles_.get()[number] + from : local_ + (number - shared) * kChunk;
  }

  __attribute__((noinline)) void chunk(int64_t from, int64_t n) const {
    for (int64_t i = 0; i < p.length; ++i) {
      const Instruction& now = p.code[i];
      execute(now.op, at(now.to, from), at(now.a, from), at(now.b, from), at(now.c, from), n);
    }
  }

  template <class F>
  static UV_INLINE void vectors(Real* to, const Real* a, const Real* b, const Real* c, int64_t n, F f) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < n; k += L) store(to + k, f(load(a + k), load(b + k), load(c + k)));
  }

  template <class F>
  static UV_INLINE void numbers(Real* to, const Real* a, const Real* b, int64_t n, F f) {
    for (int64_t k = 0; k < n; ++k) to[k] = f(a[k], b[k]);
  }

  static UV_INLINE void execute(Op op, Real* to, const Real* a, const Real* b, const Real* c, int64_t n) {
    using V = Vec<Real>;
    const V zero{}, one = all<Real>(1);
    const auto vectors = [&](auto f) { Interpreter::vectors(to, a, b, c, n, f); };
    const auto numbers = [&](auto f) { Interpreter::numbers(to, a, b, n, f); };
    switch (op) {
      case Op::copy_: return vectors([](V x, V, V) { return x; });
      case Op::add_: return vectors([](V x, V y, V) { return x + y; });
      case Op::sub_: return vectors([](V x, V y, V) { return x - y; });
      case Op::mul_: return vectors([](V x, V y, V) { return x * y; });
      case Op::div_: return vectors([](V x, V y, V) { return x / y; });
      case Op::fma_: return vectors([](V x, V y, V z) { return x * y + z; });
      case Op::neg_: return vectors([](V x, V, V) { return -x; });
      case Op::abs_: return numbers([](Real x, Real) { return fabs_of(x); });
      case Op::sign_: return vectors([&](V x, V, V) { return x > zero ? one : x < zero ? -one : zero; });
      case Op::sqrt_: return numbers([](Real x, Real) { return sqrt_of(x); });
      case Op::exp_: return vectors([](V x, V, V) { return exp<Real>(x); });
      case Op::expm1_: return vectors([](V x, V, V) { return expm1<Real>(x); });
      case Op::log_: return vectors([](V x, V, V) { return log<Real>(x); });
      case Op::log1p_: return vectors([](V x, V, V) { return log1p<Real>(x); });
      case Op::sigmoid_: return vectors([](V x, V, V) { return Real(1) / (Real(1) + exp<Real>(-x)); });
      case Op::tanh_: return vectors([](V x, V, V) { return tanh<Real>(x); });
      case Op::dsigmoid_: return vectors([](V g, V y, V) { return g * ((Real(1) - y) * y); });
      case Op::dtanh_: return vectors([](V g, V y, V) { return g * (Real(1) - y * y); });
      case Op::relu_: return vectors([&](V x, V, V) { return x < zero ? zero : x; });  // keeps NaN
      case Op::sin_: return numbers([](Real x, Real) { return sin_of(x); });
      case Op::cos_: return numbers([](Real x, Real) { return cos_of(x); });
      case Op::tan_: return numbers([](Real x, Real) { return tan_of(x); });
      case Op::atan_: return numbers([](Real x, Real) { return atan_of(x); });
      case Op::erf_: return numbers([](Real x, Real) { return erf_of(x); });
      case Op::pow_: return numbers([](Real x, Real y) { return pow_of(x, y); });
      case Op::floor_: return numbers([](Real x, Real) { return floor_of(x); });
      case Op::ceil_: return numbers([](Real x, Real) { return ceil_of(x); });
      case Op::round_: return numbers([](Real x, Real) { return rint_of(x); });
      case Op::trunc_: return numbers([](Real x, Real) { return trunc_of(x); });
      // If either side is NaN, the result is that NaN.
      case Op::maximum_: return vectors([](V x, V y, V) { return x != x ? x : y != y ? y : x < y ? y : x; });
      case Op::minimum_: return vectors([](V x, V y, V) { return x != x ? x : y != y ? y : y < x ? y : x; });
      case Op::lt_: return vectors([&](V x, V y, V) { return x < y ? one : zero; });
      case Op::le_: return vectors([&](V x, V y, V) { return x <= y ? one : zero; });
      case Op::eq_: return vectors([&](V x, V y, V) { return x == y ? one : zero; });
      case Op::ne_: return vectors([&](V x, V y, V) { return x != y ? one : zero; });
      case Op::where_: return vectors([&](V x, V y, V z) { return x != zero ? y : z; });
    }
  }

  const Program& p;
  Real* local_;
  Scratch<Real*> tiles_;
};

}  // namespace
}  // namespace unvanish::UV_ISA
