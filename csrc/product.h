// Matrix products on packed weights. Every element is summed over k in one fixed order, whichever tile it is in and thread computes it.
#pragma once

#include <cstdint>

#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

constexpr int kWide = 4;  // vectors across an ordinary panel

// Rows of a tile: as many as keep its accumulators, with NV vectors each, in registers.
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

// One step of a tile's sum: acc[r][v] += left[r] w[v]; consecutive vectors of w are `stride` elements apart. With few registers the vectors
// of w are loaded first: only then does GCC keep a tile of 4 × 3 in registers.
template <class Real, int M, int NV, class Left>
UV_INLINE void multiply_step(Vec<Real> (&acc)[M][NV], Left left, const Real* right, int64_t stride = kLanes<Real>) {
  if constexpr (UV_BYTES == 64) {
    Vec<Real> a[M];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) a[r] = all<Real>(left(r));
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      Vec<Real> w = load(right + v * stride);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) acc[r][v] += a[r] * w;
    }
  } else {
    Vec<Real> w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) w[v] = load(right + v * stride);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      Vec<Real> a = all<Real>(left(r));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] += a * w[v];
    }
  }
}

// Software prefetch of the memory that the next step touches, a few cache lines at a time during a product. The hardware prefetcher does not
// follow jumps this long, and requesting all lines at once would delay the product's own loads.
class Prefetch {
 public:
  static constexpr int64_t kLine = 64;

  // `rows` of `width`, one after the other.
  template <class Real>
  void add(const Real* from, int64_t rows, int64_t width) {
    const char* begin = reinterpret_cast<const char*>(from);
    const int64_t bytes = rows * width * static_cast<int64_t>(sizeof(Real));
    if (from == nullptr || bytes == 0) return;
    ranges_[count_++] = {begin, begin + bytes};
    lines_ += (bytes + kLine - 1) / kLine;
  }

  // Spreads all lines evenly over this many calls of advance().
  void spread(int64_t calls) { each_ = calls > 0 ? (lines_ + calls - 1) / calls : 0; }

  template <int kWrite>
  UV_INLINE void advance() {
    for (int64_t k = 0; k < each_ && now_ < count_; ++k) {
      __builtin_prefetch(ranges_[now_].next, kWrite, kWrite ? 3 : 2);
      ranges_[now_].next += kLine;
      if (ranges_[now_].next >= ranges_[now_].end) ++now_;
    }
  }

 private:
  struct Range {
    const char *next, *end;
  } ranges_[5];
  int count_ = 0, now_ = 0;
  int64_t lines_ = 0, each_ = 0;
};

constexpr int64_t kPrefetchInterval = 16;  // columns of the left matrix between two prefetches

// The number of times that a product of n rows and K columns calls on_interval, per panel.
template <int NV>
UV_INLINE int64_t prefetch_calls(int64_t n, int64_t K) {
  return (n + kTile<NV> - 1) / kTile<NV> * ((K + kPrefetchInterval - 1) / kPrefetchInterval);
}

// For a product during which nothing is prefetched.
struct NoPrefetch {
  UV_INLINE void operator()() const {}
};

// A matrix with contiguous rows.
template <class Real>
struct Rows {
  const Real* data;
  int64_t stride;

  // acc[r][v] += Σ_k a[first + r, k] · panel[k][v], panel `[K, NV, lanes]`.
  template <int M, int NV, class OnInterval>
  UV_INLINE void multiply(Vec<Real> (&acc)[M][NV], int64_t first, int64_t K, const Real* panel, OnInterval on_interval) const {
    const Real* a = data + first * stride;
    for (int64_t k = 0; k < K;) {
      on_interval();
#pragma GCC unroll 1
      for (const int64_t end = k + kPrefetchInterval < K ? k + kPrefetchInterval : K; k < end; ++k)
        multiply_step<Real, M, NV>(acc, [&](int r) { return a[r * stride + k]; }, panel + k * NV * kLanes<Real>);
    }
  }
};

// A matrix `[columns / lanes][rows][lanes]`: walking down a column, as for a weight's gradient, touches as few cache lines as walking along
// a row.
template <class Real>
struct Blocked {
  static constexpr int L = kLanes<Real>;
  Real* data;
  int64_t rows;

  UV_INLINE Real* at(int64_t row, int64_t column) const { return data + column / L * rows * L + row * L + column % L; }

  // Columns [first, end) of one row, which `from` holds whole; `first` begins a vector.
  void put(int64_t row, const Real* from, int64_t first, int64_t end) const {
    int64_t k = first;
    for (; k + L <= end; k += L) store(at(row, k), load(from + k));
    for (; k < end; ++k) *at(row, k) = from[k];
  }

