// How large an error is: norms, and bringing a vector within one.

// Σ v² over n columns, in whole vectors, `at(column)` each; in double, where the squares of a float neither overflow nor vanish.
template <class Real, class At>
UV_INLINE Vec<double> squares(int64_t n, At at) {
  Vec<double> total{};
  for (int64_t k = 0; k < n; k += kLanes<Real>) add_squares(total, load(at(k)));
  return total;
}

// What brings a vector within a 2-norm.
template <class Real>
Real within(double most, const Real* v, int64_t n) {
  const auto norm_over = [&](double scale) {
    double square = 0;
    for (int64_t k = 0; k < n; ++k) square += (v[k] / scale) * (v[k] / scale);
    return __builtin_sqrt(square) * scale;
  };
  double norm = norm_over(1);
  if (norm > __DBL_MAX__) {
    // The squares of a double leave its range before it does.
    double largest = 0;
    for (int64_t k = 0; k < n; ++k) largest = __builtin_fmax(largest, __builtin_fabs(static_cast<double>(v[k])));
    if (largest <= __DBL_MAX__) norm = norm_over(largest);
  }
  return norm <= most ? Real(1) : static_cast<Real>(most / norm);
}

template <class Real>
void scale(Real* v, int64_t k0, int64_t k1, Real by) {
  if (by == Real(1)) return;
  for (int64_t k = k0; k < k1; ++k) v[k] *= by;
}

// ‖Σ_b u_bᵀ v_b‖_F of a step's samples b by the Gram identity ‖·‖² = Σ_{b,b'} (u_b · u_b')(v_b · v_b'): far fewer products than the matrix
// itself takes. Here the rows u, or v, of one factor, interleaved vector by vector in groups, so that a group goes through the registers
// together.
template <class Real>
struct Pairs {
  static constexpr int L = kLanes<Real>;
  static constexpr int kGroup = L >= 8 ? 4 : 2, kRows = L / kGroup;  // kRows · kGroup products fill a vector
  Real* data;
  int64_t columns;

  static int64_t padded(int64_t rows) { return round_up(rows, kGroup); }

  // `rows` rows of `from` from `row` on, n of their columns from `column` on, scaled, as rows from `number` on, columns from `at` on. Column
  // by column, since that is how they lie together.
  void put(const Blocked<Real>& from, int64_t row, int64_t rows, int64_t column, int64_t n, Real scale, int64_t number, int64_t at) const {
    for (int64_t k = 0; k < n; k += L) {
      const Real* source = from.at(row, column + k);
      Real* to = data + (at + k) * kGroup;
      for (int64_t b = number; b < number + rows; ++b, source += L)
        store(to + b / kGroup * kGroup * columns + b % kGroup * L, load(source) * scale);
    }
  }

  // sums[i · kGroup + j] += the product of rows a + first + i and b + j, lane by lane.
  UV_INLINE void add(int64_t a, int64_t b, int first, Vec<Real> (&sums)[L]) const {
    const Real *left = data + a * columns + first * L, *right = data + b * columns;
    for (int64_t k = 0; k < columns * kGroup; k += L * kGroup) {
      Vec<Real> across[kGroup];
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; ++j) across[j] = load(right + k + j * L);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<Real> down = load(left + k + i * L);
#pragma GCC unroll 4
        for (int j = 0; j < kGroup; ++j) sums[i * kGroup + j] += down * across[j];
      }
    }
  }
};

// Σ over the pairs of n rows of f(a, b, first), which has the products of rows a + first … and b … in its lanes.
template <class Real, class F>
UV_INLINE double sum_of_pairs(int64_t n, F f) {
  constexpr int kGroup = Pairs<Real>::kGroup;
  Vec<Real> total{};
  for (int64_t a = 0; a < n; a += kGroup)
    for (int64_t b = a; b < n; b += kGroup)
      for (int first = 0; first < kGroup && a + first < n; first += Pairs<Real>::kRows) {
        const Vec<Real> pairs = f(a, b, first);
        total += a == b ? pairs : pairs + pairs;
      }
  double sum = 0;
  for (int j = 0; j < kLanes<Real>; ++j) sum += static_cast<double>(total[j]);
  return sum;
}

// Writes the norms of steps whose δ lies in the work of a way back.
template <class CellType, class Real>
struct Measure {
  static constexpr int L = kLanes<Real>, A = CellType::kAcross;
  static constexpr int kFar = sizeof(Real) == 4 ? 120 : 1000;  // 2^±kFar is normal

