// Vectors of one instruction set, and the functions the cells need of them. Included once per instruction set, in a namespace of its own;
// no standard templates here, whose copies the linker could mix up between instruction sets.
//
// UV_BYTES is the width of a vector.

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

// n ≥ 1 of the lanes; the others are 0, or left alone in memory.
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
  return value - Vec<Real>{};  // x − 0 is x, for −0 too, which the compiler knows; of 0 + x it does not
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

// (eʳ − 1) / r − 1 over |r| ≤ ln 2 / 2, times 1/r: the Taylor series is short enough there.
UV_INLINE Vec<float> expm1_tail(Vec<float> r) {
  Vec<float> p = all(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  return p * r + 0.5f;
}

UV_INLINE Vec<double> expm1_tail(Vec<double> r) {
  Vec<double> p = all(1.0 / 87178291200.0);
  p = p * r + 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  return p * r + 0.5;
}

// eˣ = 2ⁿ (1 + q), q = eʳ − 1, |r| ≤ ln 2 / 2; x is clamped to where 2ⁿ is normal.
template <class Real>
UV_INLINE void exp_parts(Vec<Real> x, Vec<Real>& power, Vec<Real>& q) {
  using C = ExpConstants<Real>;
  x = x > C::limit ? all<Real>(C::limit) : x;
  x = x < -C::limit ? all<Real>(-C::limit) : x;
  Vec<Real> shifted = x * C::log2e + C::magic;
  Vec<Real> n = shifted - C::magic;
  Vec<Real> r = x - n * C::ln2_high;
  r = r - n * C::ln2_low;
  q = r + r * r * expm1_tail(r);
  Ints<Real> exponent = bits_of<Real>(shifted) << C::mantissa;
  power = bits<Real>(exponent + (C::bias << C::mantissa));
}

template <class Real>
UV_INLINE Vec<Real> sigmoid(Vec<Real> x) {
  Vec<Real> power, q;
  exp_parts<Real>(-x, power, q);
  Vec<Real> v = Real(1) / (Real(1) + power + power * q);
  return x != x ? x : v;
}

// tanh x = (e²ˣ − 1) / (e²ˣ + 1), with e²ˣ − 1 = 2ⁿ q + (2ⁿ − 1): exact in relative terms near 0 too.
template <class Real>
UV_INLINE Vec<Real> tanh(Vec<Real> x) {
  Vec<Real> power, q;
  Vec<Real> twice = x + x;
  twice = twice > Real(44) ? all<Real>(44) : twice;
  twice = twice < Real(-44) ? all<Real>(-44) : twice;
  exp_parts<Real>(twice, power, q);
  Vec<Real> m = power * q + (power - Real(1));
  Vec<Real> v = m / (m + Real(2));
  return x != x ? x : v;
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

template <class Real, int... J>
UV_INLINE Vec<Real> add_neighbours(Vec<Real> a, Vec<Real> b, Lanes<J...>) {
  return __builtin_shufflevector(a, b, 2 * J...) + __builtin_shufflevector(a, b, (2 * J + 1)...);
}

// Lane k is the sum of v[k]'s lanes, for N = 2ⁿ ≤ lanes vectors; the lanes from N on repeat them.
// kSpan: the lanes over which a sum still lies.
template <class Real, int N, int kSpan = kLanes<Real>>
UV_INLINE Vec<Real> sums(const Vec<Real> (&v)[N]) {
  using lanes = typename UpTo<kLanes<Real>>::lanes;
  if constexpr (N > 1) {
    Vec<Real> half[N / 2];
#pragma GCC unroll 8
    for (int k = 0; k < N / 2; ++k) half[k] = add_neighbours<Real>(v[2 * k], v[2 * k + 1], lanes());
    return sums<Real, N / 2, kSpan / 2>(half);
  } else if constexpr (kSpan > 1) {
    const Vec<Real> total[1] = {add_neighbours<Real>(v[0], v[0], lanes())};
    return sums<Real, 1, kSpan / 2>(total);
  } else {
    return v[0];
  }
}

// Squares are added up in double, where those of float neither overflow nor vanish.
UV_INLINE void add_squares(Vec<double>& total, Vec<float> v) {
  typedef float Half __attribute__((vector_size(UV_BYTES / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &v, sizeof halves);
  for (Half half : halves) {
    Vec<double> wide = __builtin_convertvector(half, Vec<double>);
    total += wide * wide;
  }
}

UV_INLINE void add_squares(Vec<double>& total, Vec<double> v) { total += v * v; }

// The lanes below n, the others 0.
template <class Real>
UV_INLINE Vec<Real> first_lanes(Vec<Real> v, int64_t n) {
  if (n >= kLanes<Real>) return v;
  Real lanes[kLanes<Real>];
  store(lanes, v);
  for (int64_t j = n > 0 ? n : 0; j < kLanes<Real>; ++j) lanes[j] = 0;
  return load(lanes);
}

// x > 0 as mantissa · 2^exponent, mantissa in [1, 2).
template <class Real>
UV_INLINE Vec<Real> split_exponent(Vec<Real> x, Ints<Real>& exponent) {
  using C = ExpConstants<Real>;
  const Ints<Real> word = bits_of<Real>(x), unit = Ints<Real>{} + (C::bias << C::mantissa);
  exponent = (word >> C::mantissa) - C::bias;
  return bits<Real>((word & ~(Ints<Real>{} + (((C::bias * 2 + 1)) << C::mantissa))) | unit);
}
