// The backward pass of a cell given by programs: gradients from the last step read to the first, and those of the weights.
//
// The gradients at the gates of a chunk of steps stay in the cache until the chunk's part of the weights' gradients is added.
#pragma once

#include <cstdint>

#include "interpreter.h"
#include "norms.h"
#include "pool.h"
#include "product.h"
#include "program.h"
#include "sequence.h"
#include "stepped.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

template <class Real>
class StepBackward {
 public:
  static constexpr int L = kLanes<Real>;

  StepBackward(const StepLayer<Real>& layer, const StepGradients<Real>& gradients, int threads)
      : l(layer), c(layer.cell), g(gradients), s(StepSizes::of(layer)), slots_(smaller(s.blocks, threads)), groups_(grouped(layer.cell)),
        Iv_(round_up(l.I, L)), chunk_(smaller((kBackwardRows + s.block_rows - 1) / s.block_rows, l.T)),
        shared_(p_is_q()), w_hh_(packed_size()), w_ih_(g.dx == nullptr ? 1 : width(c.G) * round_up(l.I, s.wide)),
        partial_(s.blocks * per_block()), dv_(s.blocks * c.V * l.H + 1), memory_(slots_ * Work(*this, nullptr).size) {
    groups_.each([&](int i, const Group& group) { pack(group, w_hh_.get() + offset_[i]); });
    if (g.dx != nullptr) pack_input();
  }

  void run(int threads) const {
    for_blocks(s.blocks, threads, 1, [&](int64_t number, int slot, TeamMember) {
      const int64_t first = number * s.block_rows, rows = smaller(s.block_rows, l.B - first);
      if (rows > 0) block(number, StepWalk<Real>{l, first, rows}, Work(*this, memory_.get() + slot * Work(*this, nullptr).size));
    });
    gather();
  }

 private:
  static constexpr int64_t kSpare = 4;        // rows: vectors 4096 bytes apart would map to the same cache set
  static constexpr int64_t kStepsSummed = 64;  // steps whose dv are added in Real; these sums are added in double

  struct Work : TileCarve<Real> {
    Work(const StepBackward& run, Real* memory) : TileCarve<Real>{memory} {
      const StepCell& c = run.c;
      const int64_t most = run.chunk_ * run.s.block_rows + kSpare;
      carried = this->tiles(c.A, run.s);
      arrived = this->tiles(c.A, run.s);
      ds = this->tiles(c.A, run.s);
      before = this->tiles(c.A, run.s);
      after = this->tiles(c.A, run.s);
      total = this->tiles(c.A, run.s);
      vectors = this->tiles(c.V, run.s);
      dv = this->tiles(c.V, run.s);
      dv_sum = this->tiles(c.V, run.s);
      dq = this->tiles(c.Q, run.s);
      dp = this->tiles(c.G, run.s);
      late = this->take(Interpreter<Real>::memory(c.late_errors));
      step = this->take(Interpreter<Real>::memory(c.backward));
      x = {this->take(most * run.Iv_), most};
      run.groups_.each([&](int i, const Group& group) {
        states[i] = {this->take(most * run.s.Hp), most};
        errors[i] = {this->take(most * run.width(group.count)), most};
      });
      input_errors = run.shared_ ? errors[0] : Blocked<Real>{this->take(most * run.width(c.G)), most};
      used = this->size;
      this->take(kThreadPadding / static_cast<int64_t>(sizeof(Real)));
    }

    Real *carried, *arrived;        // [A, tile] gradients from later steps; the same with those of step t added
    Real *ds;                       // [A, tile] gradients passed to t − 1 without the matrices, then all of them
    Real *before, *after, *total;   // [A, tile]
    Real *vectors, *dv, *dv_sum;    // [V, tile]
    Real *dq, *dp;                  // [Q, tile], [G, tile]
    Real *late, *step;              // the interpreters' working memory
    Blocked<Real> x;                // [chunk rows, Iv]
    Blocked<Real> states[kMostGates], errors[kMostGates];  // per group [chunk rows, Hp], [chunk rows, width]
    Blocked<Real> input_errors;     // [chunk rows, width]
    int64_t used;
  };