  // As Rows::multiply, for whole vectors of k.
  template <int M, int NV, class OnInterval>
  UV_INLINE void multiply(Vec<Real> (&acc)[M][NV], int64_t first, int64_t K, const Real* panel, OnInterval on_interval) const {
    for (int64_t k = 0; k < K; k += L) {
      if (k % kPrefetchInterval == 0) on_interval();
      const Real* a = at(first, k);
#pragma GCC unroll 1
      for (int j = 0; j < L; ++j)
        multiply_step<Real, M, NV>(acc, [&](int r) { return a[r * L + j]; }, panel + (k + j) * NV * L);
    }
  }
};

// finish(first row, sums) for tiles that cover rows [first, end) of left · panel, `[K, NV, lanes]`, started from begin(first row, sums). A
// panel is streamed from the L2 cache for every tile: splitting it into parts that fit into L1 takes longer.
template <int NV, class Real, class Left, class Begin, class Finish, class OnInterval = NoPrefetch>
UV_INLINE void product(const Left& left, int64_t first, int64_t end, const Real* panel, int64_t K, Begin begin, Finish finish,
                       OnInterval on_interval = OnInterval()) {
  for_tiles<kTile<NV>>(first, end, [&](auto tile, int64_t r0) {
    constexpr int M = decltype(tile)::value;
    Vec<Real> acc[M][NV];
    begin(r0, acc);
    left.template multiply<M, NV>(acc, r0, K, panel, on_interval);
    finish(r0, acc);
  });
}

// out(row)[0 … n) = left W for W in panels `[q][K, kWide, lanes]`, q in [q0, q1); the last panel is cut off at n.
template <class Real, class Left, class Out>
void multiply_rows(const Left& left, int64_t first, int64_t end, const Real* panels, int64_t K, int64_t q0, int64_t q1, int64_t n, Out out) {
  constexpr int L = kLanes<Real>, N = kWide * L;
  for (int64_t q = q0; q < q1; ++q)
    product<kWide>(
        left, first, end, panels + q * K * N, K,
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

// finish(m, k, sums) for tiles [m …, k …] of Σ_r a[r, m] b[r, k] over the first `rows` rows, m in [m0, m1), k in panels [q0, q1) of NV vectors.
template <int NV, class Real, class Finish>
UV_INLINE void outer(const Blocked<Real>& a, int64_t m0, int64_t m1, const Blocked<Real>& b, int64_t q0, int64_t q1, int64_t rows, Finish finish) {
  constexpr int L = kLanes<Real>;
  for (int64_t k = q0 * NV * L; k < q1 * NV * L; k += NV * L)
    for_tiles<kTile<NV>>(m0, m1, [&](auto tile, int64_t m) {
      constexpr int M = decltype(tile)::value;
      Vec<Real> acc[M][NV] = {};
      const Real* column[M];
      for (int i = 0; i < M; ++i) column[i] = a.at(0, m + i);
      const Real* right = b.at(0, k);
      const int64_t distance = b.rows * L;
      for (int64_t r = 0; r < rows; ++r)
        multiply_step<Real, M, NV>(acc, [&](int i) { return column[i][r * L]; }, right + r * L, distance);
      finish(m, k, acc);
    });
}

// c[m, k] += these sums: the gradient of a weight; with `overwrite` they replace c. Rows of c are `stride` elements apart.
template <int NV, class Real>
void add_outer(const Blocked<Real>& a, int64_t m0, int64_t m1, const Blocked<Real>& b, int64_t q0, int64_t q1, int64_t rows, Real* c,
               int64_t stride, bool overwrite = false) {
  outer<NV>(a, m0, m1, b, q0, q1, rows, [&](int64_t m, int64_t k, auto& acc) {
    for (auto& sums : acc) {
      for (int v = 0; v < NV; ++v) {
        Real* p = c + m * stride + k + v * kLanes<Real>;
        store(p, overwrite ? sums[v] : load(p) + sums[v]);
      }
      ++m;
    }
  });
}

// Σ of the squares of these sums, lane by lane.
template <int NV, class Real>
Vec<Real> squares_of_outer(const Blocked<Real>& a, int64_t m1, const Blocked<Real>& b, int64_t q, int64_t rows) {
  Vec<Real> total{};
  outer<NV>(a, 0, m1, b, q, q + 1, rows, [&](int64_t, int64_t, auto& acc) {
    for (auto& sums : acc)
      for (auto& v : sums) total += v * v;
  });
  return total;
}

// out[k] += Σ_r a[r, k] for columns k in [k0, k1): the gradient of a bias; with `overwrite` the sum replaces out.
template <class Real>
void add_rows(const Blocked<Real>& a, int64_t k0, int64_t k1, int64_t rows, Real* out, bool overwrite = false) {
  for (int64_t k = k0; k < k1; k += kLanes<Real>) {
    Vec<Real> total{};
    const Real* column = a.at(0, k);
    for (int64_t r = 0; r < rows; ++r) total += load(column + r * kLanes<Real>);
    store(out + k, overwrite ? total : load(out + k) + total);
  }
}

}  // namespace
}  // namespace unvanish::UV_ISA
