// Vectors of one instruction set, and the functions on them that the cells need.
//
// The kernels' headers are compiled once per instruction set (isa.cpp), in a namespace named after it, UV_ISA, and in an unnamed one within
// it, so that the linker can't merge copies for different instruction sets. For the same reason no header of the kernels uses templates of
// the standard library. UV_BYTES is the width of a vector.
#pragma once

#include <cstdint>

// isa.cpp is compiled with both defined. These defaults apply where an editor or a linter opens a header by itself.
#if !defined(UV_ISA)
#define UV_ISA baseline
#define UV_BYTES 16
#endif

namespace unvanish::UV_ISA {
namespace {

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(UV_BYTES)));
  typedef int32_t ints __attribute__((vector_size(UV_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(UV_BYTES)));
  typedef int64_t ints __attribute__((vector_size(UV_BYTES)));
};
template <class Real>
using Vec = typename VectorOf<Real>::type;
template <class Real>
using Ints = typename VectorOf<Real>::ints;
template <class Real>
constexpr int kLanes = UV_BYTES / static_cast<int>(sizeof(Real));

#define UV_INLINE inline __attribute__((always_inline))

template <class Real>
UV_INLINE Vec<Real> load(const Real* p) {
  Vec<Real> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class Real>
UV_INLINE void store(Real* p, Vec<Real> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first n ≥ 1 lanes; the others are 0, or left unchanged in memory.
template <class Real>
UV_INLINE Vec<Real> load(const Real* p, int64_t n) {
  if (n >= kLanes<Real>) return load(p);
  Real lanes[kLanes<Real>] = {};
  for (int j = 0; j < n; ++j) lanes[j] = p[j];
  return load(lanes);
}

template <class Real>
UV_INLINE void store(Real* p, Vec<Real> v, int64_t n) {
  if (n >= kLanes<Real>) return store(p, v);
  Real lanes[kLanes<Real>];
  store(lanes, v);
  for (int j = 0; j < n; ++j) p[j] = lanes[j];
}

template <class Real>
UV_INLINE Vec<Real> all(Real value) {
  return value - Vec<Real>{};  // the compiler can drop x − 0, which is x for −0 too, but not 0 + x
}

template <class Real>
UV_INLINE Vec<Real> bits(Ints<Real> i) {
  Vec<Real> v;
  __builtin_memcpy(&v, &i, sizeof v);
  return v;
}

template <class Real>
UV_INLINE Ints<Real> bits_of(Vec<Real> v) {
  Ints<Real> i;
  __builtin_memcpy(&i, &v, sizeof i);
  return i;
}

template <class Real>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float magic = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer
  static constexpr float limit = 87.0f;
  static constexpr int32_t bias = 127;
  static constexpr int mantissa = 23;
};
template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.4426950408889634, ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double magic = 6755399441055744.0;  // 1.5·2⁵²
  static constexpr double limit = 708.0;
  static constexpr int64_t bias = 1023;
  static constexpr int mantissa = 52;
};

// (eʳ − 1 − r) / r² over |r| ≤ ln 2 / 2: the Taylor series is short enough there. Even and odd powers are summed apart, which halves the latency.
UV_INLINE Vec<float> expm1_tail(Vec<float> r, Vec<float> r2) {
  const Vec<float> low = r * (1.0f / 6) + 0.5f, middle = r * (1.0f / 120) + 1.0f / 24, high = r * (1.0f / 5040) + 1.0f / 720;
  return (high * r2 + middle) * r2 + low;
}

UV_INLINE Vec<double> expm1_tail(Vec<double> r, Vec<double> r2) {
  Vec<double> even = r2 * (1.0 / 87178291200.0) + 1.0 / 479001600.0;
  Vec<double> odd = all(1.0 / 6227020800.0);
  even = even * r2 + 1.0 / 3628800.0;
  odd = odd * r2 + 1.0 / 39916800.0;
  even = even * r2 + 1.0 / 40320.0;
  odd = odd * r2 + 1.0 / 362880.0;
  even = even * r2 + 1.0 / 720.0;
  odd = odd * r2 + 1.0 / 5040.0;
  even = even * r2 + 1.0 / 24.0;
  odd = odd * r2 + 1.0 / 120.0;
  even = even * r2 + 0.5;
  odd = odd * r2 + 1.0 / 6.0;
  return odd * r + even;
}

// eˣ = 2ⁿ (1 + q), q = eʳ − 1, |r| ≤ ln 2 / 2; x is clamped to where 2ⁿ is normal; q of NaN is NaN. N at a time, since each one is
// bound by latency.
template <class Real, int N>
UV_INLINE void exp_parts(Vec<Real> (&x)[N], Vec<Real> (&power)[N], Vec<Real> (&q)[N]) {
  using C = ExpConstants<Real>;
  Vec<Real> shifted[N], r[N];
#pragma GCC unroll 4
  for (int k = 0; k < N; ++k) {
    x[k] = all<Real>(C::limit) < x[k] ? all<Real>(C::limit) : x[k];
    x[k] = all<Real>(-C::limit) > x[k] ? all<Real>(-C::limit) : x[k];
    shifted[k] = x[k] * C::log2e + C::magic;
  }
#pragma GCC unroll 4
  for (int k = 0; k < N; ++k) {
    const Vec<Real> n = shifted[k] - C::magic;
    r[k] = x[k] - n * C::ln2_high;
    r[k] = r[k] - n * C::ln2_low;
  }
#pragma GCC unroll 4
  for (int k = 0; k < N; ++k) {
    const Vec<Real> r2 = r[k] * r[k];
    q[k] = expm1_tail(r[k], r2) * r2 + r[k];
    const Ints<Real> exponent = bits_of<Real>(shifted[k]) << C::mantissa;
    power[k] = bits<Real>(exponent + (C::bias << C::mantissa));
  }
}

