// The differences between the cells: the layout of the gates in memory, and the arithmetic of one vector of hidden units.
//
// Hidden units are grouped in blocks of `lanes`; a block's gates are adjacent, so that a product's accumulators are the gates of the same
// units. A plain RNN has one gate, so four blocks of units are adjacent instead.
#pragma once

#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

template <class Real>
UV_INLINE Vec<Real> square(Vec<Real> v) {
  return v * v;
}

// φ'(a) / max φ' of a gate with value v.
template <class Real>
UV_INLINE Vec<Real> openness_of_sigmoid(Vec<Real> v) {
  return Real(4) * v * (Real(1) - v);
}
template <class Real>
UV_INLINE Vec<Real> openness_of_tanh(Vec<Real> v) {
  return Real(1) - v * v;
}

// kGates: stacked in torch's weights. kAcross: vectors of a panel. kSaved: vectors kept per block for the backward pass.
struct LstmCell {
  enum Gate : int { I, F, G, O };  // the order in torch's weights, and of the vectors in `saved`

  static constexpr int kGates = 4, kAcross = 4, kSaved = 4, kUnits = 1;
  static constexpr bool kHasC = true, kSplit = false;
  static constexpr int kSplitGate = -1;

  template <class Real>
  static UV_INLINE Vec<Real> forward(const Vec<Real>* a, const Vec<Real>*, Vec<Real> c_prev, Vec<Real>* saved,
                                     Vec<Real>& c, Vec<Real>) {
    Vec<Real> x[4] = {-a[I], -a[F], a[G] + a[G], -a[O]}, power[4], q[4];
    exp_parts<Real>(x, power, q);
    saved[I] = sigmoid<Real>(power[I], q[I]);
    saved[F] = sigmoid<Real>(power[F], q[F]);
    saved[G] = tanh<Real>(power[G], q[G]);
    saved[O] = sigmoid<Real>(power[O], q[O]);
    c = saved[F] * c_prev + saved[I] * saved[G];
    return output<Real>(saved, c);
  }

  // h, or the input of the projection that computes h.
  template <class Real>
  static UV_INLINE Vec<Real> output(const Vec<Real>* saved, Vec<Real> c) {
    return saved[O] * tanh<Real>(c);
  }

  // dm = ∂E/∂(o ⊙ tanh c); dc is the gradient from later steps at c_t on entry and the one passed to c_{t−1} on exit; total_c is δc_t.
  template <class Real>
  static UV_INLINE void backward(Vec<Real> dm, Vec<Real>& dc, Vec<Real>& total_c, const Vec<Real>* saved, Vec<Real> c,
                                 Vec<Real> c_prev, Vec<Real>, Vec<Real>* da, Vec<Real>*, Vec<Real>&) {
    Vec<Real> t = tanh<Real>(c), i = saved[I], f = saved[F], g = saved[G], o = saved[O];
    total_c = dm * o * (Real(1) - t * t) + dc;
    da[I] = total_c * g * i * (Real(1) - i);
    da[F] = total_c * c_prev * f * (Real(1) - f);
    da[G] = total_c * i * (Real(1) - g * g);
    da[O] = dm * t * o * (Real(1) - o);
    dc = total_c * f;
  }

  static constexpr int kCarry = F;
  template <class Real>
  static UV_INLINE Vec<Real> openness(int gate, Vec<Real> v) {
    return gate == G ? openness_of_tanh<Real>(v) : openness_of_sigmoid<Real>(v);
  }
};

struct GruCell {
  enum Gate : int { R, Z, N };       // the order in torch's weights, and of the first vectors in `saved`
  static constexpr int Q = 3;       // W_hn h + b_hn, the last vector in `saved`

  static constexpr int kGates = 3, kAcross = 3, kSaved = 4, kUnits = 1;
  static constexpr bool kHasC = false, kSplit = true;
  static constexpr int kSplitGate = N;  // the gate whose two shares differ in the bias

