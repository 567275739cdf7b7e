// All kernels for one instruction set: compiled once for each, with UV_ISA as its name and UV_BYTES as the width of its vectors.
#if !defined(UV_ISA) || !defined(UV_BYTES)
#error "isa.cpp: define UV_ISA, the name of the instruction set, and UV_BYTES, the width of its vectors (see CMakeLists.txt)"
#endif

#include <cstdint>

#include "backward.h"
#include "cells.h"
#include "forward.h"
#include "rows.h"
#include "sequence.h"
#include "stepped_backward.h"
#include "stepped_forward.h"
#include "unvanish.h"
#include "vector.h"

#define UV_TEXT_(a) #a
#define UV_TEXT(a) UV_TEXT_(a)

namespace unvanish::UV_ISA {
namespace {

template <class CellType, class Real>
void forward(const Layer<Real>& layer, const Final<Real>& final, const Statistics* wanted, int threads) {
  Forward<CellType, Real>(layer, final, wanted, threads).run(threads);
}

template <class CellType, class Real>
void backward(const Layer<Real>& layer, const Gradients<Real>& gradients, const Norms* norms, int threads) {
  Backward<CellType, Real>(layer, gradients, norms, threads).run(threads);
}

// Calls f with an object of the cell's type.
template <class F>
void with_cell(Cell cell, F f) {
  switch (cell) {
    case Cell::rnn_tanh: f(PlainCell<Tanh>()); break;
    case Cell::rnn_relu: f(PlainCell<Relu>()); break;
    case Cell::rnn_sigmoid: f(PlainCell<Sigmoid>()); break;
    case Cell::lstm: f(LstmCell()); break;
    case Cell::gru: f(GruCell()); break;
  }
}

template <class Real>
int64_t padded(Cell cell, int64_t H) {
  int64_t out = 0;
  with_cell(cell, [&](auto kind) { out = round_up(H, kLanes<Real> * decltype(kind)::kUnits); });
  return out;
}

template <class Real>
int64_t saved_width(Cell cell, int64_t H) {
  int64_t out = 0;
  with_cell(cell, [&](auto kind) { out = padded<Real>(cell, H) * decltype(kind)::kSaved / decltype(kind)::kUnits; });
  return out;
}

template <class Real>
void forward_any(const Layer<Real>& layer, const Final<Real>& final, const Statistics* wanted, int threads) {
  with_cell(layer.cell, [&](auto kind) { forward<decltype(kind)>(layer, final, wanted, threads); });
}

template <class Real>
void backward_any(const Layer<Real>& layer, const Gradients<Real>& gradients, const Norms* norms, int threads) {
  with_cell(layer.cell, [&](auto kind) { backward<decltype(kind)>(layer, gradients, norms, threads); });
}

template <class Real>
void step_forward(const StepLayer<Real>& layer, Real* const* final, int threads) {
  StepForward<Real>(layer, final, threads).run(threads);
}

template <class Real>
void step_backward(const StepLayer<Real>& layer, const StepGradients<Real>& gradients, int threads) {
  StepBackward<Real>(layer, gradients, threads).run(threads);
}

template <class Real>
void propagate(const Propagation<Real>& given, int threads) {
  RowsBack<Real>(given, threads).run(threads);
}

// More sums than the processor has multiply-adds in flight, but few enough for its registers.
template <class Real>
double peak(int64_t rounds) {
  constexpr int kSums = UV_BYTES == 64 ? 24 : 12;
  Vec<Real> sums[kSums] = {}, a = all(Real(0.999)), b = all(Real(1e-3));
  // Otherwise the compiler would compute them in advance, or a single sum for all.
  asm volatile("" : "+x"(a), "+x"(b));
  for (int k = 0; k < kSums; ++k) asm volatile("" : "+x"(sums[k]));
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 24
    for (int k = 0; k < kSums; ++k) sums[k] = sums[k] * a + b;
  for (int k = 0; k < kSums; ++k) asm volatile("" : : "x"(sums[k]));
  return 2.0 * kSums * kLanes<Real> * static_cast<double>(rounds);
}

template <class Real>
constexpr Kernels<Real> table{UV_TEXT(UV_ISA),     kLanes<Real>,       padded<Real>,        saved_width<Real>, forward_any<Real>,
                              backward_any<Real>, step_forward<Real>, step_backward<Real>, propagate<Real>, peak<Real>};

}  // namespace

const Kernels<float>* float_kernels() { return &table<float>; }
const Kernels<double>* double_kernels() { return &table<double>; }

}  // namespace unvanish::UV_ISA