// From the parts of e⁻ˣ.
template <class Real>
UV_INLINE Vec<Real> sigmoid(Vec<Real> power, Vec<Real> q) {
  return Real(1) / (Real(1) + power + power * q);
}

// From the parts of e²ˣ: tanh x = (e²ˣ − 1) / (e²ˣ + 1), with e²ˣ − 1 = 2ⁿ q + (2ⁿ − 1): full relative precision near 0 too.
template <class Real>
UV_INLINE Vec<Real> tanh(Vec<Real> power, Vec<Real> q) {
  const Vec<Real> m = power * q + (power - Real(1));
  return m / (m + Real(2));
}

template <class Real>
UV_INLINE Vec<Real> sigmoid(Vec<Real> x) {
  Vec<Real> one[1] = {-x}, power[1], q[1];
  exp_parts<Real>(one, power, q);
  return sigmoid<Real>(power[0], q[0]);
}

template <class Real>
UV_INLINE Vec<Real> tanh(Vec<Real> x) {
  Vec<Real> one[1] = {x + x}, power[1], q[1];
  exp_parts<Real>(one, power, q);
  return tanh<Real>(power[0], q[0]);
}

// 0 … N−1 as template arguments.
template <int... J>
struct Lanes {};
template <int N, int... J>
struct UpTo : UpTo<N - 1, N - 1, J...> {};
template <int... J>
struct UpTo<0, J...> {
  using lanes = Lanes<J...>;
};

// Lanes whose index lacks the bit D come from a, the others from b; each is the sum of two lanes whose indices differ only in D.
template <class Real, int D, int... J>
UV_INLINE Vec<Real> fold(Vec<Real> a, Vec<Real> b, Lanes<J...>) {
  constexpr int L = kLanes<Real>;
  return __builtin_shufflevector(a, b, (J & D ? L + J - D : J)...) + __builtin_shufflevector(a, b, (J & D ? L + J : J + D)...);
}

// Lane k is the sum of v[k]'s lanes, for N = 2ⁿ ≤ lanes vectors; the lanes from N on repeat them.
// kDone: the number of lanes that are already separate.
template <class Real, int N, int kDone = N>
UV_INLINE Vec<Real> sums(const Vec<Real> (&v)[N]) {
  using lanes = typename UpTo<kLanes<Real>>::lanes;
  if constexpr (N > 1) {
    Vec<Real> half[N / 2];
#pragma GCC unroll 8
    for (int k = 0; k < N / 2; ++k) half[k] = fold<Real, N / 2>(v[k], v[k + N / 2], lanes());
    return sums<Real, N / 2, kDone>(half);
  } else if constexpr (kDone < kLanes<Real>) {
    const Vec<Real> total[1] = {fold<Real, kDone>(v[0], v[0], lanes())};
    return sums<Real, 1, kDone * 2>(total);
  } else {
    return v[0];
  }
}

template <class Real, int D, int... J>
UV_INLINE void exchange(Vec<Real>& a, Vec<Real>& b, Lanes<J...>) {
  constexpr int L = kLanes<Real>;
  const Vec<Real> before = a;
  a = __builtin_shufflevector(before, b, (J & D ? L + J - D : J)...);
  b = __builtin_shufflevector(before, b, (J & D ? L + J : J + D)...);
}

// Lane j of v[i] and lane i of v[j] change places. kApart: the distance of the vectors that exchange halves of their lanes first.
template <class Real, int kApart = 1>
UV_INLINE void transpose(Vec<Real> (&v)[kLanes<Real>]) {
  if constexpr (kApart < kLanes<Real>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<Real>; ++i)
      if ((i & kApart) == 0) exchange<Real, kApart>(v[i], v[i + kApart], typename UpTo<kLanes<Real>>::lanes());
    transpose<Real, 2 * kApart>(v);
  }
}

UV_INLINE void add_squares(Vec<float>& total, Vec<float> v) { total += v * v; }
UV_INLINE void add_squares(Vec<double>& total, Vec<double> v) { total += v * v; }

// In double the squares of a float neither overflow nor underflow.
UV_INLINE void add_squares(Vec<double>& total, Vec<float> v) {
  typedef float Half __attribute__((vector_size(UV_BYTES / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &v, sizeof halves);
  for (Half half : halves) {
    Vec<double> wide = __builtin_convertvector(half, Vec<double>);
    total += wide * wide;
  }
}

// The lanes below n; the others are 0.
template <class Real>
UV_INLINE Vec<Real> first_lanes(Vec<Real> v, int64_t n) {
  if (n >= kLanes<Real>) return v;
  Real lanes[kLanes<Real>];
  store(lanes, v);
  for (int64_t j = n > 0 ? n : 0; j < kLanes<Real>; ++j) lanes[j] = 0;
  return load(lanes);
}

// x > 0 as mantissa · 2^exponent, mantissa in [1, 2); for NaN the mantissa is NaN.
template <class Real>
UV_INLINE Vec<Real> split_exponent(Vec<Real> x, Ints<Real>& exponent) {
  using C = ExpConstants<Real>;
  const Ints<Real> word = bits_of<Real>(x), unit = Ints<Real>{} + (C::bias << C::mantissa);
  exponent = (word >> C::mantissa) - C::bias;
  const Vec<Real> mantissa = bits<Real>((word & ~(Ints<Real>{} + (((C::bias * 2 + 1)) << C::mantissa))) | unit);
  return x == x ? mantissa : x;
}

}  // namespace
}  // namespace unvanish::UV_ISA
