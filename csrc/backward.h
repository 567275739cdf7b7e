// The backward pass: δ from the last step read to the first, and all gradients.
#pragma once

#include <cstdint>

#include "gradient_sums.h"
#include "norms.h"
#include "pool.h"
#include "product.h"
#include "sequence.h"
#include "sketch.h"
#include "unvanish.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

template <class CellType, class Real>
class Backward {
 public:
  static constexpr int L = kLanes<Real>, A = CellType::kAcross;

  Backward(const Layer<Real>& layer, const Gradients<Real>& gradients, const Norms* norms, int threads)
      : l(layer),
        g(gradients),
        norms_(norms),
        s(layer),
        chunk_steps_(smaller(s.steps(kBackwardRows), l.T)),
        // Where norms are wanted, all blocks have memory of their own.
        slots_(norms != nullptr || s.blocks < threads ? s.blocks : threads),
        room_size_(norms == nullptr || s.blocks == 1 ? 0 : Measure<CellType, Real>{l, s, *norms}.room()),
        w_hh_(s.width * s.Rp),
        w_ih_(g.dx == nullptr ? 1 : s.width * round_up(l.I, kWide * L)),
        w_hr_(l.w_hr == nullptr ? 1 : l.R * s.dh_stride),
        sums_(s, layer, g.probes == nullptr),
        sketch_(s, layer, g.probes),
        memory_(slots_ * Work(*this, nullptr).size),
        places_(slots_ * most_rows()),
        step_rows_(norms == nullptr ? 1 : threads * s.blocks),
        room_(1 + threads * room_size_) {
    for_each(s.panels, threads_for(s.width * (l.R + l.I), threads), [&](int64_t p) {
      pack_columns(s, l.w_hh, l.H, l.R, w_hh_.get(), p, p + 1);
      if (g.dx != nullptr) pack_columns(s, l.w_ih, l.H, l.I, w_ih_.get(), p, p + 1);
    });
    if (l.w_hr != nullptr) pack_plain(l.w_hr, l.R, l.H, false, w_hr_.get());
  }

  void run(int threads) const {
    if (norms_ != nullptr && s.blocks > 1)
      in_lockstep(threads);
    else
      for_blocks(s.blocks, threads, s.team, [&](int64_t number, int slot, TeamMember me) {
        const Work w = work(slot);
        begin(number, w, me);
        for (int64_t i1 = l.T; i1 > 0; i1 -= chunk_steps_) chunk(number, i1 - smaller(i1, chunk_steps_), i1, 0, w, me);
        end(number, w, me);
      });
    if (g.probes != nullptr) return sketch_.put(g.sketch);
    if (!one_chunk()) sums_.put_all(g, threads);
    sums_.put_projection(g);
  }

 private:
  // Extra rows: a group of pairs may read past the last row, and vectors 4096 bytes apart would map to the same cache set.
  static constexpr int64_t kSpare = Pairs<Real>::kGroup;
  static constexpr int64_t kChunksHeld = 2;  // where blocks run in lockstep over several chunks: one being computed, one being measured

  // A block's working memory.
  struct Work : Arena<Real> {
    Work(const Backward& run, Real* memory) : Arena<Real>{memory} {
      const Sizes<CellType, Real>& s = run.s;
      const bool projected = run.l.w_hr != nullptr;
      const bool alternates = run.norms_ != nullptr && s.blocks > 1 && run.chunk_steps_ < run.l.T;
      const int64_t rows = s.block_rows, most = run.most_rows() + kSpare, held = alternates ? kChunksHeld : 1;
      carried = this->take(rows * s.dh_stride);
      dh = this->take(2 * rows * s.dh_stride);
      total = run.norms_ == nullptr ? nullptr : this->take(2 * rows * s.Hp);
      dm = this->take(rows * s.dh_stride);
      dc = this->take(rows * s.Hp);
      h_prev = {this->take(held * most * s.Rv), most};
      x = {this->take(held * most * s.Iv), most};
      da = {this->take(held * most * s.width), most};
      da_hh = CellType::kSplit ? Blocked<Real>{this->take(held * most * s.width), most} : da;
      if (projected) {
        m = {this->take(held * most * s.dh_stride), most};
        projected_dh = {this->take(held * most * s.Rv), most};
      }
      padded_size = this->size;
      if (run.g.probes != nullptr) sketch_room = this->take(most * Sketch<CellType, Real>::kRoom);
      this->take(kThreadPadding / static_cast<int64_t>(sizeof(Real)));
    }

