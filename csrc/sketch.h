// Uᵀ ∂E/∂[W_ih, W_hh] = Σ_t (δa_t U)ᵀ [x_t, h_{t−1}] for a matrix U of few columns: it tells gradients apart at a fraction of their cost.
#pragma once

#include <cstdint>

#include "pool.h"
#include "product.h"
#include "sequence.h"
#include "unvanish.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

template <class CellType, class Real>
class Sketch {
 public:
  static constexpr int L = kLanes<Real>;
  static constexpr int kVectors = kProbes / L < kWide ? kProbes / L : kWide;  // across a panel of U
  static constexpr int64_t kPanels = kProbes / (kVectors * L);

  // u: null if no sketch is wanted.
  Sketch(const Sizes<CellType, Real>& sizes, const Layer<Real>& layer, const Real* u)
      : s(sizes), l(layer), u_(u == nullptr ? 1 : s.width * kProbes), sums_(u == nullptr ? 1 : s.blocks * size()) {
    if (u != nullptr) pack_columns<kVectors>(s, u, l.H, kProbes, u_.get(), 0, s.panels);
  }

  // Reals of working memory for each row.
  static constexpr int64_t kRoom = (1 + CellType::kSplit) * kProbes;

  // Adds the contribution of `rows` rows of x, h_{t−1}, δa and δa_hh to the sums of a block; with `overwrite` it replaces them.
  void add(int64_t block, const Blocked<Real>& x, const Blocked<Real>& h, const Blocked<Real>& da, const Blocked<Real>& da_hh, int64_t rows,
           Real* room, bool overwrite, const TeamMember& me) const {
    const Blocked<Real> ih{room, da.rows}, hh = CellType::kSplit ? Blocked<Real>{room + da.rows * kProbes, da.rows} : ih;
    project(da, ih, rows, me);
    if (CellType::kSplit) project(da_hh, hh, rows, me);
    me.sync();
    Real* sums = sums_.get() + block * size();
    add_outer<kVectors>(x, me.from(l.I), me.to(l.I), ih, 0, kPanels, rows, sums, kProbes, overwrite);
    add_outer<kVectors>(h, me.from(l.R), me.to(l.R), hh, 0, kPanels, rows, sums + l.I * kProbes, kProbes, overwrite);
  }

  // Writes the sum over the blocks, `[I + R, kProbes]`.
  void put(Real* out) const {
    copy(out, sums_.get(), size());
    for (int64_t b = 1; b < s.blocks; ++b)
      for (int64_t k = 0; k < size(); ++k) out[k] += sums_.get()[b * size() + k];
  }

 private:
  int64_t size() const { return (l.I + l.R) * kProbes; }

  // This member's rows of δ U.
  void project(const Blocked<Real>& da, const Blocked<Real>& out, int64_t rows, const TeamMember& me) const {
    for (int64_t q = 0; q < kPanels; ++q)
      product<kVectors>(
          da, me.from(rows), me.to(rows), u_.get() + q * s.width * kVectors * L, s.width,
          [](int64_t, auto& acc) {
            for (auto& row : acc)
              for (auto& v : row) v = Vec<Real>{};
          },
          [&](int64_t r, auto& acc) {
            for (auto& row : acc) {
              for (int v = 0; v < kVectors; ++v) store(out.at(r, (q * kVectors + v) * L), row[v]);
              ++r;
            }
          });
  }

  const Sizes<CellType, Real>& s;
  const Layer<Real>& l;
  Scratch<Real> u_, sums_;
};

}  // namespace
}  // namespace unvanish::UV_ISA