  static Groups grouped(const StepCell& c) {
    Groups found;
    for (int32_t q = 0; q < c.Q; ++q) found.add(q, c.source[q], c.late[q] != 0, false);
    return found;
  }

  // Whether the gradients at the input's shares are those of the only group, gate by gate.
  bool p_is_q() const {
    bool same = groups_.count == 1 && c.G == c.Q;
    for (int32_t p = 0; p < c.G; ++p) same = same && c.p_from_q[p] == p;
    return same;
  }

  int64_t width(int64_t gates) const { return round_up(gates * s.Hp, s.wide); }

  // Offsets within the sums of a block.
  struct Sums {
    int64_t w_ih, b_ih, w_hh[kMostGates], b_hh[kMostGates], size;
  };
  Sums sums() const {
    Sums at{};
    at.b_ih = l.I * width(c.G);
    at.size = at.b_ih + width(c.G);
    groups_.each([&](int i, const Group& group) {
      at.w_hh[i] = at.size;
      at.b_hh[i] = at.size + l.H * width(group.count);
      at.size = at.b_hh[i] + width(group.count);
    });
    return at;
  }
  int64_t per_block() const { return sums().size; }

  int64_t packed_size() {
    int64_t size = 0;
    groups_.each([&](int i, const Group& group) {
      offset_[i] = size;
      size += round_up(l.H, s.wide) * group.count * l.H;
    });
    return size + 1;
  }

  // The group's rows of W_hh as panels of columns, [q][count · H, wide].
  void pack(const Group& group, Real* out) const {
    pack_plain(l.w_hh + group.first * l.H * l.H, group.count * l.H, l.H, false, out);
  }

  // W_ih likewise, [q][width, wide]: its rows have the order of the gradients at the gates.
  void pack_input() const {
    const int64_t K = width(c.G);
    for (int64_t n = 0; n < round_up(l.I, s.wide); n += s.wide)
      for (int64_t k = 0; k < K; ++k) {
        Real* to = w_ih_.get() + (n / s.wide * K + k) * s.wide;
        const int64_t gate = k / s.Hp, unit = k % s.Hp, have = gate < c.G && unit < l.H ? smaller(s.wide, l.I - n) : 0;
        if (have > 0) copy(to, l.w_ih + (gate * l.H + unit) * l.I + n, have);
        zero(to + have, s.wide - have);
      }
  }

  void block(int64_t number, const StepWalk<Real>& walk, Work w) const {
    FlushSubnormals flush;
    zero(w.carried, w.used);
    zero(partial_.get() + number * per_block(), per_block());
    double* dv = dv_.get() + number * c.V * l.H;
    for (int64_t k = 0; k < c.V * l.H; ++k) dv[k] = 0;
    spread_vectors(l, s, w.vectors);
    const Interpreter<Real> late(c.late_errors, w.late), step(c.backward, w.step);
    for (int a = 0; a < c.A; ++a)
      if (g.dfinal[a] != nullptr)
        for (int64_t r = 0; r < walk.rows; ++r) copy(w.carried + a * s.tile + r * s.Hp, g.dfinal[a] + (walk.first + r) * l.H, l.H);
    int64_t filled = 0, summed = 0, end = l.T;
    for (int64_t i = l.T - 1; i >= 0; --i) {
      const int64_t t = walk.step(i), n = walk.worked(t);
      if (n > 0) {
        back(walk, t, n, filled, w, late, step);
        filled += n;
        if (++summed % kStepsSummed == 0) fold(w, walk.rows, dv);
      }
      report(walk, t, n, w);
      if (end - i == chunk_ || i == 0) {
        add_chunk(number, walk, i, end, filled, w);
        filled = 0;
        end = i;
      }
    }
    fold(w, walk.rows, dv);
    for (int a = 0; a < c.A; ++a) put_rows(g.dinitial[a] + walk.first * l.H, l.H, w.carried + a * s.tile, s.Hp, walk.rows, l.H);
  }

