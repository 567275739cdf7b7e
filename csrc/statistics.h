// What a block's gates were like, gathered on the way forward while they are in registers.

template <class CellType, class Real>
class Tally {
 public:
  static constexpr int L = kLanes<Real>, G = CellType::kGates;

  Tally(const Statistics* wanted, int64_t rows, int64_t H, int64_t Hp)
      : wanted_(wanted),
        H_(H),
        Hp_(Hp),
        closed_(wanted == nullptr ? Real(0) : static_cast<Real>(wanted->closed)),
        values_(wanted == nullptr ? 1 : rows * kRow),
        mantissa_(wanted == nullptr ? 1 : Hp),
        exponent_(wanted == nullptr ? 1 : Hp) {
    if (wanted == nullptr) return;
    for (int64_t k = 0; k < rows * kRow; ++k) values_.get()[k] = 0;
    for (int64_t k = 0; k < Hp; ++k) {
      mantissa_.get()[k] = 1;
      exponent_.get()[k] = 0;
    }
  }

  // One vector of units of one sample; v: the gates' values.
  UV_INLINE void add(int64_t row, int64_t unit, const Vec<Real>* v) const {
    Real* to = values_.get() + row * kRow;
    for (int k = 0; k < G; ++k) {
      const Vec<Real> shut = CellType::template openness<Real>(k, v[k]) < closed_ ? all<Real>(1) : all<Real>(0);
      store(to + k * L, load(to + k * L) + first_lanes<Real>(v[k], H_ - unit));
      store(to + (4 + k) * L, load(to + (4 + k) * L) + first_lanes<Real>(shut, H_ - unit));
    }
    if constexpr (CellType::kCarry >= 0) {
      // Σ ln f as the logarithm of a running product, whose exponent is kept apart.
      Ints<Real> apart, again, total;
      Vec<Real> m = split_exponent<Real>(v[CellType::kCarry], apart);
      m = split_exponent<Real>(m * load(mantissa_.get() + unit), again);
      store(mantissa_.get() + unit, m);
      __builtin_memcpy(&total, exponent_.get() + unit, sizeof total);
      total += apart + again;
      __builtin_memcpy(exponent_.get() + unit, &total, sizeof total);
    }
  }

  // A step of n samples, the first of them at place `at` of [T, B], is complete.
  void write(int64_t at, int64_t n) const {
    for (int64_t r = 0; r < n; ++r) {
      Real* v = values_.get() + r * kRow;
      Real totals[2 * 4];
      for (int k = 0; k < 2 * 4; k += kTogether) {
        Vec<Real> part[kTogether];
        for (int j = 0; j < kTogether; ++j) part[j] = load(v + (k + j) * L);
        store(totals + k, sums<Real, kTogether>(part), kTogether);
      }
      for (int k = 0; k < G; ++k) {
        wanted_->mean[(at + r) * G + k] = static_cast<double>(totals[k]) / static_cast<double>(H_);
        wanted_->saturated[(at + r) * G + k] = static_cast<double>(totals[4 + k]) / static_cast<double>(H_);
      }
      for (int k = 0; k < kRow; ++k) v[k] = 0;
    }
  }

  // Σ ln f of the block, [H].
  void finish(double* log_carry) const {
    for (int64_t k = 0; k < H_; ++k)
      log_carry[k] = static_cast<double>(exponent_.get()[k]) * 0.6931471805599453 + __builtin_log(static_cast<double>(mantissa_.get()[k]));
  }

 private:
  using Int = decltype(ExpConstants<Real>::bias + 0);
  static constexpr int kRow = 2 * 4 * L;                // values, and shares shut, of up to four gates
  static constexpr int kTogether = L < 4 ? L : 4;       // summed at once

  const Statistics* wanted_;
  int64_t H_, Hp_;
  Real closed_;
  Scratch<Real> values_, mantissa_;
  Scratch<Int> exponent_;
};
