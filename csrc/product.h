// Matrix products on packed weights. Every element is summed over k in one fixed order, whatever the tile it falls into.

constexpr int kTile = UV_BYTES == 64 ? 6 : 3;  // rows whose accumulators, with four vectors each, fit the registers
constexpr int kWide = 4;                       // vectors across an ordinary panel

template <int N>
struct Number {
  static constexpr int value = N;
};

// f(Number<M>, r) for tiles of M rows that cover [0, n).
template <class F>
UV_INLINE void for_tiles(int64_t n, F f) {
  int64_t r = 0;
  for (; r + kTile <= n; r += kTile) f(Number<kTile>(), r);
  switch (n - r) {
    case 1: f(Number<1>(), r); break;
    case 2: f(Number<2>(), r); break;
    case 3: f(Number<(kTile > 3 ? 3 : 1)>(), r); break;
    case 4: f(Number<(kTile > 3 ? 4 : 1)>(), r); break;
    case 5: f(Number<(kTile > 3 ? 5 : 1)>(), r); break;
    default: break;
  }
}

// acc[r][v] += Σ_k a[r·stride + k] · panel[k][v]: M rows against one panel `[K, NV, lanes]`.
template <class Real, int M, int NV>
UV_INLINE void multiply(Vec<Real> (&acc)[M][NV], const Real* a, int64_t stride, const Real* panel, int64_t K) {
  constexpr int L = kLanes<Real>;
  for (int64_t k = 0; k < K; ++k) {
    Vec<Real> left[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) left[r] = all<Real>(a[r * stride + k]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      Vec<Real> w = load(panel + (k * NV + v) * L);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) acc[r][v] += left[r] * w;
    }
  }
}

// out[r, 0 … n) = a[r, 0 … K) W for W in panels `[q][K, kWide, lanes]`; n is cut off the last panel.
template <class Real>
void multiply_rows(const Real* a, int64_t a_stride, int64_t rows, const Real* panels, int64_t K, Real* out,
                   int64_t out_stride, int64_t n) {
  constexpr int L = kLanes<Real>, N = kWide * L;
  for (int64_t q = 0; q * N < n; ++q) {
    const Real* panel = panels + q * K * N;
    for_tiles(rows, [&](auto tile, int64_t r0) {
      constexpr int M = decltype(tile)::value;
      Vec<Real> acc[M][kWide] = {};
      multiply<Real, M, kWide>(acc, a + r0 * a_stride, a_stride, panel, K);
      for (int r = 0; r < M; ++r)
        for (int v = 0; v < kWide; ++v) {
          int64_t column = q * N + v * L;
          if (column < n) store(out + (r0 + r) * out_stride + column, acc[r][v], n - column);
        }
    });
  }
}

// c[m, 0 … n) += Σ_r a[r, m] b[r, 0 … n): the gradient of a weight; n is a multiple of a wide panel, m of the tile or less.
template <class Real>
void add_outer(const Real* a, int64_t m, const Real* b, int64_t n, int64_t rows, Real* c) {
  constexpr int L = kLanes<Real>, N = kWide * L;
  for (int64_t q = 0; q < n; q += N)
    for_tiles(m, [&](auto tile, int64_t m0) {
      constexpr int M = decltype(tile)::value;
      Vec<Real> acc[M][kWide] = {};
      for (int64_t r = 0; r < rows; ++r) {
        Vec<Real> left[M];
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) left[i] = all<Real>(a[r * m + m0 + i]);
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) {
          Vec<Real> right = load(b + r * n + q + v * L);
#pragma GCC unroll 8
          for (int i = 0; i < M; ++i) acc[i][v] += left[i] * right;
        }
      }
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < kWide; ++v) {
          Real* p = c + (m0 + i) * n + q + v * L;
          store(p, load(p) + acc[i][v]);
        }
    });
}