    // The memory of chunk `number` among those held.
    Work part(int64_t number, const Sizes<CellType, Real>& s) const {
      Work w = *this;
      const int64_t skipped = number * da.rows;
      w.h_prev.data += skipped * s.Rv;
      w.x.data += skipped * s.Iv;
      w.da.data += skipped * s.width;
      w.da_hh.data += skipped * s.width;
      if (m.data != nullptr) {
        w.m.data += skipped * s.dh_stride;
        w.projected_dh.data += skipped * s.Rv;
      }
      return w;
    }

    Real *carried;                     // [rows, dh_stride] the contribution of step t to δh_{t−1}
    Real *dh;                          // [2, rows, dh_stride] δh_t of this step and of the previous one, which members may still be measuring
    Real *total;                       // [2, rows, Hp] δc_t, likewise; null where nothing is measured
    Real *dm;                          // [rows, dh_stride] δh_t before the projection
    Real *dc;                          // [rows, Hp] the contribution of later steps to δc
    Blocked<Real> h_prev, x;           // [chunk rows, Rv], [chunk rows, Iv]
    Blocked<Real> da, da_hh;           // [chunk rows, width]
    Real* sketch_room = nullptr;       // [chunk rows, kRoom] δ U; null: no sketch is wanted
    Blocked<Real> m{};                 // [chunk rows, dh_stride] o ⊙ tanh c
    Blocked<Real> projected_dh{};      // [chunk rows, Rv]
    int64_t* places = nullptr;         // [chunk rows] where in [T, B] each row is
    int64_t padded_size;
  };

  bool one_chunk() const { return s.blocks == 1 && chunk_steps_ >= l.T; }
  int64_t most_rows() const { return chunk_steps_ * s.block_rows; }
  Work work(int64_t slot) const {
    Work w(*this, memory_.get() + slot * Work(*this, nullptr).size);
    w.places = places_.get() + slot * most_rows();
    return w;
  }
  Walk<Real> walk(int64_t number) const {
    const int64_t first = number * s.block_rows;
    return {l, first, smaller(s.block_rows, l.B - first)};
  }

  // All blocks in lockstep, so that g_t, to which all samples contribute, can be measured along the way. One round of tasks computes a
  // chunk of every block, then measures each step of the previous chunk. Tasks are taken in order and wait only for earlier ones, so no
  // number of threads can deadlock.
  void in_lockstep(int threads) const {
    const int64_t chunks = (l.T + chunk_steps_ - 1) / chunk_steps_;
    Scratch<int64_t> done(s.blocks), measured(chunks);  // chunks of each block, steps of each chunk
    for (int64_t b = 0; b < s.blocks; ++b) done.get()[b] = 0;
    for (int64_t c = 0; c < chunks; ++c) measured.get()[c] = 0;
    const auto end_of = [&](int64_t c) { return l.T - c * chunk_steps_; };
    const auto start_of = [&](int64_t c) { return end_of(c) > chunk_steps_ ? end_of(c) - chunk_steps_ : 0; };
    const TeamMember alone{0, 1, nullptr};
    const int64_t round = s.blocks + chunk_steps_;
    for_each((chunks + 1) * round, threads, [&](int64_t task, int member) {
      const int64_t c = task / round, b = task % round;
      if (b < s.blocks) {
        if (c == chunks) return;
        wait_for(done.get() + b, c);
        // Chunks alternate between two buffers.
        if (c >= 2) wait_for(measured.get() + c - 2, chunk_steps_);
        const Work w = work(b);
        if (c == 0) begin(b, w, alone);
        chunk(b, start_of(c), end_of(c), c % kChunksHeld, w, alone);
        if (c == chunks - 1) end(b, w, alone);
        signal(done.get() + b);
      } else if (c > 0) {
        const int64_t i = end_of(c - 1) - 1 - (b - s.blocks);
        if (i < start_of(c - 1)) return;
        for (int64_t each = 0; each < s.blocks; ++each) wait_for(done.get() + each, c);
        measure(i, end_of(c - 1), (c - 1) % kChunksHeld, member);
        signal(measured.get() + c - 1);
      }
    });
  }

