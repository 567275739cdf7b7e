// The forward pass of a cell given by programs.
#pragma once

#include <cstdint>

#include "interpreter.h"
#include "pool.h"
#include "product.h"
#include "program.h"
#include "sequence.h"
#include "stepped.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

template <class Real>
class StepForward {
 public:
  static constexpr int L = kLanes<Real>;

  StepForward(const StepLayer<Real>& layer, Real* const* final, int threads)
      : l(layer), c(layer.cell), final_(final), s(StepSizes::of(layer)), slots_(smaller(s.blocks, threads)), groups_(grouped(layer.cell)),
        weights_(packed_size()), bias_(c.n_shares * s.Hp + s.wide), memory_(slots_ * Work(*this, nullptr).size) {
    int64_t at = 0;
    groups_.each([&](int i, const Group& g) {
      offset_[i] = at;
      at += pack(g, weights_.get() + at);
    });
    zero(bias_.get(), c.n_shares * s.Hp + s.wide);
    for (int64_t k = 0; k < c.n_shares * s.Hp; ++k) {
      const int64_t unit = k % s.Hp;
      const Share share = c.shares[k / s.Hp];
      if (unit >= l.H) continue;
      if (share.p >= 0 && l.b_ih != nullptr) bias_.get()[k] += l.b_ih[share.p * l.H + unit];
      if (share.q >= 0 && l.b_hh != nullptr) bias_.get()[k] += l.b_hh[share.q * l.H + unit];
    }
  }

  void run(int threads) const {
    for_blocks(s.blocks, threads, 1, [&](int64_t number, int slot, TeamMember) {
      const int64_t first = number * s.block_rows, rows = smaller(s.block_rows, l.B - first);
      if (rows > 0) block(StepWalk<Real>{l, first, rows}, Work(*this, memory_.get() + slot * Work(*this, nullptr).size));
    });
  }

 private:
  struct Work : TileCarve<Real> {
    Work(const StepForward& run, Real* memory) : TileCarve<Real>{memory} {
      const StepCell& c = run.c;
      now = this->tiles(c.A, run.s);
      next = this->tiles(c.A, run.s);
      shares = this->tiles(c.n_shares, run.s);
      vectors = this->tiles(c.V, run.s);
      early = this->take(Interpreter<Real>::memory(c.early));
      step = this->take(Interpreter<Real>::memory(c.forward));
      used = this->size;
      this->take(kThreadPadding / static_cast<int64_t>(sizeof(Real)));
    }

    Real *now, *next;    // [A, tile] the states at t − 1 and t
    Real *shares;        // [n_shares, tile]
    Real *vectors;       // [V, tile]
    Real *early, *step;  // the interpreters' working memory
    int64_t used;
  };

  static Groups grouped(const StepCell& c) {
    Groups found;
    for (int32_t i = 0; i < c.n_shares; ++i) {
      const Share share = c.shares[i];
      found.add(i, share.q < 0 ? -1 : c.source[share.q], share.q >= 0 && c.late[share.q] != 0, share.p >= 0);
    }
    return found;
  }

  int64_t panels(const Group& g) const { return (g.count * s.Hp + s.wide - 1) / s.wide; }
  int64_t depth(const Group& g) const { return (g.x ? l.I : 0) + (g.source >= 0 ? l.H : 0); }

  int64_t packed_size() const {
    int64_t size = 1;
    groups_.each([&](int, const Group& g) { size += panels(g) * depth(g) * s.wide; });
    return size;
  }

  // A group's weights as panels [q][I + H, wide].
  int64_t pack(const Group& g, Real* out) const {
    const int64_t K = depth(g);
    for (int64_t column = 0; column < panels(g) * s.wide; column += L) {
      Real* to = out + column / s.wide * K * s.wide + column % s.wide;
      const int64_t unit = column % s.Hp, n = column / s.Hp < g.count ? smaller(L, l.H - unit) : 0;
      const Share share = n > 0 ? c.shares[g.first + column / s.Hp] : Share{};
      if (g.x) to = pack_vector(to, l.w_ih + (share.p * l.H + unit) * l.I, l.I, n);
      if (g.source >= 0) pack_vector(to, l.w_hh + (share.q * l.H + unit) * l.H, l.H, n);
    }
    return panels(g) * K * s.wide;
  }