  // a: W_ih x + b_ih, with b_hh added for r and z; q: W_hh h + (0, 0, b_hn).
  template <class Real>
  static UV_INLINE Vec<Real> forward(const Vec<Real>* a, const Vec<Real>* q, Vec<Real>, Vec<Real>* saved, Vec<Real>&,
                                     Vec<Real> h_prev) {
    Vec<Real> x[2] = {-(a[R] + q[R]), -(a[Z] + q[Z])}, power[2], rest[2];
    exp_parts<Real>(x, power, rest);
    saved[R] = sigmoid<Real>(power[R], rest[R]);
    saved[Z] = sigmoid<Real>(power[Z], rest[Z]);
    saved[Q] = q[N];
    saved[N] = tanh<Real>(a[N] + saved[R] * saved[Q]);
    return saved[N] + saved[Z] * (h_prev - saved[N]);
  }

  template <class Real>
  static UV_INLINE void backward(Vec<Real> dh, Vec<Real>&, Vec<Real>&, const Vec<Real>* saved, Vec<Real>, Vec<Real>,
                                 Vec<Real> h_prev, Vec<Real>* da, Vec<Real>* da_hh, Vec<Real>& carried) {
    Vec<Real> r = saved[R], z = saved[Z], n = saved[N];
    da[N] = dh * (Real(1) - z) * (Real(1) - n * n);
    da[Z] = dh * (h_prev - n) * z * (Real(1) - z);
    da[R] = da[N] * saved[Q] * r * (Real(1) - r);
    da_hh[R] = da[R];
    da_hh[Z] = da[Z];
    da_hh[N] = r * da[N];
    carried = z * dh;
  }

  static constexpr int kCarry = Z;
  template <class Real>
  static UV_INLINE Vec<Real> openness(int gate, Vec<Real> v) {
    return gate == N ? openness_of_tanh<Real>(v) : openness_of_sigmoid<Real>(v);
  }
};

struct Tanh {
  static constexpr double kSteepest = 0;  // φ where φ' is largest
  template <class Real>
  static UV_INLINE Vec<Real> value(Vec<Real> a) {
    return tanh<Real>(a);
  }
  template <class Real>
  static UV_INLINE Vec<Real> slope(Vec<Real> h) {
    return Real(1) - h * h;
  }
};

struct Relu {
  static constexpr double kSteepest = 1;  // φ where φ' is largest
  template <class Real>
  static UV_INLINE Vec<Real> value(Vec<Real> a) {
    return a < Real(0) ? all<Real>(0) : a;  // keeps NaN
  }
  template <class Real>
  static UV_INLINE Vec<Real> slope(Vec<Real> h) {
    return h <= Real(0) ? all<Real>(0) : all<Real>(1);  // of NaN 1, as in torch
  }
};

struct Sigmoid {
  static constexpr double kSteepest = 0.5;  // φ where φ' is largest
  template <class Real>
  static UV_INLINE Vec<Real> value(Vec<Real> a) {
    return sigmoid<Real>(a);
  }
  template <class Real>
  static UV_INLINE Vec<Real> slope(Vec<Real> h) {
    return h * (Real(1) - h);
  }
};

template <class Phi>
struct PlainCell {
  static constexpr int kGates = 1, kAcross = 4, kSaved = 4, kUnits = 4;
  static constexpr bool kHasC = false, kSplit = false;
  static constexpr int kSplitGate = -1;

  template <class Real>
  static UV_INLINE Vec<Real> forward(const Vec<Real>* a, const Vec<Real>*, Vec<Real>, Vec<Real>* saved, Vec<Real>&,
                                     Vec<Real>) {
    saved[0] = Phi::template value<Real>(a[0]);
    return saved[0];
  }

  template <class Real>
  static UV_INLINE void backward(Vec<Real> dh, Vec<Real>&, Vec<Real>&, const Vec<Real>* saved, Vec<Real>, Vec<Real>,
                                 Vec<Real>, Vec<Real>* da, Vec<Real>*, Vec<Real>&) {
    da[0] = dh * Phi::template slope<Real>(saved[0]);
  }

  static constexpr int kCarry = -1;
  template <class Real>
  static UV_INLINE Vec<Real> openness(int, Vec<Real> v) {
    return Phi::template slope<Real>(v) / Phi::template slope<Real>(all<Real>(Phi::kSteepest));
  }
};

}  // namespace
}  // namespace unvanish::UV_ISA
