// The interface between the kernels and their callers: one recurrent layer and direction over one sequence.
//
// All arrays are dense, row-major and time-major; "in" is read only, "out" is written entirely. Every pointer is borrowed for the
// duration of the call. T steps, B samples, I inputs, H hidden units, R = P with a projection, else H; G gates (RNN 1, GRU 3, LSTM 4).
// Weights are in torch's layout: gates stacked along the first axis, LSTM i, f, g, o; GRU r, z, n.
//
// A sample b is active at t < lengths[b]. Elsewhere its state does not change, y is 0, gradients are 0, and no work is spent.
//
// Results do not depend on the number of threads, bit for bit, and a sample's outputs, states and input gradients do not depend on
// the samples beside it: the order in which every sum is taken is fixed by the shapes alone.
#pragma once

#include <cstdint>

#include "layer.h"
#include "program.h"

namespace unvanish {

enum class Cell : int { rnn_tanh, rnn_relu, rnn_sigmoid, lstm, gru };

// `lengths` are non-increasing.
template <class Real>
struct Layer : LayerInput<Real> {
  Cell cell;
  int64_t R;
  const Real* h0;          // in [B, R]
  const Real* c0;          // in [B, H]; null but for the LSTM
  const Real* w_hr;        // in [P, H]; null: no projection
  Real* y;                 // [T, B, R]: out of forward, in of backward
  Real* y_again;           // [T, B, R]: the same out of forward, for a caller who gives it away; null: not wanted
  // Values kept for the backward pass, stored in blocks of block_rows(B) samples, each [T, its samples, ·], so that no two threads touch the
  // same memory. Where a sample is inactive these two are left unchanged.
  Real* gates;             // [·, T, ·, saved_width()]: out of forward, in of backward; null in forward: keep nothing; may be y, with
                           // y's layout, for a plain RNN whose saved_width() is H
  Real* cells;             // [·, T, ·, padded()] c_t, likewise; null but for the LSTM
};

// Samples that are processed together, from 1 to kMostRows; the last block may have fewer.
constexpr int64_t kMostRows = 16;
int64_t block_rows(int64_t B);

template <class Real>
struct Final {
  Real* h;  // out [B, R]
  Real* c;  // out [B, H]; null but for the LSTM
};

// Statistics of the gates. Where a sample is inactive these are left unchanged.
struct Statistics {
  double closed;      // a unit is saturated where φ'(a) is below this share of its maximum
  double* mean;       // out [T, B, G] each gate's mean value over its units
  double* saturated;  // out [T, B, G] share of the units that are saturated
  double* log_carry;  // out [H] Σ over active steps and samples of ln f_t (LSTM) or ln z_t (GRU); null for a plain RNN
};

// The gradient's norms, accumulated in double. Where a sample is inactive these are left unchanged: pass zeros.
struct Norms {
  double* h;  // out [T, B] ‖δh_t‖₂
  double* c;  // out [T, B] ‖δc_t‖₂; null but for the LSTM
  double* a;  // out [T, B, G] ‖δa_t‖₂ per gate
  double* w;  // out [T] ‖g_t‖_F, g_t = δa_tᵀ [h_{t−1}, x_t] of the batch
};

constexpr int kProbes = 16;  // columns of U

template <class Real>
struct Gradients : LayerGradients<Real> {
  const Real* dhn;  // in [B, R] with respect to the final h; null: zero
  const Real* dcn;  // in [B, H] with respect to the final c; null: zero
  Real* dw_hr;      // out [P, H]; null: no projection
  Real* dh0;        // out [B, R]
  Real* dc0;        // out [B, H]; null but for the LSTM
  // Where a sample is inactive these are left unchanged: pass zeros.
  Real* delta_h;    // out [T, B, R] δh_t; null: not wanted
  Real* delta_c;    // out [T, B, H] δc_t; null: not wanted
  Real* delta_a;    // out [T, B, G·H] δa_t; null: not wanted
  Real* delta_a_hh; // out [T, B, G·H] with respect to W_hh h_{t−1} + b_hh, for the GRU; null: not wanted
  const Real* probes; // in [G·H, kProbes] U; null: the gradients of the weights are wanted whole
  Real* sketch;     // out [I + R, kProbes] Uᵀ ∂E/∂[W_ih, W_hh], transposed, instead of all gradients of weights and biases
};

// Errors propagated back through a layer, each alone: row k of sample b enters at step sources[k], and at that step and every one read before it
//
//     δc += made[t, b] ⊙ δh            δh ← [δh ⊙ scale[t, b], δc] matrix[t, b]            δc ← δc ⊙ carried[t, b]
//
// with the norm taken after the first of these. c, and all that concerns it, is the LSTM's alone. A row is a vector times 2^exponent, so that
// it may vanish or grow beyond the range of Real.
template <class Real>
struct Propagation {
  bool reverse;            // the layer reads from the last step to the first, so that errors travel to the last
  int64_t first, steps;    // t in [first, first + steps)
  int64_t B, K, H;
  int64_t states;          // 1, or 2 with c
  int64_t measured;        // the state whose norms are wanted: 0 for h, 1 for c
  const int64_t* sources;  // in [K], increasing
  const Real* matrices;    // in [steps, B, states·H, H], or [states·H, H] for all
  bool shared;             // the latter
  const Real* scale;       // in [steps, B, H]; null: 1
  const Real* made;        // in [steps, B, H]; null: no c
  const Real* carried;     // in [steps, B, H]; null: no c
  Real* rows;              // in, out [B, K, states·H]: the errors, then what is left of those that have entered
  double* exponents;       // in, out [B, K]
  double* log_norms;       // out [T, B, K] ln‖δ_t‖ at steps that an error has reached; left unchanged elsewhere
};

// The kernels of one instruction set. `lanes` is the number of Reals in a vector; hidden units are padded to whole blocks.
template <class Real>
struct Kernels {
  const char* isa;
  int lanes;
  int64_t (*padded)(Cell, int64_t H);       // H rounded up to whole blocks
  int64_t (*saved_width)(Cell, int64_t H);  // Reals that `gates` holds per step and sample
  // Statistics and norms: null if not wanted.
  void (*forward)(const Layer<Real>&, const Final<Real>&, const Statistics*, int threads);
  void (*backward)(const Layer<Real>&, const Gradients<Real>&, const Norms*, int threads);
  // The same for a cell given by programs; `final` is A times out [B, H].
  void (*step_forward)(const StepLayer<Real>&, Real* const* final, int threads);
  void (*step_backward)(const StepLayer<Real>&, const StepGradients<Real>&, int threads);
  void (*propagate)(const Propagation<Real>&, int threads);
  // Multiplies and adds in registers as fast as the processor can; returns the number of operations. For benchmarks.
  double (*peak)(int64_t rounds);
};

// The kernels for this machine, or those named by `isa` ("baseline", "avx2", "avx512"); null if it can't run them.
template <class Real>
const Kernels<Real>* kernels(const char* isa = nullptr);

}  // namespace unvanish
