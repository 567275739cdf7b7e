// Elementwise functions over the whole floating-point range, with the special values of the C library; subnormal results may be 0.
#pragma once

#include <cstdint>

#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

// eˣ. The power of two is applied in halves, each of which is normal, so that the result overflows and underflows by itself.
template <class Real>
UV_INLINE Vec<Real> exp(Vec<Real> x) {
  using C = ExpConstants<Real>;
  constexpr Real most = C::limit * Real(1.5);
  x = all<Real>(most) < x ? all<Real>(most) : x;
  x = all<Real>(-most) > x ? all<Real>(-most) : x;
  const Vec<Real> shifted = x * C::log2e + C::magic, n = shifted - C::magic;
  Vec<Real> r = x - n * C::ln2_high;
  r = r - n * C::ln2_low;
  const Vec<Real> r2 = r * r, q = expm1_tail(r, r2) * r2 + r;
  const Ints<Real> whole = bits_of<Real>(shifted) - bits_of<Real>(all<Real>(C::magic)), half = whole >> 1;
  const Vec<Real> one = bits<Real>((half + C::bias) << C::mantissa), two = bits<Real>((whole - half + C::bias) << C::mantissa);
  return (Real(1) + q) * one * two;
}

// eˣ − 1, with full relative precision near 0.
template <class Real>
UV_INLINE Vec<Real> expm1(Vec<Real> x) {
  Vec<Real> near[1] = {x}, power[1], q[1];
  exp_parts<Real>(near, power, q);
  const Vec<Real> small = power[0] * q[0] + (power[0] - Real(1)), large = exp<Real>(x) - Real(1);
  return x < Real(1) ? x > Real(-1) ? small : large : large;
}

UV_INLINE Vec<float> log_tail(Vec<float> s) {
  Vec<float> t = s * (1.0f / 11) + 1.0f / 9;
  t = t * s + 1.0f / 7;
  t = t * s + 1.0f / 5;
  return t * s + 1.0f / 3;
}

UV_INLINE Vec<double> log_tail(Vec<double> s) {
  Vec<double> t = s * (1.0 / 23) + 1.0 / 21;
  t = t * s + 1.0 / 19;
  t = t * s + 1.0 / 17;
  t = t * s + 1.0 / 15;
  t = t * s + 1.0 / 13;
  t = t * s + 1.0 / 11;
  t = t * s + 1.0 / 9;
  t = t * s + 1.0 / 7;
  t = t * s + 1.0 / 5;
  return t * s + 1.0 / 3;
}

// ln x = n ln 2 + ln m, m in [√½, √2), by ln m = 2 artanh f, f = (m − 1) / (m + 1).
template <class Real>
UV_INLINE Vec<Real> log(Vec<Real> x) {
  using C = ExpConstants<Real>;
  Ints<Real> exponent;
  Vec<Real> m = split_exponent<Real>(x, exponent);
  const auto upper = m > Real(1.41421356237309505);
  m = upper ? m * Real(0.5) : m;
  exponent = upper ? exponent + 1 : exponent;
  const Vec<Real> n = __builtin_convertvector(exponent, Vec<Real>), f = (m - Real(1)) / (m + Real(1)), s = f * f;
  const Vec<Real> value = n * C::ln2_high + (n * C::ln2_low + (f + f) * (Real(1) + s * log_tail(s)));
  const Vec<Real> infinity = all<Real>(__builtin_inff()), nan = all<Real>(__builtin_nanf(""));
  return x > Real(0) ? (x < infinity ? value : infinity) : x == Real(0) ? -infinity : x == x ? nan : x;
}

// ln (1 + x), corrected for the rounding of 1 + x.
template <class Real>
UV_INLINE Vec<Real> log1p(Vec<Real> x) {
  const Vec<Real> u = Real(1) + x, value = log<Real>(u) + (x - (u - Real(1))) / u;
  const Vec<Real> infinity = all<Real>(__builtin_inff());
  return u == Real(1) ? x : u == Real(0) ? -infinity : u == infinity ? infinity : value;
}

// A function of the C library, applied to one number at a time.
#define UV_LIBRARY(name)                                                   \
  UV_INLINE float name##_of(float x) { return __builtin_##name##f(x); }   \
  UV_INLINE double name##_of(double x) { return __builtin_##name(x); }
UV_LIBRARY(sqrt)
UV_LIBRARY(sin)
UV_LIBRARY(cos)
UV_LIBRARY(tan)
UV_LIBRARY(atan)
UV_LIBRARY(erf)
UV_LIBRARY(floor)
UV_LIBRARY(ceil)
UV_LIBRARY(rint)
UV_LIBRARY(trunc)
UV_LIBRARY(fabs)
#undef UV_LIBRARY
UV_INLINE float pow_of(float x, float y) { return __builtin_powf(x, y); }
UV_INLINE double pow_of(double x, double y) { return __builtin_pow(x, y); }

}  // namespace
}  // namespace unvanish::UV_ISA
