// The gradients of the weights, summed over the steps of each block on its own, then over the blocks in order.
#pragma once

#include <cstdint>

#include "pool.h"
#include "sequence.h"
#include "unvanish.h"

namespace unvanish::UV_ISA {
namespace {

template <class CellType, class Real>
class GradientSums {
 public:
  static constexpr int L = kLanes<Real>, A = CellType::kAcross;

  GradientSums(const Sizes<CellType, Real>& sizes, const Layer<Real>& layer) : s(sizes), l(layer), sums_(s.blocks * size()) {}

  // Where the sums of a block begin.
  Real* of(int64_t number) const { return sums_.get() + number * size(); }
  // Where among them the gradient of each weight lies: [columns of the weight, gates in the order of δa]; of W_hr [P, dh_stride].
  int64_t dw_ih() const { return 0; }
  int64_t dw_hh() const { return l.I * s.width; }
  int64_t db_ih() const { return dw_hh() + l.R * s.width; }
  int64_t db_hh() const { return db_ih() + s.width; }
  int64_t dw_hr() const { return db_hh() + s.width; }
  int64_t size() const { return dw_hr() + (l.w_hr == nullptr ? 0 : l.R * s.dh_stride); }

  // Adds the blocks' sums in order and puts them where torch wants them.
  void gather(const Gradients<Real>& g, int threads) const {
    threads = threads_for(s.blocks * size(), threads);
    for_each(s.panels, threads, [&](int64_t p) {
      int64_t rows[A * L];
      for (int64_t k = 0; k < A * L; ++k) rows[k] = s.source_of(p * A * L + k, l.H);
      const auto put = [&](int64_t at, Real* out, int64_t columns) {
        for (int64_t c = 0; out != nullptr && c < columns; ++c) {
          Real total[A * L];
          add_blocks(at + c * s.width + p * A * L, total, A * L);
          for (int64_t k = 0; k < A * L; ++k)
            if (rows[k] >= 0) out[rows[k] * columns + c] = total[k];
        }
      };
      put(dw_ih(), g.dw_ih, l.I);
      put(dw_hh(), g.dw_hh, l.R);
      put(db_ih(), g.db_ih, 1);
      put(CellType::kSplit ? db_hh() : db_ih(), g.db_hh, 1);
    });
    if (l.w_hr == nullptr) return;
    for (int64_t r = 0; r < l.R; ++r) add_blocks(dw_hr() + r * s.dh_stride, g.dw_hr + r * l.H, l.H);
  }

 private:
  void add_blocks(int64_t at, Real* out, int64_t n) const {
    copy(out, sums_.get() + at, n);
    for (int64_t b = 1; b < s.blocks; ++b) {
      const Real* more = of(b) + at;
      for (int64_t k = 0; k < n; ++k) out[k] += more[k];
    }
  }

  const Sizes<CellType, Real>& s;
  const Layer<Real>& l;
  Scratch<Real> sums_;
};

}  // namespace
}  // namespace unvanish::UV_ISA