  Real* pack_vector(Real* to, const Real* rows, int64_t K, int64_t n) const {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < n; ++j) to[k * s.wide + j] = rows[j * K + k];
      for (int64_t j = n > 0 ? n : 0; j < L; ++j) to[k * s.wide + j] = 0;
    }
    return to + K * s.wide;
  }

  void block(const StepWalk<Real>& walk, Work w) const {
    FlushSubnormals flush;
    zero(w.now, w.used);
    spread_vectors(l, s, w.vectors);
    const Interpreter<Real> early(c.early, w.early), step(c.forward, w.step);
    for (int a = 0; a < c.A; ++a)
      for (int64_t r = 0; r < walk.rows; ++r) copy(w.now + a * s.tile + r * s.Hp, l.initial[a] + (walk.first + r) * l.H, l.H);
    for (int64_t i = 0; i < l.T; ++i) {
      const int64_t t = walk.step(i), n = walk.worked(t);
      if (n > 0) {
        const auto tile = [&](Place at) { return find(walk, w, t, at); };
        multiply(walk, w, t, n, false);
        if (c.early.length > 0) {
          early.run(n * s.Hp, tile);
          multiply(walk, w, t, n, true);
        }
        step.run(n * s.Hp, tile);
      }
      for (int a = 0; a < c.A; ++a) hand_on(walk, w, t, a);
      Real* before = w.now;
      w.now = w.next;
      w.next = before;
    }
    for (int a = 0; a < c.A; ++a) put_rows(final_[a] + walk.first * l.H, l.H, w.now + a * s.tile, s.Hp, walk.rows, l.H);
  }

  Real* find(const StepWalk<Real>& walk, const Work& w, int64_t t, Place at) const {
    switch (at.kind) {
      case Kind::share: return w.shares + at.index * s.tile;
      case Kind::before: return w.now + at.index * s.tile;
      case Kind::after: return w.next + at.index * s.tile;
      case Kind::vector: return w.vectors + at.index * s.tile;
      case Kind::kept: return walk.kept(t, s.Hp) + at.index * walk.rows * s.Hp;
      default: return nullptr;
    }
  }

  // The shares of the groups that read states at t, or of all others.
  void multiply(const StepWalk<Real>& walk, const Work& w, int64_t t, int64_t n, bool late) const {
    groups_.each([&](int number, const Group& g) {
      if (g.late != late) return;
      const Rows<Real> x{l.x + (t * l.B + walk.first) * l.I, l.I};
      const Rows<Real> state{(late ? w.next : w.now) + (g.source < 0 ? 0 : g.source) * s.tile, s.Hp};
      for (int64_t q = 0; q < panels(g); ++q) {
        const int64_t column = q * s.wide;
        const Real *panel = weights_.get() + offset_[number] + q * depth(g) * s.wide, *bias = bias_.get() + g.first * s.Hp + column;
        // The destination of a panel's vectors: a panel may extend from one gate's tile into the next.
        Real* to[kWide];
        for (int v = 0; v < kWide; ++v) {
          const int64_t at = column + v * L;
          to[v] = at < g.count * s.Hp ? w.shares + (g.first + at / s.Hp) * s.tile + at % s.Hp : nullptr;
        }
        for_tiles<kTile<kWide>>(0, n, [&](auto tile, int64_t r0) {
          constexpr int M = decltype(tile)::value;
          Vec<Real> acc[M][kWide];
          for (auto& row : acc)
            for (int v = 0; v < kWide; ++v) row[v] = load(bias + v * L);
          if (g.x) x.template multiply<M, kWide>(acc, r0, l.I, panel, NoPrefetch());
          if (g.source >= 0) state.template multiply<M, kWide>(acc, r0, l.H, panel + (g.x ? l.I * s.wide : 0), NoPrefetch());
          for (int r = 0; r < M; ++r)
            for (int v = 0; v < kWide; ++v)
              if (to[v] != nullptr) store(to[v] + (r0 + r) * s.Hp, acc[r][v]);
        });
      }
    });
  }

  // Stores state a of step t; a sample that does not have this step keeps the previous one.
  void hand_on(const StepWalk<Real>& walk, const Work& w, int64_t t, int a) const {
    Real* to = l.after[a] == nullptr ? nullptr : l.after[a] + (t * l.B + walk.first) * l.H;
    for (int64_t r = 0; r < walk.rows; ++r) {
      Real* next = w.next + a * s.tile + r * s.Hp;
      const bool active = walk.active(t, r);
      if (!active) copy(next, w.now + a * s.tile + r * s.Hp, s.Hp);
      if (to == nullptr) continue;
      if (active)
        copy(to + r * l.H, next, l.H);
      else
        zero(to + r * l.H, l.H);
    }
  }

  const StepLayer<Real>& l;
  const StepCell& c;
  Real* const* final_;
  const StepSizes s;
  const int64_t slots_;
  const Groups groups_;
  int64_t offset_[kMostGates];
  Scratch<Real> weights_, bias_, memory_;
};

}  // namespace
}  // namespace unvanish::UV_ISA