  Real* find(const StepWalk<Real>& walk, const Work& w, int64_t t, Place at) const {
    switch (at.kind) {
      case Kind::before: return w.before + at.index * s.tile;
      case Kind::after: return w.after + at.index * s.tile;
      case Kind::vector: return w.vectors + at.index * s.tile;
      case Kind::kept: return walk.kept(t, s.Hp) + at.index * walk.rows * s.Hp;
      case Kind::arrived: return w.arrived + at.index * s.tile;
      case Kind::dq: return w.dq + at.index * s.tile;
      case Kind::dp: return w.dp + at.index * s.tile;
      case Kind::ds: return w.ds + at.index * s.tile;
      case Kind::dv: return w.dv + at.index * s.tile;
      case Kind::total: return w.total + at.index * s.tile;
      default: return nullptr;
    }
  }

  // One step back for the first n rows of the block; the operands of the weights' gradients are stored in rows from `filled` on.
  void back(const StepWalk<Real>& walk, int64_t t, int64_t n, int64_t filled, const Work& w, const Interpreter<Real>& late,
            const Interpreter<Real>& step) const {
    for (int a = 0; a < c.A; ++a)
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = a * s.tile + r * s.Hp, at = t * l.B + walk.first + r;
        copy(w.after + row, l.after[a] + at * l.H, l.H);
        copy(w.before + row, walk.before(a, t, r), l.H);
        if (!walk.active(t, r)) {
          zero(w.arrived + row, s.Hp);
          continue;
        }
        copy(w.arrived + row, w.carried + row, s.Hp);
        if (a == 0 && g.dy != nullptr)
          for (int64_t k = 0; k < l.H; ++k) w.arrived[row + k] += g.dy[at * l.H + k];
      }
    const auto tile = [&](Place at) { return find(walk, w, t, at); };
    if (c.late_errors.length > 0) {
      late.run(n * s.Hp, tile);
      groups_.each([&](int i, const Group& group) {
        if (!group.late) return;
        quieten(walk, t, n, w.dq + group.first * s.tile, group.count);
        hand_back(i, group, n, w, w.arrived + group.source * s.tile);
      });
    }
    step.run(n * s.Hp, tile);
    quieten(walk, t, n, w.dq, c.Q);
    quieten(walk, t, n, w.dp, c.G);
    groups_.each([&](int i, const Group& group) {
      if (!group.late && (g.cut == nullptr || !g.cut[t])) hand_back(i, group, n, w, w.ds + group.source * s.tile);
    });
    for (int a = 0; a < c.A; ++a)
      for (int64_t r = 0; r < n; ++r) {
        if (!walk.active(t, r)) continue;
        Real* ds = w.ds + a * s.tile + r * s.Hp;
        if (g.clip > 0) scale(ds, 0, l.H, within(g.clip, ds, l.H));
        copy(w.carried + a * s.tile + r * s.Hp, ds, s.Hp);
      }
    for (int64_t r = 0; r < n; ++r)
      if (walk.active(t, r))
        for (int64_t k = 0; k < c.V; ++k)
          for (int64_t u = r * s.Hp; u < (r + 1) * s.Hp; ++u) w.dv_sum[k * s.tile + u] += w.dv[k * s.tile + u];
    collect(walk, t, n, filled, w);
  }

  // Where a sample does not have this step its gradients are set to 0, whatever the program computed from the memory there.
  void quieten(const StepWalk<Real>& walk, int64_t t, int64_t n, Real* tiles, int64_t count) const {
    if (l.lengths == nullptr) return;
    for (int64_t r = 0; r < n; ++r)
      if (!walk.active(t, r))
        for (int64_t k = 0; k < count; ++k) zero(tiles + k * s.tile + r * s.Hp, s.Hp);
  }

  // The tiles of a group's gradients as the rows of one matrix.
  struct Tiles {
    const Real* data;
    int64_t tile, Hp, H, count;

    template <int M, int NV>
    UV_INLINE void multiply(Vec<Real> (&acc)[M][NV], int64_t first, const Real* panel) const {
      for (int64_t k = 0; k < count; ++k)
        Rows<Real>{data + k * tile, Hp}.template multiply<M, NV>(acc, first, H, panel + k * H * NV * L, NoPrefetch());
    }
  };

  // to += Σ_γ δq^γ W_γ
  __attribute__((noinline)) void hand_back(int number, const Group& group, int64_t n, const Work& w, Real* to) const {
    const Tiles errors{w.dq + group.first * s.tile, s.tile, s.Hp, l.H, group.count};
    for (int64_t column = 0; column < s.Hp; column += s.wide) {
      const Real* panel = w_hh_.get() + offset_[number] + column * group.count * l.H;
      for_tiles<kTile<kWide>>(0, n, [&](auto tile, int64_t r0) {
        constexpr int M = decltype(tile)::value;
        Vec<Real> acc[M][kWide] = {};
        errors.template multiply<M, kWide>(acc, r0, panel);
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < kWide; ++v)
            if (column + v * L < s.Hp) {
              Real* at = to + (r0 + r) * s.Hp + column + v * L;
              store(at, load(at) + acc[r][v]);
            }
      });
    }
  }

  void collect(const StepWalk<Real>& walk, int64_t t, int64_t n, int64_t filled, const Work& w) const {
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = filled + r;
      const bool active = walk.active(t, r);
      if (active)
        w.x.put(row, l.x + (t * l.B + walk.first + r) * l.I, 0, l.I);
      else
        for (int64_t k = 0; k < Iv_; k += L) store(w.x.at(row, k), Vec<Real>{});
      groups_.each([&](int i, const Group& group) {
        const Real* state = (group.late ? w.after : w.before) + group.source * s.tile + r * s.Hp;
        for (int64_t k = 0; k < s.Hp; k += L) store(w.states[i].at(row, k), active ? load(state + k) : Vec<Real>{});
        for (int64_t j = 0; j < group.count; ++j) put_tile_row(w.errors[i], row, j, w.dq + (group.first + j) * s.tile + r * s.Hp);
      });
      if (shared_) continue;
      for (int32_t p = 0; p < c.G; ++p) {
        const int32_t q = c.p_from_q[p];
        put_tile_row(w.input_errors, row, p, (q < 0 ? w.dp + p * s.tile : w.dq + q * s.tile) + r * s.Hp);
      }
    }
  }

  // A program may compute NaN in the padding, which a product with zeros would propagate.
  UV_INLINE void put_tile_row(const Blocked<Real>& to, int64_t row, int64_t gate, const Real* from) const {
    for (int64_t k = 0; k < s.Hp; k += L) store(to.at(row, gate * s.Hp + k), first_lanes<Real>(load(from + k), l.H - k));
  }

  void fold(const Work& w, int64_t rows, double* dv) const {
    for (int64_t k = 0; k < c.V; ++k)
      for (int64_t u = 0; u < l.H; ++u)
        for (int64_t r = 0; r < rows; ++r) dv[k * l.H + u] += static_cast<double>(w.dv_sum[k * s.tile + r * s.Hp + u]);
    zero(w.dv_sum, c.V * s.tile);
  }

  // Writes the gradients of step t, of which n rows have been computed, where they are wanted.
  void report(const StepWalk<Real>& walk, int64_t t, int64_t n, const Work& w) const {
    const int64_t at = t * l.B + walk.first;
    for (int64_t r = 0; r < walk.rows; ++r) {
      const bool active = r < n && walk.active(t, r);
      const auto put = [&](Real* to, const Real* tile) {
        if (active)
          copy(to, tile + r * s.Hp, l.H);
        else
          zero(to, l.H);
      };
      for (int32_t q = 0; g.dq != nullptr && q < c.Q; ++q) put(g.dq + ((at + r) * c.Q + q) * l.H, w.dq + q * s.tile);
      for (int32_t p = 0; g.dp != nullptr && p < c.G; ++p) {
        const int32_t q = c.p_from_q[p];
        put(g.dp + ((at + r) * c.G + p) * l.H, q < 0 ? w.dp + p * s.tile : w.dq + q * s.tile);
      }
      for (int a = 0; a < c.A; ++a)
        if (g.dstate[a] != nullptr) put(g.dstate[a] + (at + r) * l.H, w.total + a * s.tile);
    }
  }

  // Adds the contribution of steps [first, end), in reading order, to the sums of the block, and writes their dx.
  void add_chunk(int64_t number, const StepWalk<Real>& walk, int64_t first, int64_t end, int64_t filled, const Work& w) const {
    const Sums at = sums();
    Real* out = partial_.get() + number * at.size;
    if (filled > 0) {
      add_outer<kWide>(w.x, 0, l.I, w.input_errors, 0, width(c.G) / s.wide, filled, out + at.w_ih, width(c.G));
      add_rows(w.input_errors, 0, width(c.G), filled, out + at.b_ih);
      groups_.each([&](int i, const Group& group) {
        const int64_t across = width(group.count);
        add_outer<kWide>(w.states[i], 0, l.H, w.errors[i], 0, across / s.wide, filled, out + at.w_hh[i], across);
        add_rows(w.errors[i], 0, across, filled, out + at.b_hh[i]);
      });
    }
    if (g.dx == nullptr) return;
    int64_t row = 0;
    for (int64_t i = end - 1; i >= first; --i) {
      const int64_t t = walk.step(i), n = walk.worked(t);
      Real* dx = g.dx + (t * l.B + walk.first) * l.I;
      if (n > 0)
        multiply_rows(w.input_errors, row, row + n, w_ih_.get(), width(c.G), 0, round_up(l.I, s.wide) / s.wide, l.I,
                      [&](int64_t r) { return dx + (r - row) * l.I; });
      zero(dx + n * l.I, (walk.rows - n) * l.I);
      row += n;
    }
  }

  // The blocks' sums, added in order, in torch's layout.
  void gather() const {
    const Sums at = sums();
    const auto put = [&](int64_t from, int64_t across, int64_t gates, int64_t columns, Real* out) {
      if (out == nullptr) return;
      for (int64_t row = 0; row < gates * l.H; ++row)
        for (int64_t k = 0; k < columns; ++k) out[row * columns + k] = 0;
      for (int64_t b = 0; b < s.blocks; ++b)
        for (int64_t gate = 0; gate < gates; ++gate)
          for (int64_t u0 = 0; u0 < l.H; u0 += L)
            for (int64_t k = 0; k < columns; ++k) {
              const Real* sum = partial_.get() + b * at.size + from + k * across + gate * s.Hp + u0;
              for (int64_t u = 0; u < smaller(L, l.H - u0); ++u) out[(gate * l.H + u0 + u) * columns + k] += sum[u];
            }
    };
    put(at.w_ih, width(c.G), c.G, l.I, g.dw_ih);
    put(at.b_ih, width(c.G), c.G, 1, g.db_ih);
    groups_.each([&](int i, const Group& group) {
      const int64_t first = group.first * l.H;
      put(at.w_hh[i], width(group.count), group.count, l.H, g.dw_hh + first * l.H);
      put(at.b_hh[i], width(group.count), group.count, 1, g.db_hh == nullptr ? nullptr : g.db_hh + first);
    });
    for (int64_t k = 0; k < c.V * l.H; ++k) {
      double total = 0;
      for (int64_t b = 0; b < s.blocks; ++b) total += dv_.get()[b * c.V * l.H + k];
      g.dv[k] = static_cast<Real>(total);
    }
  }

  const StepLayer<Real>& l;
  const StepCell& c;
  const StepGradients<Real>& g;
  const StepSizes s;
  const int64_t slots_;
  const Groups groups_;
  const int64_t Iv_, chunk_;
  const bool shared_;
  int64_t offset_[kMostGates];
  Scratch<Real> w_hh_, w_ih_, partial_;
  Scratch<double> dv_;
  Scratch<Real> memory_;
};

}  // namespace
}  // namespace unvanish::UV_ISA