  void begin(int64_t number, const Work& w, const TeamMember& me) const {
    const Walk<Real> walk = this->walk(number);
    if (me.leads()) {
      // The padding and the accumulators.
      zero(w.carried, w.padded_size);
      for (int64_t r = 0; r < walk.rows; ++r) {
        if (g.dhn != nullptr) copy(w.carried + r * s.dh_stride, g.dhn + (walk.first + r) * l.R, l.R);
        if (CellType::kHasC && g.dcn != nullptr) copy(w.dc + r * s.Hp, g.dcn + (walk.first + r) * l.H, l.H);
      }
    }
    me.sync();
  }

  void end(int64_t number, const Work& w, const TeamMember& me) const {
    const Walk<Real> walk = this->walk(number);
    if (!me.leads()) return;
    for (int64_t r = 0; r < walk.rows; ++r) {
      copy(g.dh0 + (walk.first + r) * l.R, w.carried + r * s.dh_stride, l.R);
      if (CellType::kHasC) copy(g.dc0 + (walk.first + r) * l.H, w.dc + r * s.Hp, l.H);
    }
  }

  // The division of a block's work. A member's hidden units are also its columns of δh, so that a step without a projection needs only
  // one barrier, before the product with W_hh.
  struct Columns {
    Columns(const Sizes<CellType, Real>& s, const TeamMember& me) {
      constexpr int64_t wide = kWide * L;
      const int64_t of_h = round_up(s.Hp, wide) / wide, of_r = s.Rp / wide;
      h0 = me.from(of_h), h1 = me.to(of_h), r0 = me.from(of_r), r1 = me.to(of_r);
      p0 = smaller(h0 * wide / s.kBlock, s.panels), p1 = smaller(h1 * wide / s.kBlock, s.panels);
    }
    int64_t h0, h1, r0, r1;  // wide panels of the hidden units and of h
    int64_t p0, p1;          // panels of the gates
  };

  // Steps [i0, i1) backwards, in the memory `part` of the chunks held.
  void chunk(int64_t number, int64_t i0, int64_t i1, int64_t part, const Work& work, const TeamMember& me) const {
    FlushSubnormals flush;
    const Walk<Real> walk = this->walk(number);
    if (walk.rows <= 0) return;
    const Columns mine(s, me);
    Work w = work.part(part, s);
    int64_t filled = 0;
    for (int64_t i = i1 - 1; i >= i0; --i) {
      const int64_t t = walk.step(i), n = walk.active(t);
      w.dh = work.dh + i % 2 * s.block_rows * s.dh_stride;
      if (norms_ != nullptr) w.total = work.total + i % 2 * s.block_rows * s.Hp;
      step(walk, t, i > 0 ? walk.step(i - 1) : -1, n, filled, w, mine, me);
      if (g.dx != nullptr && me.leads()) zero(g.dx + (t * l.B + walk.first + n) * l.I, (walk.rows - n) * l.I);
      filled += n;
    }
    if (g.probes != nullptr) {
      sketch_.add(number, w.x, w.h_prev, w.da, w.da_hh, filled, w.sketch_room, i1 == l.T, me);
    } else {
      sums_.add(number, mine.p0, mine.p1, w.x, w.h_prev, w.da, w.da_hh, filled, i1 == l.T, one_chunk() ? &g : nullptr);
      if (l.w_hr != nullptr) sums_.add_projection(number, me.from(l.R), me.to(l.R), w.projected_dh, w.m, filled, i1 == l.T);
    }
    if (g.dx != nullptr)
      multiply_rows(w.da, me.from(filled), me.to(filled), w_ih_.get(), s.width, 0, round_up(l.I, kWide * L) / (kWide * L), l.I,
                    [&](int64_t row) { return g.dx + w.places[row] * l.I; });
    me.sync();
    if (norms_ == nullptr || s.blocks > 1) return;
    for (int64_t i = i1 - 1 - me.number; i >= i0; i -= me.of) measure(i, i1, part, me.number);
    me.sync();
  }

