// A cell given by elementwise programs instead of its own kernels: the programs, and a layer of such a cell.
//
// A program reads tiles, one value per unit and sample of one step, and writes tiles; every instruction acts on each element separately.
// Registers are numbered inputs first, then outputs, constants, temporaries.
#pragma once

#include <cstdint>

#include "layer.h"

namespace unvanish {

// Masks are 1 and 0. fma: a b + c. dsigmoid and dtanh: a times the slope at the function's value b. where: a ≠ 0 ? b : c.
#define UV_OPS(X)                                                                                                       \
  X(copy) X(add) X(sub) X(mul) X(div) X(fma) X(neg) X(abs) X(sign) X(sqrt) X(exp) X(expm1) X(log) X(log1p) X(sigmoid)   \
  X(tanh) X(dsigmoid) X(dtanh) X(relu) X(sin) X(cos) X(tan) X(atan) X(erf) X(pow) X(floor) X(ceil) X(round) X(trunc)    \
  X(maximum) X(minimum) X(lt) X(le) X(eq) X(ne) X(where)

enum class Op : int32_t {
#define UV_NAME(name) name##_,
  UV_OPS(UV_NAME)
#undef UV_NAME
};

struct Instruction {
  Op op;
  int32_t to, a, b, c;  // registers; b and c repeat a where an operation takes fewer
};

// The meaning of an input or output. share: a pre-activation or a part of it, see Share. after: the states of this step, before: those
// of the step before. kept: values that the forward pass keeps for the backward. arrived: the gradient at a state from outside and from
// later steps; total: including the paths through other states of the same step. dq, dp: by gate; ds: the gradient that reaches a state
// at t − 1 without passing the matrices.
enum class Kind : int32_t { share, before, after, vector, kept, arrived, dq, dp, ds, dv, total };

struct Place {
  Kind kind;
  int32_t index;
};

struct Program {
  const Instruction* code;
  const Place* inputs;
  const Place* outputs;
  const double* constants;
  int64_t length, n_inputs, n_outputs, n_constants, n_temporaries;
};

constexpr int kMostGates = 64;  // also states, and vectors

// W_ih x + b_ih of input gate p plus W_hh s + b_hh of recurrent gate q; −1: that part is absent.
struct Share {
  int32_t p, q;
};

struct StepCell {
  int32_t G, Q, A, V, K;  // input gates, recurrent gates, states, vectors, tiles kept
  int32_t n_shares;
  const Share* shares;
  const int32_t* source;    // [Q] the state that a gate's matrix reads
  const int32_t* late;      // [Q] 1: it reads it at t, not at t − 1
  const int32_t* p_from_q;  // [G] the recurrent gate with the same gradient as this input gate; −1: the program writes dp
  // early: the states that late gates read; late_errors: dq of the late gates. Neither runs where no gate is late.
  Program early, forward, late_errors, backward;
};

// Samples may have any order of lengths, and x is not read where one is inactive. `kept` is stored block after block, each [T, K, its
// samples, padded].
template <class Real>
struct StepLayer : LayerInput<Real> {
  const StepCell& cell;
  const Real* v;               // in [V, H]; null where V = 0
  const Real* const* initial;  // A times in [B, H]
  Real* const* after;          // A times [T, B, H], out of forward, in of backward; null in forward: not wanted
  Real* kept;                  // out of forward, in of backward; null in forward: not wanted, and the program writes none
};

template <class Real>
struct StepGradients : LayerGradients<Real> {
  const Real* const* dfinal;   // A times in [B, H]; null: zero
  Real* dv;                    // out [V, H]; null where V = 0
  Real* const* dinitial;       // A times out [B, H]
  Real* const* dstate;         // A times out [T, B, H] total gradients; null: not wanted, and the program writes none
  Real* dp;                    // out [T, B, G·H]; null: not wanted
  Real* dq;                    // out [T, B, Q·H]; null: not wanted
};

}  // namespace unvanish
