// Norms of gradients, and scaling a vector to a largest norm.
#pragma once

#include <cfloat>
#include <cstdint>

#include "product.h"
#include "sequence.h"
#include "unvanish.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

// Σ v² over n columns, in whole vectors, `at(column)` each.
template <class Sum, class Real, class At>
UV_INLINE Vec<Sum> squares(int64_t n, At at) {
  Vec<Sum> total{};
  for (int64_t k = 0; k < n; k += kLanes<Real>) add_squares(total, load(at(k)));
  return total;
}

// The factor that scales a vector to a 2-norm of at most `most`.
template <class Real>
Real within(double most, const Real* v, int64_t n) {
  const auto norm_over = [&](double scale) {
    double square = 0;
    for (int64_t k = 0; k < n; ++k) square += (v[k] / scale) * (v[k] / scale);
    return __builtin_sqrt(square) * scale;
  };
  double norm = norm_over(1);
  if (norm > __DBL_MAX__) {
    // A double's square can leave the range although the number itself is within it.
    double largest = 0;
    for (int64_t k = 0; k < n; ++k) largest = __builtin_fmax(largest, __builtin_fabs(static_cast<double>(v[k])));
    if (largest <= __DBL_MAX__) norm = norm_over(largest);
  }
  return norm <= most ? Real(1) : static_cast<Real>(most / norm);
}

template <class Real>
void scale(Real* v, int64_t k0, int64_t k1, Real by) {
  if (by == Real(1)) return;
  for (int64_t k = k0; k < k1; ++k) v[k] *= by;
}

// ‖Σ_b u_bᵀ v_b‖_F of a step's samples b by the Gram identity ‖·‖² = Σ_{b,b'} (u_b · u_b')(v_b · v_b'): if there are not many samples, far fewer
// products than the matrix itself takes. Pairs are taken in groups, kRows rows of one against kGroup of the other, whose products fill a vector.
template <class Real>
struct Pairs {
  static constexpr int L = kLanes<Real>;
  static constexpr int kGroup = L >= 8 ? 4 : 2, kRows = L / kGroup;

  // sums[i · kGroup + j] += Σ over the vectors of columns `first`, `first` + `every`, … below `end` of row i of `left` times row j of
  // `right`, lane by lane; consecutive vectors of a row of a Blocked matrix are `stride` elements apart. With kScaled, rows are scaled.
  template <bool kScaled>
  static UV_INLINE void add(const Real* left, const Real* right, int64_t stride, int64_t first, int64_t every, int64_t end, Real scale,
                            Vec<Real> (&sums)[L]) {
    for (int64_t k = first; k < end; k += every) {
      Vec<Real> across[kGroup];
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; ++j) {
        across[j] = load(right + k * stride + j * L);
        if (kScaled) across[j] *= scale;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        Vec<Real> down = load(left + k * stride + i * L);
        if (kScaled) down *= scale;
#pragma GCC unroll 4
        for (int j = 0; j < kGroup; ++j) sums[i * kGroup + j] += down * across[j];
      }
    }
  }

  // The products of the first `rows` rows with the first `columns` ones; the rest are unused.
  static Vec<Real> only(Vec<Real> pairs, int64_t rows, int64_t columns) {
    if (rows >= kRows && columns >= kGroup) return pairs;
    Real lanes[L];
    store(lanes, pairs);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kGroup; ++j)
        if (i >= rows || j >= columns) lanes[i * kGroup + j] = 0;
    return load(lanes);
  }
};

// A block's samples of one step in its working memory: consecutive rows, with the whole matrix's distance between vectors of columns.
template <class Real>
struct StepRows {
  const Real *da, *da_hh, *h_prev, *x;
  int64_t n;
};

// Writes the norms of steps whose δ is in a backward pass's working memory.
template <class CellType, class Real>
struct Measure {
  const Layer<Real>& l;
  const Sizes<CellType, Real>& s;
  const Norms& norms;

  static constexpr int L = kLanes<Real>, A = CellType::kAcross;
  static constexpr int kNear = sizeof(Real) == 4 ? 30 : 200;   // the square of 2^±kNear is well within the range,
  static constexpr int kFar = sizeof(Real) == 4 ? 120 : 1000;  // 2^±kFar is normal
  // If δ is about 1, ‖g_t‖² between these has nearly Real's full precision, whatever the size of inputs and states.
  static constexpr double kLeast = sizeof(Real) == 4 ? 1e-30 : 1e-250, kMost = sizeof(Real) == 4 ? 1e36 : 1e300;

  // The norms of δh, δc and δa of sample r of a block, whose δa is `row` of the chunk.
  template <class Work>
  void sample(int64_t r, int64_t row, const Work& w) const {
    const int64_t at = w.places[row];
    double totals[kTotals];
    // Squares outside a float's range, or too small for a sum of some thousand, are computed in double.
    if (!total_squares<Real>(r, row, w, totals)) total_squares<double>(r, row, w, totals);
    for (int v = 0; v < CellType::kGates; ++v) norms.a[at * CellType::kGates + v] = __builtin_sqrt(totals[v]);
    if (CellType::kHasC) norms.c[at] = __builtin_sqrt(totals[kOfC]);
    norms.h[at] = __builtin_sqrt(totals[kOfH]);
  }