  // ‖g_t‖_F of step i of a chunk that ends before i1, kept as `part` of the blocks' work; `member` is the thread.
  void measure(int64_t i, int64_t i1, int64_t part, int64_t member) const {
    FlushSubnormals flush;
    const Walk<Real> all_samples{l, 0, l.B};
    const int64_t t = all_samples.step(i);
    StepRows<Real>* const rows = step_rows_.get() + member * s.blocks;
    int64_t stride = 0;
    for (int64_t number = 0; number < s.blocks; ++number) {
      const Walk<Real> walk = this->walk(number);
      const Work w = work(number).part(part, s);
      int64_t row = 0;
      for (int64_t j = i1 - 1; j > i; --j) row += walk.active(walk.step(j));
      rows[number] = {w.da.at(row, 0), w.da_hh.at(row, 0), w.h_prev.at(row, 0), w.x.at(row, 0), walk.active(t)};
      stride = w.da.rows * L;
    }
    Real* const room = room_size_ > 0 ? room_.get() + member * room_size_ : nullptr;
    Measure<CellType, Real>{l, s, *norms_}.step(t, all_samples.active(t), rows, s.blocks, stride, room);
  }

  // Step t of n active samples, whose rows in the chunk begin at `filled`; `next` is the step computed after it, −1 for none.
  void step(const Walk<Real>& walk, int64_t t, int64_t next, int64_t n, int64_t filled, const Work& w, const Columns& mine,
            const TeamMember& me) const {
    const int64_t D = s.dh_stride, wide = kWide * L, c0 = mine.r0 * wide, c1 = smaller(mine.r1 * wide, l.R);
    const int64_t x0 = me.from(s.Iv / L) * L, x1 = smaller(me.to(s.Iv / L) * L, l.I);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = t * l.B + walk.first + r;
      Real* dh = w.dh + r * D;
      for (int64_t k = c0; k < c1; k += L) {
        Vec<Real> error = load(w.carried + r * D + k);
        if (g.dy != nullptr) error += load(g.dy + at * l.R + k, c1 - k);
        store(dh + k, error);
      }
      if (g.delta_h != nullptr) copy(g.delta_h + at * l.R + c0, dh + c0, c1 - c0);
      w.h_prev.put(filled + r, walk.h_before(t, r), c0, c1);
      w.x.put(filled + r, l.x + at * l.I, x0, x1);
      if (l.w_hr != nullptr)
        for (int64_t k = c0; k < c1; k += L) store(w.projected_dh.at(filled + r, k), load(dh + k));
      if (me.leads()) w.places[filled + r] = at;
    }
    const Real* dm = w.dh;
    if (l.w_hr != nullptr) {
      me.sync();
      multiply_rows(Rows<Real>{w.dh, D}, 0, n, w_hr_.get(), l.R, mine.h0, mine.h1, D, [&](int64_t r) { return w.dm + r * D; });
      dm = w.dm;
    }
    for (int64_t r = 0; r < n; ++r) pointwise(walk, t, r, filled + r, w, dm + r * D, mine);
    me.sync();
    if (norms_ != nullptr)
      for (int64_t r = me.from(n); r < me.to(n); ++r) Measure<CellType, Real>{l, s, *norms_}.sample(r, filled + r, w);
    if (g.cut == nullptr || !g.cut[t]) {
      Prefetch prefetch;
      if (next >= 0 && me.of == 1) plan_prefetch(walk, next, n, prefetch);
      hand_back(n, filled, w, mine, prefetch);
    } else if (!CellType::kSplit) {
      // Then the gradient reaches h_{t−1} only through the carry, left in `carried` by `pointwise`; these cells have no carry.
      for (int64_t r = 0; r < n; ++r) zero(w.carried + r * D + c0, mine.r1 * wide - c0);
    }
    if (g.clip <= 0) return;
    me.sync();
    // All members compute the same norms before any of them scales.
    Real scale_h[kMostRows], scale_c[kMostRows];
    for (int64_t r = 0; r < n; ++r) {
      scale_h[r] = within(g.clip, w.carried + r * D, l.R);
      scale_c[r] = CellType::kHasC ? within(g.clip, w.dc + r * s.Hp, l.H) : Real(1);
    }
    me.sync();
    for (int64_t r = 0; r < n; ++r) {
      scale(w.carried + r * D, c0, c1, scale_h[r]);
      if (CellType::kHasC) scale(w.dc + r * s.Hp, mine.p0 * s.kBlock, smaller(mine.p1 * s.kBlock, l.H), scale_c[r]);
    }
  }

  // δa of one sample and step; leaves in `carried` the gradient that reaches h_{t−1} other than through W_hh.
  void pointwise(const Walk<Real>& walk, int64_t t, int64_t r, int64_t row, const Work& w, const Real* dm, const Columns& mine) const {
    const int64_t b = walk.first + r, at = t * l.B + b;
    Real *dc = w.dc + r * s.Hp, *carried = w.carried + r * s.dh_stride;
    const Real* saved_row = walk.gates(t, s.saved) + r * s.saved;
    const Real* c_row = CellType::kHasC ? walk.cells(t, s.Hp) + r * s.Hp : nullptr;
    const Real* c_before = CellType::kHasC ? walk.c_before(t, r, s.Hp) : nullptr;
    const bool c_whole = CellType::kHasC && !walk.starts(t, r);
    for (int64_t p = mine.p0; p < mine.p1; ++p)
      for (int u = 0; u < CellType::kUnits; ++u) {
        const int64_t unit = (p * CellType::kUnits + u) * L, kept = CellType::kSaved / CellType::kUnits;
        Vec<Real> saved[4] = {}, gates[4], gates_hh[4], c{}, c_prev{}, h{}, later{}, total{}, rest{};
        for (int v = 0; v < kept; ++v) saved[v] = load(saved_row + (p * CellType::kSaved + u * kept + v) * L);
        if (CellType::kHasC) {
          c = load(c_row + unit);
          c_prev = c_whole ? load(c_before + unit) : unit < l.H ? load(c_before + unit, l.H - unit) : c_prev;
          later = load(dc + unit);
        }
        if (CellType::kSplit) h = load(w.h_prev.at(row, unit));
        CellType::template backward<Real>(load(dm + unit), later, total, saved, c, c_prev, h, gates, gates_hh, rest);
        // After an infinite input the padding is NaN, 0 · ∞, which the product with W_hh would hand to all units.
        const auto units = [&](Vec<Real> v) { return first_lanes<Real>(v, l.H - unit); };
        if (CellType::kHasC) store(dc + unit, units(later));
        if (CellType::kSplit) store(carried + unit, units(rest));
        if constexpr (CellType::kHasC)
          if (w.m.data != nullptr) store(w.m.at(row, unit), CellType::template output<Real>(saved, c));
        for (int v = 0; v < CellType::kGates; ++v) {
          const int64_t k = (p * A + (CellType::kUnits == 1 ? v : u)) * L;
          store(w.da.at(row, k), units(gates[v]));
          if (CellType::kSplit) store(w.da_hh.at(row, k), units(gates_hh[v]));
        }
        if (CellType::kHasC && w.total != nullptr) store(w.total + r * s.Hp + unit, units(total));
        if (unit < l.H) {
          if (CellType::kHasC && g.delta_c != nullptr) store(g.delta_c + at * l.H + unit, total, l.H - unit);
          for (int v = 0; v < CellType::kGates; ++v) {
            const int64_t k = (at * CellType::kGates + v) * l.H + unit;
            if (g.delta_a != nullptr) store(g.delta_a + k, gates[v], l.H - unit);
            if (CellType::kSplit && g.delta_a_hh != nullptr) store(g.delta_a_hh + k, gates_hh[v], l.H - unit);
          }
        }
      }
  }

  // Prefetches the inputs of step t during a product of n rows; the step after t has already read the states at t.
  void plan_prefetch(const Walk<Real>& walk, int64_t t, int64_t n, Prefetch& prefetch) const {
    const int64_t at = t * l.B + walk.first, before = walk.before(t), rows = walk.rows;
    prefetch.add(g.dy == nullptr ? nullptr : g.dy + at * l.R, rows, l.R);
    prefetch.add(l.x + at * l.I, rows, l.I);
    if (l.gates != l.y) prefetch.add(walk.gates(t, s.saved), rows, s.saved);
    if (before >= 0 && before < l.T) {
      prefetch.add(l.y + (before * l.B + walk.first) * l.R, rows, l.R);
      if (CellType::kHasC) prefetch.add(walk.cells(before, s.Hp), rows, s.Hp);
    }
    prefetch.spread(s.Rp / (kWide * L) * prefetch_calls<kWide>(n, s.width));
  }

  // carried (+)= δa_hh W_hh. Not inlined: within a step GCC has no registers left for the accumulators.
  __attribute__((noinline)) void hand_back(int64_t n, int64_t filled, const Work& w, const Columns& mine, Prefetch& prefetch) const {
    constexpr int64_t wide = kWide * L;
    for (int64_t q = mine.r0; q < mine.r1; ++q) {
      const auto to = [&](int64_t row, int v) { return w.carried + (row - filled) * s.dh_stride + q * wide + v * L; };
      product<kWide>(
          w.da_hh, filled, filled + n, w_hh_.get() + q * s.width * wide, s.width,
          [&](int64_t r0, auto& acc) {
            for (auto& row : acc) {
              for (int v = 0; v < kWide; ++v) row[v] = CellType::kSplit ? load(to(r0, v)) : Vec<Real>{};
              ++r0;
            }
          },
          [&](int64_t r0, auto& acc) {
            for (auto& row : acc) {
              for (int v = 0; v < kWide; ++v) store(to(r0, v), row[v]);
              ++r0;
            }
          },
          [&] { prefetch.advance<0>(); });
    }
  }

  const Layer<Real>& l;
  const Gradients<Real>& g;
  const Norms* norms_;
  const Sizes<CellType, Real> s;
  const int64_t chunk_steps_, slots_, room_size_;
  Scratch<Real> w_hh_, w_ih_, w_hr_;
  const GradientSums<CellType, Real> sums_;
  const Sketch<CellType, Real> sketch_;
  Scratch<Real> memory_;
  Scratch<int64_t> places_;
  const Scratch<StepRows<Real>> step_rows_;  // of each thread
  const Scratch<Real> room_;  // of each thread, to measure a step in
};

}  // namespace
}  // namespace unvanish::UV_ISA
