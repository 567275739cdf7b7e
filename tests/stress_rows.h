// Random errors propagated back through random matrices.
#pragma once

#include <cstdio>
#include <set>

#include "stress.h"

namespace stress::rows {

struct Shape {
  bool reverse, shared, scaled;
  int64_t T, B, K, H, states, measured;
  double size;
  uint64_t seed;

  std::string text() const {
    char line[160];
    std::snprintf(line, sizeof line, "errors: T %ld B %ld K %ld H %ld states %ld measured %ld reverse %d shared %d scaled %d size %g", static_cast<long>(T),
                  static_cast<long>(B), static_cast<long>(K), static_cast<long>(H), static_cast<long>(states), static_cast<long>(measured),
                  reverse, shared, scaled, size);
    return line;
  }
};

inline Shape shape(Random& random) {
  Shape s{};
  s.reverse = between(random, 0, 1), s.shared = between(random, 0, 1), s.scaled = between(random, 0, 1);
  s.T = between(random, 1, 200), s.B = between(random, 1, 5), s.K = between(random, 1, s.T), s.H = between(random, 1, 80), s.states = between(random, 1, 2);
  s.measured = between(random, 0, s.states - 1);
  s.size = between(random, 0, 1) ? 0.5 : 3;
  s.seed = random();
  return s;
}

template <class Real>
struct Run : Written<Real> {
  Run(const Shape& s, const Kernels<Real>& k, int threads, int64_t only = -1) {
    Random random(s.seed);
    const int64_t B = only < 0 ? s.B : 1, n = s.states * s.H;
    const double size = s.size / std::sqrt(static_cast<double>(n));
    const auto drawn = [&](int64_t steps, int64_t width) { return batch<Real>(steps, s.B, width, random, only); };
    const Edge<Real> errors = drawn(1, s.K * n), scale = drawn(s.T, s.H), made = drawn(s.T, s.H), carried = drawn(s.T, s.H);
    const Edge<Real> matrices = s.shared ? filled<Real>(n * s.H, random, 1) : drawn(s.T, n * s.H);
    for (int64_t i = 0; i < matrices.count(); ++i) matrices.get()[i] = static_cast<Real>(static_cast<float>(static_cast<double>(matrices.get()[i]) * size));
    std::set<int64_t> chosen;
    while (static_cast<int64_t>(chosen.size()) < s.K) chosen.insert(between(random, 0, s.T - 1));
    const Edge<int64_t> sources(s.K);
    int64_t number = 0;
    for (int64_t t : chosen) sources.get()[number++] = t;
    Real* rows = this->array(1, errors.count());
    std::memcpy(rows, errors.get(), static_cast<size_t>(errors.count()) * sizeof(Real));
    const Edge<double> exponents(B * s.K), norms(s.T * B * s.K);
    // In two stretches of steps, as a caller that forms the matrices piece by piece.
    const int64_t middle = s.T / 2;
    for (int64_t part = 0; part < 2; ++part) {
      const bool upper = (part == 0) != s.reverse;
      const int64_t first = upper ? middle : 0, steps = upper ? s.T - middle : middle;
      const auto from = [&](const Edge<Real>& whole, int64_t width) { return whole.get() + first * B * width; };
      k.propagate({s.reverse, first, steps, B, s.K, s.H, s.states, s.measured, sources.get(), s.shared ? matrices.get() : from(matrices, n * s.H), s.shared,
                   s.scaled ? from(scale, s.H) : nullptr, s.states > 1 ? from(made, s.H) : nullptr, s.states > 1 ? from(carried, s.H) : nullptr, rows,
                   exponents.get(), norms.get()},
                  threads);
    }
    measured = {exponents, norms};
  }

  std::vector<Edge<double>> measured;
};

inline void test(const Shape& s, const char* isa, Random& random) {
  const Run<float> narrow = check<Run, float>(s, isa, random);
  const Run<double> wide = check<Run, double>(s, isa, random);
  const int64_t b = between(random, 0, s.B - 1);
  const Run<float> alone(s, *kernels<float>(isa), 2, b);
  for (size_t i = 0; i < 2; ++i)
    for (int64_t t = 0; t < (i == 0 ? 1 : s.T); ++t)
      demand(std::memcmp(narrow.measured[i].get() + (t * s.B + b) * s.K, alone.measured[i].get() + t * s.K, static_cast<size_t>(s.K) * sizeof(double)) == 0,
             "a sample alone is measured differently");
  const double *a = narrow.measured[1].get(), *c = wide.measured[1].get();
  for (int64_t i = 0; i < narrow.measured[1].count(); ++i)
    demand(a[i] == c[i] || std::fabs(a[i] - c[i]) < 0.1, std::string(isa) + ": precisions differ, norm " + std::to_string(i));
}

}  // namespace stress::rows