  // Whether n samples are so many that computing g_t itself takes less time than all pairs: measured for all cells at H = 128 and 256.
  bool many(int64_t n) const {
    const int64_t columns = l.I + l.R;
    return n >= 64 && 2 * n * ((CellType::kGates + CellType::kSplit) * l.H + columns) > 3 * s.width * columns;
  }
  // Reals that this takes as working memory.
  int64_t room() const { return many(l.B) ? l.B * (s.Iv + s.Rv + (1 + CellType::kSplit) * s.width) : 0; }

  // ‖g_t‖_F of n samples, whose norms are known, in `blocks` blocks; consecutive vectors of a row are `stride` elements apart.
  void step(int64_t t, int64_t n, const StepRows<Real>* rows, int64_t blocks, int64_t stride, Real* room) const {
    double largest = 0;
    for (int64_t b = 0; b < n && largest == largest; ++b) {
      double square = 0;
      for (int v = 0; v < CellType::kGates; ++v) square += __builtin_pow(norms.a[(t * l.B + b) * CellType::kGates + v], 2);
      if (!(square <= largest)) largest = square;  // also a NaN, which stays
    }
    largest = __builtin_sqrt(largest);
    if (!(largest > 0) || largest > __DBL_MAX__) {
      norms.w[t] = largest;
      return;
    }
    int exponent = 0;
    __builtin_frexp(largest, &exponent);
    // δ times this power of two is about 1: squares could leave Real's range.
    const double scale = __builtin_ldexp(1.0, exponent > kFar ? -kFar : exponent < -kFar ? kFar : -exponent);
    const Real by = static_cast<Real>(scale);
    const bool near = -kNear <= exponent && exponent <= kNear, elements = room != nullptr && many(n);
    double square = elements ? by_elements(n, rows, blocks, stride, by, room)
                    : near   ? by_pairs<false>(rows, blocks, stride, Real(1))
                             : by_pairs<true>(rows, blocks, stride, by);
    const bool scaled = elements || !near;
    // The squares of inputs and states can leave a float's range, too.
    const double least = kLeast * (scaled || largest < 1 ? 1 : largest * largest);
    if (!(square > least && square < kMost)) square = in_double(rows, blocks, stride, scaled ? scale : 1);
    norms.w[t] = __builtin_sqrt(square) / (scaled ? scale : 1);
  }

 private:
  static constexpr int kOfC = 4, kOfH = 5, kTotals = 8;  // after the gates

  // Σ δ² of the gates, of c and of h; returns whether they have the full precision of Real.
  template <class Sum, class Work>
  UV_INLINE bool total_squares(int64_t r, int64_t row, const Work& w, double (&totals)[kTotals]) const {
    constexpr int together = kLanes<Sum> < 4 ? kLanes<Sum> : 4;
    Vec<Sum> found[kTotals] = {};
    for (int v = 0; v < CellType::kGates; ++v) {
      const int64_t every = CellType::kUnits == 1 ? A : 1;  // vectors from a gate's units to the next
      found[v] = squares<Sum, Real>(s.Hp, [&](int64_t unit) { return w.da.at(row, unit * every + v * L); });
    }
    if (CellType::kHasC) found[kOfC] = squares<Sum, Real>(s.Hp, [&](int64_t unit) { return w.total + r * s.Hp + unit; });
    found[kOfH] = squares<Sum, Real>(l.R, [&](int64_t k) { return w.dh + r * s.dh_stride + k; });
    Sum lanes[kTotals + kLanes<Sum>];
    for (int k = 0; k < kTotals; k += together) {
      Vec<Sum> part[together];
      for (int j = 0; j < together; ++j) part[j] = found[k + j];
      store(lanes + k, sums<Sum, together>(part));
    }
    bool exact = true;
    for (int k = 0; k < kTotals; ++k) {
      const bool used = k < CellType::kGates || (k == kOfC && CellType::kHasC) || k == kOfH;
      if (used) exact = exact && lanes[k] > Sum(1e-24) && lanes[k] < Sum(1e36);
      totals[k] = static_cast<double>(lanes[k]);
    }
    return exact || sizeof(Sum) == sizeof(double);
  }