  // Of δh, δc and δa of sample r of a block, whose δa is `row` of the chunk.
  template <class Work>
  void sample(int64_t r, int64_t row, const Work& w) const {
    const int64_t at = w.places[row];
    Vec<double> found[8] = {};
    for (int v = 0; v < CellType::kGates; ++v) {
      const int64_t apart = CellType::kUnits == 1 ? A : 1;  // vectors from a gate's units to the next
      found[v] = squares<Real>(s.Hp, [&](int64_t unit) { return w.da.at(row, unit * apart + v * L); });
    }
    if (CellType::kHasC) found[4] = squares<Real>(s.Hp, [&](int64_t unit) { return w.total + r * s.Hp + unit; });
    found[5] = squares<Real>(l.R, [&](int64_t k) { return w.dh + r * s.dh_stride + k; });
    constexpr int together = kLanes<double> < 4 ? kLanes<double> : 4;
    double totals[8 + kLanes<double>];
    for (int k = 0; k < 8; k += together) {
      Vec<double> part[together];
      for (int j = 0; j < together; ++j) part[j] = found[k + j];
      store(totals + k, sums<double, together>(part));
    }
    for (int v = 0; v < CellType::kGates; ++v) norms.a[at * CellType::kGates + v] = __builtin_sqrt(totals[v]);
    if (CellType::kHasC) norms.c[at] = __builtin_sqrt(totals[4]);
    norms.h[at] = __builtin_sqrt(totals[5]);
  }

  // ‖g_t‖_F of n samples, whose norms are known; f(block, put) hands each block's to put(work, first row there, rows, first sample).
  template <class F>
  void step(int64_t t, int64_t n, F f) const {
    double largest = 0;
    for (int64_t b = 0; b < n; ++b) {
      double square = 0;
      for (int v = 0; v < CellType::kGates; ++v) square += __builtin_pow(norms.a[(t * l.B + b) * CellType::kGates + v], 2);
      if (!(square <= largest)) largest = square;
    }
    largest = __builtin_sqrt(largest);
    if (!(largest > 0) || largest > __DBL_MAX__) {
      norms.w[t] = largest;
      return;
    }
    // A power of two brings δ to about 1: its squares could leave Real's range.
    int exponent = 0;
    __builtin_frexp(largest, &exponent);
    const Real scale = static_cast<Real>(__builtin_ldexp(1.0, exponent > kFar ? -kFar : exponent < -kFar ? kFar : -exponent));
    // The GRU's δa with respect to W_ih x and to W_hh h differ in the candidate alone.
    const int64_t apart = CellType::kSplit ? s.Hp : 0, common = s.width - apart;
    const int64_t widths[] = {common, apart, apart, s.Rv, s.Iv}, padded = Pairs<Real>::padded(n);
    const int64_t size = padded * (common + 2 * apart + s.Rv + s.Iv);
    Scratch<Real> packed(size);
    if (padded > n) zero(packed.get(), size);
    Pairs<Real> factors[5];
    Real* next = packed.get();
    for (int k = 0; k < 5; ++k) {
      factors[k] = {next, widths[k]};
      next += padded * widths[k];
    }
    const auto& [u, u_x, u_h, h, x] = factors;
    for (int64_t number = 0; number * s.block_rows < n; ++number)
      f(number, [&](const auto& w, int64_t row, int64_t rows, int64_t first) {
        if constexpr (CellType::kSplit) {
          for (int64_t p = 0; p < s.panels; ++p) {
            u.put(w.da, row, rows, p * A * L, N * L, scale, first, p * N * L);
            u_x.put(w.da, row, rows, (p * A + N) * L, L, scale, first, p * L);
            u_h.put(w.da_hh, row, rows, (p * A + N) * L, L, scale, first, p * L);
          }
        } else {
          u.put(w.da, row, rows, 0, common, scale, first, 0);
        }
        h.put(w.h_prev, row, rows, 0, s.Rv, Real(1), first, 0);
        x.put(w.x, row, rows, 0, s.Iv, Real(1), first, 0);
      });
    const double square = sum_of_pairs<Real>(n, [&](int64_t a, int64_t b, int first) {
      const auto products = [&](const auto&... of) {
        Vec<Real> lanes[L] = {};
        (of.add(a, b, first, lanes), ...);
        return sums<Real, L>(lanes);
      };
      if constexpr (CellType::kSplit) {
        const Vec<Real> shared = products(u);
        return Vec<Real>((shared + products(u_x)) * products(x) + (shared + products(u_h)) * products(h));
      } else {
        return Vec<Real>(products(u) * products(h, x));
      }
    });
    norms.w[t] = __builtin_sqrt(square > 0 ? square : 0) / static_cast<double>(scale);
  }

  const Layer<Real>& l;
  const Sizes<CellType, Real>& s;
  const Norms& norms;
};
