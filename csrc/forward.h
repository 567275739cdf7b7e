// The forward pass: the states of every step from the first read to the last.
#pragma once

#include <cstdint>

#include "pool.h"
#include "product.h"
#include "sequence.h"
#include "statistics.h"
#include "unvanish.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

template <class CellType, class Real>
class Forward {
 public:
  static constexpr int L = kLanes<Real>, A = CellType::kAcross;

  Forward(const Layer<Real>& layer, const Final<Real>& final, const Statistics* wanted, int threads)
      : l(layer),
        final_(final),
        wanted_(wanted),
        s(layer),
        chunk_steps_(smaller(s.steps(kForwardRows), l.T)),
        slots_(s.blocks < threads ? s.blocks : threads),
        w_ih_(s.panels * l.I * A * L),
        w_hh_(s.panels * l.R * A * L),
        w_hr_(l.w_hr == nullptr ? 1 : l.H * s.Rp),
        bias_(s.width),
        bias_q_(s.width),
        memory_(slots_ * Work(*this, nullptr).size),
        log_carry_(wanted == nullptr ? 1 : s.blocks * l.H) {
    for_each(s.panels, threads_for(s.width * (l.I + l.R), threads), [&](int64_t p) {
      pack_gates(s, l.w_ih, l.H, l.I, w_ih_.get(), p, p + 1);
      pack_gates(s, l.w_hh, l.H, l.R, w_hh_.get(), p, p + 1);
    });
    if (l.w_hr != nullptr) pack_plain(l.w_hr, l.R, l.H, true, w_hr_.get());
    for (int64_t k = 0; k < s.width; ++k) {
      const int64_t row = s.source_of(k, l.H);
      const Real ih = row < 0 || l.b_ih == nullptr ? Real(0) : l.b_ih[row];
      const Real hh = row < 0 || l.b_hh == nullptr ? Real(0) : l.b_hh[row];
      const bool separate = CellType::kSplit && k / L % A == CellType::kSplitGate;
      bias_.get()[k] = separate ? ih : ih + hh;
      bias_q_.get()[k] = separate ? hh : Real(0);
    }
  }

  void run(int threads) const {
    for_blocks(s.blocks, threads, s.team, [&](int64_t number, int slot, TeamMember me) {
      const int64_t first = number * s.block_rows, rows = smaller(s.block_rows, l.B - first);
      if (rows > 0) block(number, Walk<Real>{l, first, rows}, Work(*this, memory_.get() + slot * Work(*this, nullptr).size), me);
    });
    gather();
  }

 private:
  // A block's working memory.
  struct Work : Arena<Real> {
    Work(const Forward& run, Real* memory) : Arena<Real>{memory} {
      const Sizes<CellType, Real>& s = run.s;
      const int64_t rows = s.block_rows, most = run.chunk_steps_ * rows;
      now = this->take(rows * s.Rp);
      next = this->take(rows * s.Rp);
      m = run.l.w_hr == nullptr ? nullptr : this->take(rows * s.Hp);
      cell = this->take(rows * s.Hp);
      x = this->take(most * run.l.I);
      projected = this->take(most * s.width);
      this->take(kThreadPadding / static_cast<int64_t>(sizeof(Real)));
    }

    Real *now, *next;  // [rows, Rp] h_{t−1}, h_t
    Real *m, *cell;    // [rows, Hp] o ⊙ tanh c before the projection, c
    Real *x;           // [chunk rows, I]
    Real *projected;   // [chunk rows, width]
  };

  // Adds the blocks' share of the statistics in order.
  void gather() const {
    if (wanted_ == nullptr || CellType::kCarry < 0) return;
    for (int64_t k = 0; k < l.H; ++k) {
      double total = 0;
      for (int64_t b = 0; b * s.block_rows < l.B; ++b) total += log_carry_.get()[b * l.H + k];
      wanted_->log_carry[k] = total;
    }
  }

  void block(int64_t number, const Walk<Real>& walk, Work w, const TeamMember& me) const {
    FlushSubnormals flush;
    if (wanted_ == nullptr || !me.leads()) return steps(walk, w, me, nullptr);
    Tally<CellType, Real> tally(*wanted_, l.H, s.Hp, s.saved);
    steps(walk, w, me, &tally);
    if (CellType::kCarry >= 0) tally.finish(log_carry_.get() + number * l.H);
  }

