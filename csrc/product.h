// Matrix products on packed weights. Every element is summed over k in one fixed order, whatever the tile it falls into and whoever computes it.

constexpr int kWide = 4;  // vectors across an ordinary panel

// Rows of a tile: as many as leave its accumulators, with NV vectors each, in the registers.
template <int NV>
constexpr int kTile = UV_BYTES == 64 ? 6 : NV == 3 ? 4 : 3;

template <int N>
struct Number {
  static constexpr int value = N;
};

// f(Number<M>, r) for tiles of M ≤ most rows that cover [first, end).
template <int most, class F>
UV_INLINE void for_tiles(int64_t first, int64_t end, F f) {
  int64_t r = first;
  for (; r + most <= end; r += most) f(Number<most>(), r);
  switch (end - r) {
    case 1: f(Number<1>(), r); break;
    case 2: f(Number<2>(), r); break;
    case 3: f(Number<(most > 3 ? 3 : 1)>(), r); break;
    case 4: f(Number<(most > 4 ? 4 : 1)>(), r); break;
    case 5: f(Number<(most > 5 ? 5 : 1)>(), r); break;
    default: break;
  }
}

// One step of a tile's sum: acc[r][v] += left[r] w[v]. With few registers the vectors of w are loaded first: GCC keeps a tile of 4 × 3 in
// registers that way only.
template <class Real, int M, int NV, class Left>
UV_INLINE void multiply_step(Vec<Real> (&acc)[M][NV], Left left, const Real* panel) {
  constexpr int L = kLanes<Real>;
  if constexpr (UV_BYTES == 64) {
    Vec<Real> a[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) a[r] = all<Real>(left(r));
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      Vec<Real> w = load(panel + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) acc[r][v] += a[r] * w;
    }
  } else {
    Vec<Real> w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = load(panel + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      Vec<Real> a = all<Real>(left(r));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += a * w[v];
    }
  }
}

// A matrix whose rows lie one after the other.
template <class Real>
struct Rows {
  const Real* data;
  int64_t stride;

  // acc[r][v] += Σ_k a[first + r, k] · panel[k][v], k in [k0, k1), panel `[K, NV, lanes]`.
  template <int M, int NV>
  UV_INLINE void multiply(Vec<Real> (&acc)[M][NV], int64_t first, int64_t k0, int64_t k1, const Real* panel) const {
    const Real* a = data + first * stride;
    for (int64_t k = k0; k < k1; ++k)
      multiply_step<Real, M, NV>(acc, [&](int r) { return a[r * stride + k]; }, panel + k * NV * kLanes<Real>);
  }
};

// A matrix `[columns / lanes][rows][lanes]`: to go down a column, as the gradient of a weight does, leaves as few cache lines behind as to
// go along a row.
template <class Real>
struct Blocked {
  static constexpr int L = kLanes<Real>, kNext = L;  // from a row to the next
  Real* data;
  int64_t rows;

  UV_INLINE Real* at(int64_t row, int64_t column) const { return data + column / L * rows * L + row * L + column % L; }

  // As Rows::multiply, for whole vectors of k.
  template <int M, int NV>
  UV_INLINE void multiply(Vec<Real> (&acc)[M][NV], int64_t first, int64_t k0, int64_t k1, const Real* panel) const {
    for (int64_t k = k0; k < k1; k += L) {
      const Real* a = at(first, k);
#pragma GCC unroll 1
      for (int j = 0; j < L; ++j)
        multiply_step<Real, M, NV>(acc, [&](int r) { return a[r * L + j]; }, panel + (k + j) * NV * L);
    }
  }
};

// As Blocked, with blocks as wide as a panel.
template <class Real>
struct WideBlocked {
  static constexpr int64_t N = kWide * kLanes<Real>, kNext = N;
  Real* data;
  int64_t rows;

  UV_INLINE Real* block(int64_t q) const { return data + q * rows * N; }
  UV_INLINE Real* at(int64_t row, int64_t column) const { return block(column / N) + row * N + column % N; }
  // Columns [first, end) of one row.
  void put(int64_t row, const Real* from, int64_t first, int64_t end) const {
    for (int64_t c = first / N * N; c < end; c += N) {
      const int64_t a = c > first ? c : first, b = c + N < end ? c + N : end;
      Real* to = block(c / N) + row * N - c;
      if (b - a == N) {
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) store(to + c + v * kLanes<Real>, load(from + c + v * kLanes<Real>));
      } else {
        for (int64_t k = a; k < b; ++k) to[k] = from[k];
      }
    }
  }
};

