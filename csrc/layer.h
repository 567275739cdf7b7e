// The kernels' inputs and outputs for any layer and direction, whether the cell has its own kernels (unvanish.h, whose conventions apply
// here too) or is given by programs (program.h). Q of the G gates have a recurrent matrix.
#pragma once

#include <cstdint>

namespace unvanish {

template <class Real>
struct LayerInput {
  bool reverse;            // read from the last step to the first
  int64_t T, B, I, H;
  const int64_t* lengths;  // in [B], 0 ≤ lengths ≤ T; null: all T
  const Real* x;           // in [T, B, I]
  const Real* w_ih;        // in [G·H, I]
  const Real* w_hh;        // in [Q·H, R]; null where Q = 0
  const Real* b_ih;        // in [G·H]; null: none
  const Real* b_hh;        // in [Q·H]; null: none
};

template <class Real>
struct LayerGradients {
  const Real* dy;  // in [T, B, R] ∂E_t/∂y_t; null: zero
  double clip;     // largest 2-norm per sample of the gradient passed from one step to the one before; 0: unbounded
  const bool* cut; // in [T] steps whose matrices pass no gradient to the step before; null: none
  Real* dx;        // out [T, B, I]; null: not wanted
  Real* dw_ih;     // out [G·H, I]
  Real* dw_hh;     // out [Q·H, R]; null where Q = 0
  Real* db_ih;     // out [G·H]; null: not wanted
  Real* db_hh;     // out [Q·H]; null: not wanted
};

}  // namespace unvanish
