// Many errors propagated back through a layer, for the adjoint map.
#pragma once

#include <cstdint>

#include "pool.h"
#include "product.h"
#include "sequence.h"
#include "unvanish.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

template <class Real>
class RowsBack {
 public:
  static constexpr int L = kLanes<Real>;

  RowsBack(const Propagation<Real>& given, int threads)
      : p(given),
        n_(p.states * p.H),
        wide_(round_up(p.H, kWide * L)),
        stride_(p.states * wide_),
        rows_(smaller(kRows, (p.K * p.B + threads - 1) / threads)),
        parts_((p.K + rows_ - 1) / rows_),
        slots_(smaller(threads, parts_ * p.B)),
        shared_(p.shared ? n_ * wide_ : 1),
        memory_(slots_ * slot_size()) {
    if (p.shared) pack_plain(p.matrices, n_, p.H, false, shared_.get());
  }

  // Rows are independent of each other, so that any division of the work gives the same result.
  void run(int threads) const {
    for_blocks(parts_ * p.B, threads, 1,
               [&](int64_t task, int slot, TeamMember) { propagate(task / parts_, task % parts_ * rows_, memory_.get() + slot * slot_size()); });
  }

 private:
  // The most rows that are propagated together: so many that packing a step's matrix for them pays, so few that they stay in the cache.
  static constexpr int64_t kRows = 64;

  // A row is rescaled where the square of its norm leaves [1 / kTame, kTame]: a range far from the ends of Real's, and seldom left.
  static constexpr double kTame = 1099511627776.0;  // 2⁴⁰

  int64_t slot_size() const { return 2 * rows_ * stride_ + (p.shared ? 0 : n_ * wide_) + kThreadPadding / static_cast<int64_t>(sizeof(Real)); }

  // Rows [k0, k0 + rows_) of sample b over all steps.
  void propagate(int64_t b, int64_t k0, Real* memory) const {
    const int64_t count = smaller(rows_, p.K - k0);
    Real *rows = memory, *left = rows + rows_ * stride_, *packed = p.shared ? shared_.get() : left + rows_ * stride_;
    zero(rows, rows_ * stride_);  // the padding
    for (int64_t k = 0; k < count; ++k)
      for (int64_t s = 0; s < p.states; ++s) copy(rows + k * stride_ + s * wide_, row_of(b, k0 + k, s), p.H);
    double* exponents = p.exponents + b * p.K + k0;
    int64_t begin = p.reverse ? 0 : count, end = p.reverse ? 0 : count;  // of the rows that have entered
    for (int64_t i = 0; i < p.steps; ++i) {
      const int64_t here = p.reverse ? i : p.steps - 1 - i, t = p.first + here, at = here * p.B + b;
      if (p.reverse)
        while (end < count && p.sources[k0 + end] <= t) ++end;
      else
        while (begin > 0 && p.sources[k0 + begin - 1] >= t) --begin;
      if (begin == end) continue;
      for (int64_t k = begin; k < end; ++k) {
        Real* row = rows + k * stride_;
        if (p.states > 1) add_product(row + wide_, row, p.made + at * p.H);
        p.log_norms[(t * p.B + b) * p.K + k0 + k] = log_norm(row, exponents + k);
        to_left(row, at, left + k * n_);
      }
      if (!p.shared) pack_plain(p.matrices + at * n_ * p.H, n_, p.H, false, packed);
      multiply_rows(Rows<Real>{left, n_}, begin, end, packed, n_, 0, wide_ / (kWide * L), p.H, [&](int64_t k) { return rows + k * stride_; });
      if (p.states > 1)
        for (int64_t k = begin; k < end; ++k) scale(rows + k * stride_ + wide_, p.carried + at * p.H);
    }
    for (int64_t k = 0; k < count; ++k)
      for (int64_t s = 0; s < p.states; ++s) copy(row_of(b, k0 + k, s), rows + k * stride_ + s * wide_, p.H);
  }

  Real* row_of(int64_t b, int64_t k, int64_t state) const { return p.rows + (b * p.K + k) * n_ + state * p.H; }