  // ‖g_t‖² from its elements, summed in double.
  double in_double(const StepRows<Real>* rows, int64_t blocks, int64_t stride, double scale) const {
    double square = 0;
    const auto add = [&](const Real* StepRows<Real>::*errors, const Real* StepRows<Real>::*inputs, int64_t width) {
      for (int64_t k = 0; k < width; k += L) {
        const auto for_rows = [&](auto f) {
          for (int64_t b = 0; b < blocks; ++b)
            for (int64_t r = 0; r < rows[b].n; ++r) f(rows[b].*errors + r * L, load(rows[b].*inputs + k / L * stride + r * L));
        };
        bool any = false;
        for_rows([&](const Real*, Vec<Real> v) {
          for (int j = 0; j < L; ++j) any = any || v[j] != 0;
        });
        if (!any) continue;
        for (int64_t u = 0; u < s.width; ++u) {
          double element[L] = {};
          for_rows([&](const Real* d, Vec<Real> v) {
            for (int j = 0; j < L; ++j) element[j] += scale * static_cast<double>(d[u / L * stride + u % L]) * static_cast<double>(v[j]);
          });
          for (double e : element) square += e * e;
        }
      }
    };
    add(&StepRows<Real>::da, &StepRows<Real>::x, s.Iv);
    add(CellType::kSplit ? &StepRows<Real>::da_hh : &StepRows<Real>::da, &StepRows<Real>::h_prev, s.Rv);
    return square;
  }

  // ‖g_t‖², from g_t tile by tile.
  double by_elements(int64_t n, const StepRows<Real>* rows, int64_t blocks, int64_t stride, Real scale, Real* room) const {
    // The rows of all blocks, one after the other.
    const auto gathered = [&](const Real* StepRows<Real>::*field, int64_t width, Real by) {
      const Blocked<Real> all{room, n};
      for (int64_t k = 0; k < width / L; ++k)
        for (int64_t b = 0; b < blocks; ++b) {
          const Real* from = rows[b].*field + k * stride;
          for (int64_t r = 0; r < rows[b].n; ++r, room += L) store(room, load(from + r * L) * by);
        }
      return all;
    };
    const Blocked<Real> x = gathered(&StepRows<Real>::x, s.Iv, Real(1)), h = gathered(&StepRows<Real>::h_prev, s.Rv, Real(1));
    const Blocked<Real> da = gathered(&StepRows<Real>::da, s.width, scale);
    const Blocked<Real> da_hh = CellType::kSplit ? gathered(&StepRows<Real>::da_hh, s.width, scale) : da;
    double square = 0;
    for (int64_t p = 0; p < s.panels; ++p) {
      const Vec<Real> found = squares_of_outer<A>(x, l.I, da, p, n) + squares_of_outer<A>(h, l.R, da_hh, p, n);
      for (int j = 0; j < L; ++j) square += static_cast<double>(found[j]);
    }
    return square;
  }

  template <bool kScaled>
  double by_pairs(const StepRows<Real>* rows, int64_t blocks, int64_t stride, Real scale) const {
    using P = Pairs<Real>;
    Vec<Real> total{};
    for (int64_t p = 0; p < blocks; ++p)
      for (int64_t q = p; q < blocks; ++q)
        for (int64_t a = 0; a < rows[p].n; a += P::kGroup)
          for (int64_t b = p == q ? a : 0; b < rows[q].n; b += P::kGroup)
            for (int64_t i = a; i < a + P::kGroup && i < rows[p].n; i += P::kRows) {
              const Vec<Real> pairs = products<kScaled>(rows[p], i * L, rows[q], b * L, stride, scale);
              const Vec<Real> found = P::only(pairs, rows[p].n - i, rows[q].n - b);
              total += p == q && a == b ? found : found + found;
            }
    double sum = 0;
    for (int j = 0; j < L; ++j) sum += static_cast<double>(total[j]);
    return sum;
  }

  // (u_b · u_b')(v_b · v_b') of a group of pairs, in lanes.
  template <bool kScaled>
  UV_INLINE Vec<Real> products(const StepRows<Real>& left, int64_t i, const StepRows<Real>& right, int64_t j, int64_t stride,
                               Real scale) const {
    const auto of = [&](auto... add) {
      Vec<Real> lanes[L] = {};
      (add(lanes), ...);
      return sums<Real, L>(lanes);
    };
    const auto errors = [&](const Real* u, const Real* with, int64_t first, int64_t every) {
      return [=, this](Vec<Real>(&lanes)[L]) {
        Pairs<Real>::template add<kScaled>(u + i, with + j, stride, first, every, s.width / L, scale, lanes);
      };
    };
    const auto h = [&](Vec<Real>(&lanes)[L]) {
      Pairs<Real>::template add<false>(left.h_prev + i, right.h_prev + j, stride, 0, 1, s.Rv / L, Real(1), lanes);
    };
    const auto x = [&](Vec<Real>(&lanes)[L]) {
      Pairs<Real>::template add<false>(left.x + i, right.x + j, stride, 0, 1, s.Iv / L, Real(1), lanes);
    };
    if constexpr (CellType::kSplit) {
      // δa with respect to W_ih x and to W_hh h differ only in the candidate.
      const Vec<Real> shared = of(errors(left.da, right.da, CellType::R, A), errors(left.da, right.da, CellType::Z, A));
      return (shared + of(errors(left.da, right.da, CellType::N, A))) * of(x) + (shared + of(errors(left.da_hh, right.da_hh, CellType::N, A))) * of(h);
    } else {
      return of(errors(left.da, right.da, 0, 1)) * of(h, x);
    }
  }
};

}  // namespace
}  // namespace unvanish::UV_ISA
