// Statistics of a block's gates, computed while they are still in the cache.
#pragma once

#include <cstdint>

#include "pool.h"
#include "unvanish.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

template <class CellType, class Real>
class Tally {
 public:
  static constexpr int L = kLanes<Real>, G = CellType::kGates;

  Tally(const Statistics& wanted, int64_t H, int64_t Hp, int64_t saved)
      : wanted_(wanted), H_(H), Hp_(Hp), panels_(Hp / (L * CellType::kUnits)), saved_(saved), mantissa_(Hp), exponent_(Hp), folded_(Hp) {
    for (int64_t k = 0; k < Hp; ++k) {
      mantissa_.get()[k] = 1;
      exponent_.get()[k] = 0;
      folded_.get()[k] = 0;
    }
  }

  // Called when a step of n samples is complete; `gates` are theirs, and the first sample is at index `at` of [T, B].
  void add(const Real* gates, int64_t at, int64_t n) {
    const Vec<Real> closed = all(static_cast<Real>(wanted_.closed));
    for (int64_t r = 0; r < n; ++r) {
      Vec<Real> mean[4] = {}, shut[4] = {};
      units([&](int64_t unit, int64_t place) {
#pragma GCC unroll 4
        for (int k = 0; k < G; ++k) {
          Vec<Real> value = load(gates + r * saved_ + place + k * L);
          Vec<Real> yes = CellType::template openness<Real>(k, value) < closed ? all<Real>(1) : all<Real>(0);
          if (unit + L > H_) {
            value = first_lanes<Real>(value, H_ - unit);
            yes = first_lanes<Real>(yes, H_ - unit);
          }
          mean[k] += value;
          shut[k] += yes;
        }
      });
      write(mean, wanted_.mean + (at + r) * G);
      write(shut, wanted_.saturated + (at + r) * G);
    }
    if constexpr (CellType::kCarry >= 0) {
      units([&](int64_t unit, int64_t place) { carry(gates + place + CellType::kCarry * L, n, unit); });
      if (++steps_ % kStepsApart == 0) fold();
    }
  }

  // Σ ln f of the block, [H].
  void finish(double* log_carry) {
    fold();
    for (int64_t k = 0; k < H_; ++k) {
      const double ln2 = 0.6931471805599453, power = static_cast<double>(folded_.get()[k]);
      log_carry[k] = power * ln2 + __builtin_log(static_cast<double>(mantissa_.get()[k]));
    }
  }

 private:
  static constexpr int64_t kStepsApart = 1 << 16;  // a block's exponents over this many steps fit into 32 bits

  void fold() {
    for (int64_t k = 0; k < Hp_; ++k) {
      folded_.get()[k] += exponent_.get()[k];
      exponent_.get()[k] = 0;
    }
  }

  // f(first unit, offset of its gates in a row) for every vector of units.
  template <class F>
  UV_INLINE void units(F f) const {
    constexpr int kept = CellType::kSaved / CellType::kUnits;
    for (int64_t p = 0; p < panels_; ++p)
      for (int u = 0; u < CellType::kUnits; ++u) f((p * CellType::kUnits + u) * L, (p * CellType::kSaved + u * kept) * L);
  }

  UV_INLINE void write(const Vec<Real> (&v)[4], double* out) const {
    constexpr int together = L < 4 ? L : 4;
    Real totals[4 + L];
    for (int k = 0; k < 4; k += together) {
      Vec<Real> part[together];
      for (int j = 0; j < together; ++j) part[j] = v[k + j];
      store(totals + k, sums<Real, together>(part));
    }
    for (int k = 0; k < G; ++k) out[k] = static_cast<double>(totals[k]) / static_cast<double>(H_);
  }

  // Σ ln f as the logarithm of a running product whose exponent is kept separately; a block's rows are too few to overflow it.
  UV_INLINE void carry(const Real* f, int64_t n, int64_t unit) const {
    Vec<Real> m = load(mantissa_.get() + unit);
    Ints<Real> total, exponent;
    __builtin_memcpy(&total, exponent_.get() + unit, sizeof total);
    for (int64_t r = 0; r < n; ++r) {
      m *= split_exponent<Real>(load(f + r * saved_), exponent);
      total += exponent;
    }
    m = split_exponent<Real>(m, exponent);
    total += exponent;
    store(mantissa_.get() + unit, m);
    __builtin_memcpy(exponent_.get() + unit, &total, sizeof total);
  }

  const Statistics& wanted_;
  int64_t H_, Hp_, panels_, saved_, steps_ = 0;
  Scratch<Real> mantissa_;
  Scratch<decltype(ExpConstants<Real>::bias + 0)> exponent_;
  Scratch<int64_t> folded_;
};

}  // namespace
}  // namespace unvanish::UV_ISA
