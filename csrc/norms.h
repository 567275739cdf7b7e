// How large the error of a step was, beyond what the way back computes anyway.

// √Σ v² over n columns, in whole vectors, `at(column)` each; in double, where the squares of a float neither overflow nor vanish.
template <class Real, class At>
UV_INLINE Vec<double> squares(int64_t n, At at) {
  Vec<double> total{};
  for (int64_t k = 0; k < n; k += kLanes<Real>) add_squares(total, load(at(k)));
  return total;
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
  template <class Matrix>
  void put(const Matrix& from, int64_t row, int64_t rows, int64_t column, int64_t n, Real scale, int64_t number, int64_t at) const {
    for (int64_t k = 0; k < n; k += L) {
      const Real* source = from.at(row, column + k);
      Real* to = data + (at + k) * kGroup;
      for (int64_t b = number; b < number + rows; ++b, source += Matrix::kNext)
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