  void steps(const Walk<Real>& walk, Work& w, const TeamMember& me, Tally<CellType, Real>* tally) const {
    const int64_t first = walk.first, rows = walk.rows;
    if (me.leads()) {
      zero(w.now, w.next + rows * s.Rp - w.now);
      for (int64_t r = 0; r < rows; ++r) {
        copy(w.now + r * s.Rp, l.h0 + (first + r) * l.R, l.R);
        if (CellType::kHasC) {
          copy(w.cell + r * s.Hp, l.c0 + (first + r) * l.H, l.H);
          zero(w.cell + r * s.Hp + l.H, s.Hp - l.H);
        }
      }
    }
    for (int64_t i0 = 0; i0 < l.T; i0 += chunk_steps_) {
      const int64_t i1 = smaller(i0 + chunk_steps_, l.T);
      const int64_t filled = take_in(walk, i0, i1, w, me);
      me.sync();
      project(filled, w, me);
      Real* projected = w.projected;
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t t = walk.step(i), n = walk.active(t);
        Prefetch prefetch;
        if (i + 1 < l.T && me.of == 1) plan_prefetch(walk, walk.step(i + 1), n, prefetch);
        step(walk, t, n, projected, w, me, prefetch);
        projected += n * s.width;
        me.sync();
        if (tally != nullptr) tally->add(walk.gates(t, s.saved), t * l.B + first, n);
        if (me.leads()) {
          const int64_t padding = (t * l.B + first + n) * l.R, count = (rows - n) * l.R;
          zero(l.y + padding, count);
          if (l.y_again != nullptr) zero(l.y_again + padding, count);
        }
        Real* before = w.now;
        w.now = w.next;
        w.next = before;
      }
    }
    if (!me.leads()) return;
    for (int64_t r = 0; r < rows; ++r) {
      copy(final_.h + (first + r) * l.R, w.now + r * s.Rp, l.R);
      if (CellType::kHasC) copy(final_.c + (first + r) * l.H, w.cell + r * s.Hp, l.H);
    }
  }

  // Gathers the active samples' inputs of steps [i0, i1), one after the other; returns their number.
  int64_t take_in(const Walk<Real>& walk, int64_t i0, int64_t i1, const Work& w, const TeamMember& me) const {
    int64_t filled = 0;
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t t = walk.step(i), n = walk.active(t);
      if (i % me.of == me.number) copy(w.x + filled * l.I, l.x + (t * l.B + walk.first) * l.I, n * l.I);
      filled += n;
    }
    return filled;
  }

  void project(int64_t filled, const Work& w, const TeamMember& me) const {
    const Rows<Real> x{w.x, l.I};
    for (int64_t p = me.from(s.panels); p < me.to(s.panels); ++p)
      product<A>(
          x, 0, filled, w_ih_.get() + p * l.I * A * L, l.I,
          [&](int64_t, auto& acc) {
            for (auto& row : acc)
              for (int v = 0; v < A; ++v) row[v] = load(bias_.get() + (p * A + v) * L);
          },
          [&](int64_t r0, auto& acc) {
            Real* to = w.projected + r0 * s.width + p * A * L;
            for (auto& row : acc) {
              for (int v = 0; v < A; ++v) store(to + v * L, row[v]);
              to += s.width;
            }
          });
  }

  // Prefetches the memory that step t will write, during a product of n rows.
  void plan_prefetch(const Walk<Real>& walk, int64_t t, int64_t n, Prefetch& prefetch) const {
    const int64_t at = t * l.B + walk.first;
    prefetch.add(l.y + at * l.R, walk.rows, l.R);
    if (l.y_again != nullptr) prefetch.add(l.y_again + at * l.R, walk.rows, l.R);
    if (l.gates != nullptr && l.gates != l.y) prefetch.add(walk.gates(t, s.saved), walk.rows, s.saved);
    if (l.cells != nullptr) prefetch.add(walk.cells(t, s.Hp), walk.rows, s.Hp);
    prefetch.spread(s.panels * prefetch_calls<A>(n, l.R));
  }

  void step(const Walk<Real>& walk, int64_t t, int64_t n, const Real* projected, const Work& w, const TeamMember& me,
            Prefetch& prefetch) const {
    const int64_t at = t * l.B + walk.first;
    Real* gates = l.gates == nullptr || l.gates == l.y ? nullptr : walk.gates(t, s.saved);
    Real* cells = l.cells == nullptr ? nullptr : walk.cells(t, s.Hp);
    Real *y = l.y + at * l.R, *again = l.y_again == nullptr ? nullptr : l.y_again + at * l.R;
    const Rows<Real> now{w.now, s.Rp};
    const bool whole = l.w_hr == nullptr;
    for (int64_t p = me.from(s.panels); p < me.to(s.panels); ++p)
      product<A>(
          now, 0, n, w_hh_.get() + p * l.R * A * L, l.R,
          [&](int64_t r0, auto& acc) {
            for (auto& row : acc) {
              for (int v = 0; v < A; ++v)
                row[v] = CellType::kSplit ? load(bias_q_.get() + (p * A + v) * L) : load(projected + r0 * s.width + (p * A + v) * L);
              ++r0;
            }
          },
          [&](int64_t row, auto& acc) {
            for (auto& sums : acc) {
              Vec<Real> a[A];
              if (CellType::kSplit)
                for (int v = 0; v < A; ++v) a[v] = load(projected + row * s.width + (p * A + v) * L);
              for (int u = 0; u < CellType::kUnits; ++u) {
                const int64_t unit = (p * CellType::kUnits + u) * L;
                Vec<Real> saved[4], c{}, c_prev{}, h_prev{};
                if (CellType::kHasC) c_prev = load(w.cell + row * s.Hp + unit);
                if (CellType::kSplit) h_prev = load(w.now + row * s.Rp + unit);
                const Vec<Real> h = CellType::template forward<Real>(CellType::kSplit ? a : sums + u, sums, c_prev, saved, c, h_prev);
                if (whole) {
                  store(w.next + row * s.Rp + unit, h);
                  if (unit < l.R) store(y + row * l.R + unit, h, l.R - unit);
                  if (again != nullptr && unit < l.R) store(again + row * l.R + unit, h, l.R - unit);
                } else {
                  store(w.m + row * s.Hp + unit, h);
                }
                if (CellType::kHasC) store(w.cell + row * s.Hp + unit, c);
                if (cells != nullptr) store(cells + row * s.Hp + unit, c);
                if (gates != nullptr) {
                  constexpr int kept = CellType::kSaved / CellType::kUnits;
                  for (int v = 0; v < kept; ++v) store(gates + row * s.saved + (p * CellType::kSaved + u * kept + v) * L, saved[v]);
                }
              }
              ++row;
            }
          },
          [&] { prefetch.advance<1>(); });
    const int64_t wide = kWide * L, q0 = me.from(s.Rp / wide), q1 = me.to(s.Rp / wide);
    if (!whole) {
      me.sync();
      multiply_rows(Rows<Real>{w.m, s.Hp}, 0, n, w_hr_.get(), l.H, q0, q1, l.R, [&](int64_t r) { return y + r * l.R; });
      const int64_t first = q0 * wide, count = smaller(q1 * wide, l.R) - first;
      for (int64_t r = 0; r < n; ++r) {
        copy(w.next + r * s.Rp + first, y + r * l.R + first, count);
        if (again != nullptr) copy(again + r * l.R + first, y + r * l.R + first, count);
      }
    }
    // Samples without this step keep their state.
    const int64_t from = whole ? me.from(s.panels) * s.kBlock : q0 * wide, to = whole ? me.to(s.panels) * s.kBlock : q1 * wide;
    for (int64_t r = n; r < walk.rows; ++r) copy(w.next + r * s.Rp + from, w.now + r * s.Rp + from, to - from);
  }

  const Layer<Real>& l;
  const Final<Real>& final_;
  const Statistics* wanted_;
  const Sizes<CellType, Real> s;
  const int64_t chunk_steps_, slots_;
  Scratch<Real> w_ih_, w_hh_, w_hr_, bias_, bias_q_, memory_;
  Scratch<double> log_carry_;  // [blocks, H]
};

}  // namespace
}  // namespace unvanish::UV_ISA
