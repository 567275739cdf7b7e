// Random layers through the kernels of torch's cells.
#pragma once

#include <algorithm>
#include <cstdio>

#include "stress.h"

namespace stress::layers {

struct Shape {
  Cell cell;
  bool reverse, bias, ragged, projected, dx, measured, cut;
  int64_t T, B, I, H, R;
  double clip;
  uint64_t seed;

  std::string text() const {
    char line[160];
    std::snprintf(line, sizeof line, "cell %d T %ld B %ld I %ld H %ld R %ld reverse %d ragged %d clip %g cut %d measured %d dx %d", static_cast<int>(cell),
                  static_cast<long>(T), static_cast<long>(B), static_cast<long>(I), static_cast<long>(H), static_cast<long>(R), reverse, ragged,
                  clip, cut, measured, dx);
    return line;
  }
  int64_t gates() const { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
};

inline Shape shape(Random& random) {
  Shape s{};
  s.cell = static_cast<Cell>(between(random, 0, 4));
  s.reverse = between(random, 0, 1), s.bias = between(random, 0, 1), s.ragged = between(random, 0, 1), s.dx = between(random, 0, 1);
  s.measured = between(random, 0, 3) == 0;
  const bool large = between(random, 0, 9) == 0;
  s.T = between(random, 1, large ? 250 : 9), s.B = between(random, 1, between(random, 0, 1) ? 6 : 100);
  s.I = between(random, 1, 40), s.H = between(random, 1, large ? 150 : 70);
  s.projected = s.cell == Cell::lstm && s.H > 1 && between(random, 0, 2) == 0;
  s.R = s.projected ? between(random, 1, s.H - 1) : s.H;
  s.clip = between(random, 0, 3) == 0 ? 0.5 : 0;
  s.cut = between(random, 0, 2) == 0;
  s.seed = random();
  return s;
}

// A layer's arrays, drawn from its seed; `only` ≥ 0 keeps one sample of the batch.
template <class Real>
struct Run : Written<Real> {
  Run(const Shape& shape, const Kernels<Real>& k, int threads, int64_t only = -1) : s(shape) {
    Random random(s.seed);
    const int64_t G = s.gates(), B = only < 0 ? s.B : 1;
    const bool lstm = s.cell == Cell::lstm;
    const double scale = 0.7 / std::sqrt(static_cast<double>(s.H));
    const auto drawn = [&](int64_t steps, int64_t width) { return batch<Real>(steps, s.B, width, random, only); };
    Edge<Real> x = drawn(s.T, s.I), h0 = drawn(1, s.R), c0 = drawn(1, s.H), dy = drawn(s.T, s.R), dhn = drawn(1, s.R), dcn = drawn(1, s.H);
    Edge<Real> w_ih = filled<Real>(G * s.H * s.I, random, scale), w_hh = filled<Real>(G * s.H * s.R, random, scale);
    Edge<Real> b_ih = filled<Real>(G * s.H, random, scale), b_hh = filled<Real>(G * s.H, random, scale);
    Edge<Real> w_hr = filled<Real>(s.R * s.H, random, scale);
    std::vector<int64_t> all(static_cast<size_t>(s.B));
    for (auto& n : all) n = between(random, 0, s.T);
    std::sort(all.rbegin(), all.rend());
    Edge<int64_t> lengths(B);
    for (int64_t b = 0; b < B; ++b) lengths.get()[b] = all[static_cast<size_t>(only < 0 ? b : only)];

    const auto out = [&](int64_t steps, int64_t width) { return this->array(steps, steps * B * width); };
    const auto sum = [&](int64_t count) { return this->array(0, count); };
    Edge<Real> gates(s.T * B * k.saved_width(s.cell, s.H)), cells(s.T * B * k.padded(s.cell, s.H));
    Layer<Real> l{{s.reverse, s.T, B, s.I, s.H, s.ragged ? lengths.get() : nullptr, x.get(), w_ih.get(), w_hh.get(),
                   s.bias ? b_ih.get() : nullptr, s.bias ? b_hh.get() : nullptr},
                  s.cell, s.R, h0.get(), lstm ? c0.get() : nullptr, s.projected ? w_hr.get() : nullptr, out(s.T, s.R), out(s.T, s.R), gates.get(),
                  lstm ? cells.get() : nullptr};
    if (G == 1 && k.saved_width(s.cell, s.H) == s.H) l.gates = l.y;
    const Final<Real> final{out(1, s.R), lstm ? out(1, s.H) : nullptr};
    auto doubles = [&](int64_t count) {
      Edge<double> made(count);
      measured.push_back(made);
      return made.get();
    };
    const Statistics statistics{0.05, doubles(s.T * B * G), doubles(s.T * B * G), G > 1 ? doubles(s.H) : nullptr};
    k.forward(l, final, s.measured ? &statistics : nullptr, threads);
    const auto same = [&](const Real* y) { return identical(y, l.y, s.T * B * s.R); };
    if (!same(l.y_again)) throw std::runtime_error("y again differs");
    const Edge<bool> cut = cut_steps(s.T, random);
    Gradients<Real> g{{dy.get(), s.clip, s.cut ? cut.get() : nullptr}};
    g.dhn = dhn.get(), g.dcn = lstm ? dcn.get() : nullptr;
    if (s.dx) g.dx = out(s.T, s.I);
    g.dh0 = out(1, s.R);
    if (lstm) g.dc0 = out(1, s.H);
    g.dw_ih = sum(G * s.H * s.I), g.dw_hh = sum(G * s.H * s.R);
    if (s.bias) g.db_ih = sum(G * s.H), g.db_hh = sum(G * s.H);
    if (s.projected) g.dw_hr = sum(s.R * s.H);
    const Norms norms{doubles(s.T * B), lstm ? doubles(s.T * B) : nullptr, doubles(s.T * B * G), doubles(s.T)};
    k.backward(l, g, s.measured ? &norms : nullptr, threads);
    if (s.measured) {
      const Edge<Real> probes = filled<Real>(G * s.H * kProbes, random, 0.25);
      Gradients<Real> sketched = g;
      sketched.dw_ih = sketched.dw_hh = sketched.db_ih = sketched.db_hh = sketched.dw_hr = nullptr;
      sketched.probes = probes.get(), sketched.sketch = sum((s.I + s.R) * kProbes);
      k.backward(l, sketched, &norms, threads);
    }
    // Inference keeps nothing, and gives the same.
    l.gates = l.cells = nullptr;
    Edge<Real> again(s.T * B * s.R);
    Layer<Real> bare = l;
    bare.y = again.get(), bare.y_again = nullptr;
    if (!s.measured) {
      k.forward(bare, final, nullptr, threads);
      if (!same(again.get())) throw std::runtime_error("inference differs");
    }
  }

  Shape s;
  std::vector<Edge<double>> measured;
};

inline void test(const Shape& s, const char* isa, Random& random) {
  const Run<float> narrow = check<Run, float>(s, isa, random);
  const Run<double> wide = check<Run, double>(s, isa, random);
  // A unit of a relu that the two precisions put on either side of its edge changes gradients at once.
  agree(narrow, wide, s.cell == Cell::rnn_relu || s.clip > 0 ? 1e-2 : 1e-4, isa);
}

}  // namespace stress::layers
