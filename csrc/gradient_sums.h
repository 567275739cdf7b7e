// The gradients of the weights, summed over the steps of each block separately, then over the blocks in order.
#pragma once

#include <cstdint>

#include "pool.h"
#include "product.h"
#include "sequence.h"
#include "unvanish.h"

namespace unvanish::UV_ISA {
namespace {

template <class CellType, class Real>
class GradientSums {
 public:
  static constexpr int L = kLanes<Real>, A = CellType::kAcross;

  GradientSums(const Sizes<CellType, Real>& sizes, const Layer<Real>& layer, bool wanted) : s(sizes), l(layer), sums_(wanted ? s.blocks * size() : 1) {}

  // Adds the contribution of `rows` rows of x, h_{t−1}, δa and δa_hh to a block's sums of panels [p0, p1); with `overwrite` it replaces
  // them. Given `out`, where no other rows contribute, each panel is written there while it is in the cache, and the next one reuses its memory.
  void add(int64_t block, int64_t p0, int64_t p1, const Blocked<Real>& x, const Blocked<Real>& h, const Blocked<Real>& da,
           const Blocked<Real>& da_hh, int64_t rows, bool overwrite, const Gradients<Real>* out) const {
    for (int64_t p = p0; p < p1; ++p) {
      Real* sums = of(block) + (out == nullptr ? p : p0) * panel_size();
      const Blocked<Real> ih{da.at(0, p * A * L), da.rows}, hh{da_hh.at(0, p * A * L), da_hh.rows};
      add_outer<A>(x, 0, l.I, ih, 0, 1, rows, sums + dw_ih(), A * L, overwrite);
      add_outer<A>(h, 0, l.R, hh, 0, 1, rows, sums + dw_hh(), A * L, overwrite);
      add_rows(ih, 0, A * L, rows, sums + db_ih(), overwrite);
      if (CellType::kSplit) add_rows(hh, 0, A * L, rows, sums + db_hh(), overwrite);
      if (out != nullptr) put(p, *out, sums, 1);
    }
  }

  // The same for rows [p0, p1) of W_hr, from δh and o ⊙ tanh c.
  void add_projection(int64_t block, int64_t p0, int64_t p1, const Blocked<Real>& dh, const Blocked<Real>& m, int64_t rows, bool overwrite) const {
    add_outer<kWide>(dh, p0, p1, m, 0, s.dh_stride / (kWide * L), rows, of(block) + dw_hr(), s.dh_stride, overwrite);
  }

  // Writes all sums but that of W_hr in torch's layout.
  void put_all(const Gradients<Real>& g, int threads) const {
    for_each(s.panels, threads_for(s.blocks * size(), threads), [&](int64_t p) { put(p, g, of(0) + p * panel_size(), s.blocks); });
  }

  void put_projection(const Gradients<Real>& g) const {
    if (l.w_hr == nullptr) return;
    for (int64_t r = 0; r < l.R; ++r) {
      const Real* sums = of(0) + dw_hr() + r * s.dh_stride;
      Real* out = g.dw_hr + r * l.H;
      copy(out, sums, l.H);
      for (int64_t b = 1; b < s.blocks; ++b)
        for (int64_t k = 0; k < l.H; ++k) out[k] += sums[b * size() + k];
    }
  }

 private:
  // Where the sums of a block begin: those of the panels of gates, one after the other, then that of W_hr, [P, dh_stride].
  Real* of(int64_t block) const { return sums_.get() + block * size(); }
  int64_t size() const { return dw_hr() + (l.w_hr == nullptr ? 0 : l.R * s.dh_stride); }
  // Within a panel: [columns of the weight, gates in the order of δa].
  int64_t panel_size() const { return (l.I + l.R + 2) * A * L; }
  int64_t dw_ih() const { return 0; }
  int64_t dw_hh() const { return l.I * A * L; }
  int64_t db_ih() const { return dw_hh() + l.R * A * L; }
  int64_t db_hh() const { return db_ih() + A * L; }
  int64_t dw_hr() const { return s.panels * panel_size(); }

  // Writes the sums of panel p in torch's layout: those of the first block begin at `sums`, and those of `blocks` are added in order.
  void put(int64_t p, const Gradients<Real>& g, const Real* sums, int64_t blocks) const {
    int64_t rows[A * L];
    for (int64_t k = 0; k < A * L; ++k) rows[k] = s.source_of(p * A * L + k, l.H);
    // One cache line of each row at a time: rows a power of two apart map to the same cache sets.
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(Real));
    const auto put = [&](int64_t at, Real* out, int64_t columns) {
      for (int64_t c = 0; out != nullptr && c < columns; c += line)
        for (int v = 0; v < A; ++v)
          for (int64_t k = c; k < c + line && k < columns; k += L) put_tile(sums + at + (k * A + v) * L, blocks, rows + v * L, out + k, columns, columns - k);
    };
    put(dw_ih(), g.dw_ih, l.I);
    put(dw_hh(), g.dw_hh, l.R);
    put(db_ih(), g.db_ih, 1);
    put(CellType::kSplit ? db_hh() : db_ih(), g.db_hh, 1);
  }

  // The sums of L gates over up to L columns of the weight, from column by column to row by row; out: the first of these columns.
  void put_tile(const Real* first, int64_t blocks, const int64_t* rows, Real* out, int64_t columns, int64_t left) const {
    const int64_t n = smaller(left, L);
    Vec<Real> tile[L] = {};
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t j = 0; j < n; ++j) {
        const Vec<Real> more = load(first + b * size() + j * A * L);
        tile[j] = b == 0 ? more : tile[j] + more;
      }
    transpose<Real>(tile);
    for (int i = 0; i < L; ++i)
      if (rows[i] >= 0) store(out + rows[i] * columns, tile[i], n);
  }

  const Sizes<CellType, Real>& s;
  const Layer<Real>& l;
  Scratch<Real> sums_;
};

}  // namespace
}  // namespace unvanish::UV_ISA
