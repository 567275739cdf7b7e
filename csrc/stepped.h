// Shared by both passes of a cell given by programs: the layout of its gates in memory, and the division of work.
//
// The batch is divided into the same blocks as for the other cells, and a block runs the whole sequence on one thread. Within a step every
// value of a block is a tile [samples, Hp]; one product computes all gates that read the same operands.
#pragma once

#include <cstdint>

#include "pool.h"
#include "program.h"
#include "sequence.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

struct StepSizes {
  int64_t Hp, wide, block_rows, blocks, tile;

  template <class Real>
  static StepSizes of(const StepLayer<Real>& l) {
    StepSizes s{};
    s.Hp = round_up(l.H, kLanes<Real>);
    s.wide = kWide * kLanes<Real>;
    s.block_rows = unvanish::block_rows(l.B);
    s.blocks = l.B < 1 ? 1 : (l.B + s.block_rows - 1) / s.block_rows;
    s.tile = s.block_rows * s.Hp;
    return s;
  }
};

// Consecutive gates, or shares of the forward pass, with the same operands.
struct Group {
  int32_t first, count;
  int32_t source;  // the state read; −1: none
  bool late, x;    // whether it is read at t; whether the input is read too
};

struct Groups {
  Group all[kMostGates];
  int count = 0;

  void add(int32_t number, int32_t source, bool late, bool x) {
    Group* last = count == 0 ? nullptr : all + count - 1;
    if (last != nullptr && last->source == source && last->late == late && last->x == x)
      ++last->count;
    else
      all[count++] = {number, 1, source, late, x};
  }
  // f(number, group)
  template <class F>
  void each(F f) const {
    for (int i = 0; i < count; ++i) f(i, all[i]);
  }
};

// The samples of a block in the order of the steps.
template <class Real>
struct StepWalk {
  const StepLayer<Real>& l;
  int64_t first, rows;

  int64_t step(int64_t i) const { return l.reverse ? l.T - 1 - i : i; }
  bool active(int64_t t, int64_t r) const { return l.lengths == nullptr || l.lengths[first + r] > t; }
  // Rows up to the last active one.
  int64_t worked(int64_t t) const {
    int64_t n = rows;
    while (n > 0 && !active(t, n - 1)) --n;
    return n;
  }
  // State a of sample r before step t.
  const Real* before(int a, int64_t t, int64_t r) const {
    const int64_t length = l.lengths == nullptr ? l.T : l.lengths[first + r];
    const bool starts = l.reverse ? t + 1 >= length : t == 0;
    return starts ? l.initial[a] + (first + r) * l.H : l.after[a] + ((l.reverse ? t + 1 : t - 1) * l.B + first + r) * l.H;
  }
  Real* kept(int64_t t, int64_t Hp) const { return l.kept + (first * l.T + t * rows) * l.cell.K * Hp; }
};

// Rows [0, n) of a tile from or to rows of H numbers, `stride` apart.
template <class Real>
void put_rows(Real* to, int64_t stride, const Real* tile, int64_t Hp, int64_t n, int64_t H) {
  for (int64_t r = 0; r < n; ++r) copy(to + r * stride, tile + r * Hp, H);
}

// Each vector of the layer in every row of a tile of its own.
template <class Real>
void spread_vectors(const StepLayer<Real>& l, const StepSizes& s, Real* tiles) {
  for (int64_t k = 0; k < l.cell.V; ++k)
    for (int64_t r = 0; r < s.block_rows; ++r) copy(tiles + k * s.tile + r * s.Hp, l.v + k * l.H, l.H);
}

// A block's working memory, zeroed at first: only programs ever write the padding of the tiles.
template <class Real>
struct TileCarve : Arena<Real> {
  Real* tiles(int64_t count, const StepSizes& s) { return this->take(count * s.tile); }
};

}  // namespace
}  // namespace unvanish::UV_ISA