// Columns of the left matrix that are worked through at a time: their part of a panel then stays in the first cache for all rows.
template <class Real, int NV>
constexpr int64_t kDeep = 24576 / (NV * UV_BYTES) / kLanes<Real> * kLanes<Real>;

// end(first row, sums) for tiles that cover rows [first, end) of left · panel, `[K, NV, lanes]`, started from begin(first row, sums). Where
// the panel is taken in parts, `partial` [(end − first) · NV · lanes] holds the sums in between.
template <int NV, class Real, class Left, class Begin, class End>
UV_INLINE void product(const Left& left, int64_t first, int64_t end, const Real* panel, int64_t K, Real* partial, Begin begin, End finish) {
  constexpr int L = kLanes<Real>;
  for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += kDeep<Real, NV>) {
    const int64_t k1 = k0 + kDeep<Real, NV> < K ? k0 + kDeep<Real, NV> : K;
    for_tiles<kTile<NV>>(first, end, [&](auto tile, int64_t r0) {
      constexpr int M = decltype(tile)::value;
      Vec<Real> acc[M][NV];
      Real* held = partial + (r0 - first) * NV * L;
      if (k0 == 0) {
        begin(r0, acc);
      } else {
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < NV; ++v) acc[r][v] = load(held + (r * NV + v) * L);
      }
      left.template multiply<M, NV>(acc, r0, k0, k1, panel);
      if (k1 == K) {
        finish(r0, acc);
      } else {
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < NV; ++v) store(held + (r * NV + v) * L, acc[r][v]);
      }
    });
  }
}

// out(row)[0 … n) = left W for W in panels `[q][K, kWide, lanes]`, q in [q0, q1); n is cut off the last panel.
template <class Real, class Left, class Out>
void multiply_rows(const Left& left, int64_t first, int64_t end, const Real* panels, int64_t K, int64_t q0, int64_t q1, int64_t n,
                   Real* partial, Out out) {
  constexpr int L = kLanes<Real>, N = kWide * L;
  for (int64_t q = q0; q < q1; ++q)
    product<kWide>(
        left, first, end, panels + q * K * N, K, partial,
        [](int64_t, auto& acc) {
          for (auto& row : acc)
            for (auto& v : row) v = Vec<Real>{};
        },
        [&](int64_t r0, auto& acc) {
          for (auto& row : acc) {
            Real* to = out(r0++);
            for (int v = 0; v < kWide; ++v) {
              const int64_t column = q * N + v * L;
              if (column < n) store(to + column, row[v], n - column);
            }
          }
        });
}

// c[m, 0 … n) += Σ_r a[r, m] b[r, 0 … n) over the first `rows` rows, m in [m0, m1): the gradient of a weight; n in whole panels.
template <class Real>
void add_outer(const Blocked<Real>& a, int64_t m0, int64_t m1, const WideBlocked<Real>& b, int64_t n, int64_t rows, Real* c) {
  constexpr int L = kLanes<Real>, N = kWide * L;
  for (int64_t q = 0; q < n; q += N)
    for_tiles<kTile<kWide>>(m0, m1, [&](auto tile, int64_t m) {
      constexpr int M = decltype(tile)::value;
      Vec<Real> acc[M][kWide] = {};
      const Real* column[M];
      for (int i = 0; i < M; ++i) column[i] = a.at(0, m + i);
      const Real* right = b.block(q / N);
      for (int64_t r = 0; r < rows; ++r)
        multiply_step<Real, M, kWide>(acc, [&](int i) { return column[i][r * L]; }, right + r * N);
      for (int i = 0; i < M; ++i)
        for (int v = 0; v < kWide; ++v) {
          Real* p = c + (m + i) * n + q + v * L;
          store(p, load(p) + acc[i][v]);
        }
    });
}

// out[k] += Σ_r a[r, k] for columns k in [k0, k1): the gradient of a bias.
template <class Real>
void add_rows(const Blocked<Real>& a, int64_t k0, int64_t k1, int64_t rows, Real* out) {
  for (int64_t k = k0; k < k1; k += kLanes<Real>) {
    Vec<Real> total{};
    const Real* column = a.at(0, k);
    for (int64_t r = 0; r < rows; ++r) total += load(column + r * kLanes<Real>);
    store(out + k, load(out + k) + total);
  }
}