  // to[j] += v[j] by[j]
  void add_product(Real* to, const Real* v, const Real* by) const {
    for (int64_t j = 0; j < p.H; j += L) store(to + j, load(to + j) + load(v + j) * load(by + j, p.H - j));
  }

  // v[j] *= by[j]
  void scale(Real* v, const Real* by) const {
    for (int64_t j = 0; j < p.H; j += L) store(v + j, load(v + j) * load(by + j, p.H - j));
  }

  // The row as the left side of the product, without padding.
  void to_left(const Real* row, int64_t at, Real* out) const {
    for (int64_t s = 0; s < p.states; ++s)
      for (int64_t j = 0; j < p.H; j += L) {
        Vec<Real> v = load(row + s * wide_ + j);
        if (p.scale != nullptr && s == 0) v *= load(p.scale + at * p.H + j, p.H - j);
        store(out + s * p.H + j, v, p.H - j);
      }
  }

  // ln‖row · 2^exponent‖ of the state that is measured; the row is brought near 1 if it is not.
  double log_norm(Real* row, double* exponent) const {
    double squares[2] = {}, total = 0;
    for (int64_t s = 0; s < p.states; ++s) total += squares[s] = sum_of_squares(row + s * wide_);
    const Real* v = row + p.measured * wide_;
    if (!(total > 1 / kTame && total < kTame)) {
      rescale(row, exponent);
      squares[p.measured] = sum_of_squares(v);
    }
    // Beside the other state this one may have vanished, so far that its squares are lost.
    if (p.states > 1 && squares[p.measured] < 1 / kTame) return log_of_small(v) + *exponent * kLn2;
    return 0.5 * __builtin_log(squares[p.measured]) + *exponent * kLn2;
  }

  double sum_of_squares(const Real* v) const {
    Vec<Real> sums[2] = {};
    for (int64_t j = 0; j < p.H; j += L) {
      const Vec<Real> part = load(v + j);
      sums[j / L % 2] += part * part;
    }
    double total = 0;
    for (const auto& sum : sums)
      for (int j = 0; j < L; ++j) total += static_cast<double>(sum[j]);
    return total;
  }

  // ln‖v‖ without the squares of v.
  double log_of_small(const Real* v) const {
    const double top = largest(v);
    double squares = 0;
    for (int64_t j = 0; j < p.H && top > 0; ++j) squares += (static_cast<double>(v[j]) / top) * (static_cast<double>(v[j]) / top);
    return top > 0 ? 0.5 * __builtin_log(squares) + __builtin_log(top) : -__builtin_inf();
  }

  // Multiplies the row by the power of two that brings its largest element into [1/2, 1), unless it is zero, or no number.
  void rescale(Real* row, double* exponent) const {
    double top = 0;
    for (int64_t s = 0; s < p.states; ++s) {
      const double here = largest(row + s * wide_);
      if (here > top) top = here;
    }
    if (!(top > 0 && top < __builtin_inf())) return;
    int shift;
    __builtin_frexp(top, &shift);
    for (int64_t j = 0; j < stride_; ++j) row[j] = static_cast<Real>(__builtin_ldexp(static_cast<double>(row[j]), -shift));
    *exponent += shift;
  }

  double largest(const Real* v) const {
    double top = 0;
    for (int64_t j = 0; j < p.H; ++j) {
      const double size = __builtin_fabs(static_cast<double>(v[j]));
      if (size > top) top = size;
    }
    return top;
  }

  static constexpr double kLn2 = 0.69314718055994530942;

  const Propagation<Real>& p;
  const int64_t n_, wide_, stride_;     // elements of a row; of a state, padded; of a row, padded
  const int64_t rows_, parts_, slots_;  // rows of a part; parts of a sample; parts at the same time
  const Scratch<Real> shared_;          // the matrix of all steps, in panels
  const Scratch<Real> memory_;          // of each slot: rows, the left side of the product, a step's matrix in panels
};

}  // namespace
}  // namespace unvanish::UV_ISA
