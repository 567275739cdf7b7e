// Random layers of cells made up of random programs: not cells that learn, but every access that programs can make.
#pragma once

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <utility>

#include "stress.h"

namespace stress::programs {

using Places = std::vector<Place>;

// A program and the memory it lies in.
struct OwnedProgram {
  Places inputs, outputs;
  std::vector<double> constants;
  std::vector<Instruction> code;
  int64_t temporaries = 0;

  Program get() const {
    return {code.data(), inputs.data(), outputs.data(), constants.data(), static_cast<int64_t>(code.size()), static_cast<int64_t>(inputs.size()),
            static_cast<int64_t>(outputs.size()), static_cast<int64_t>(constants.size()), temporaries};
  }
};

// Operations that the two precisions agree on, of arguments between −1 and 1.
constexpr Op kSmooth[] = {Op::copy_, Op::add_, Op::sub_, Op::mul_, Op::fma_, Op::neg_, Op::sigmoid_, Op::tanh_, Op::dsigmoid_,
                          Op::dtanh_, Op::sin_, Op::cos_, Op::atan_, Op::erf_};
constexpr int kOps = static_cast<int>(Op::where_) + 1;

// Writes every output as half the tanh of random operations on what is there, so that nothing grows over the steps.
inline OwnedProgram program(Places inputs, Places outputs, bool rough, Random& random) {
  OwnedProgram made{std::move(inputs), std::move(outputs), {0.5, -0.25}, {}, between(random, 1, 3)};
  const auto n_in = static_cast<int32_t>(made.inputs.size()), n_out = static_cast<int32_t>(made.outputs.size());
  std::vector<int32_t> readable;
  for (int32_t r = 0; r < n_in; ++r) readable.push_back(r);
  readable.push_back(n_in + n_out), readable.push_back(n_in + n_out + 1);
  const auto any = [&] { return readable[static_cast<size_t>(between(random, 0, static_cast<int64_t>(readable.size()) - 1))]; };
  const auto written = [&](int32_t r) {
    if (std::find(readable.begin(), readable.end(), r) == readable.end()) readable.push_back(r);
  };
  for (int32_t out = 0; out < n_out; ++out) {
    int32_t last = any();
    for (int64_t i = between(random, 1, 4); i > 0; --i) {
      const auto to = static_cast<int32_t>(n_in + n_out + 2 + between(random, 0, made.temporaries - 1));
      const Op op = rough ? static_cast<Op>(between(random, 0, kOps - 1)) : kSmooth[between(random, 0, std::size(kSmooth) - 1)];
      made.code.push_back({op, to, any(), last, any()});
      written(to);
      last = to;
    }
    made.code.push_back({Op::tanh_, n_in + out, last, last, last});
    made.code.push_back({Op::mul_, n_in + out, n_in + out, n_in + n_out, n_in + n_out});
    written(n_in + out);
  }
  return made;
}

inline Places all(Kind kind, int32_t count) {
  Places found;
  for (int32_t i = 0; i < count; ++i) found.push_back({kind, i});
  return found;
}

inline Places joined(std::initializer_list<Places> parts) {
  Places whole;
  for (const Places& part : parts) whole.insert(whole.end(), part.begin(), part.end());
  return whole;
}

// A cell and the memory it lies in; its programs differ with whether the total errors are wanted.
struct OwnedCell {
  OwnedCell(bool rough, bool totals, Random& random) {
    cell.A = static_cast<int32_t>(between(random, 1, 3)), cell.V = static_cast<int32_t>(between(random, 0, 2));
    cell.G = static_cast<int32_t>(between(random, 1, 4)), cell.Q = static_cast<int32_t>(between(random, 0, 4));
    cell.K = static_cast<int32_t>(between(random, 0, 3));
    for (int32_t q = 0; q < cell.Q; ++q) source.push_back(static_cast<int32_t>(between(random, 0, cell.A - 1))), late.push_back(between(random, 0, 4) == 0);
    p_from_q.assign(static_cast<size_t>(cell.G), -1);
    const bool summed = between(random, 0, 1);
    for (int32_t i = 0; i < std::max(cell.G, cell.Q); ++i) {
      if (i < cell.G && i < cell.Q && (summed || between(random, 0, 1))) {
        shares.push_back({i, i}), p_from_q[static_cast<size_t>(i)] = i;
        continue;
      }
      if (i < cell.G) shares.push_back({i, -1});
      if (i < cell.Q) shares.push_back({-1, i});
    }
    cell.n_shares = static_cast<int32_t>(shares.size());
    cell.shares = shares.data(), cell.source = source.data(), cell.late = late.data(), cell.p_from_q = p_from_q.data();

    Places given = joined({all(Kind::before, cell.A), all(Kind::vector, cell.V)}), soon = given, now = given;
    Places first, rest, late_errors, errors;
    for (int32_t i = 0; i < cell.n_shares; ++i) {
      now.push_back({Kind::share, i});
      if (shares[static_cast<size_t>(i)].q < 0 || !late[static_cast<size_t>(shares[static_cast<size_t>(i)].q)]) soon.push_back({Kind::share, i});
    }
    for (int32_t a = 0; a < cell.A; ++a) {
      bool is_read = false;
      for (int32_t q = 0; q < cell.Q; ++q) is_read = is_read || (late[static_cast<size_t>(q)] && source[static_cast<size_t>(q)] == a);
      (is_read ? first : rest).push_back({Kind::after, a});
      if (is_read) now.push_back({Kind::after, a});
    }
    for (int32_t q = 0; q < cell.Q; ++q) (late[static_cast<size_t>(q)] ? late_errors : errors).push_back({Kind::dq, q});
    for (int32_t p = 0; p < cell.G; ++p)
      if (p_from_q[static_cast<size_t>(p)] < 0) errors.push_back({Kind::dp, p});
    errors = joined({errors, all(Kind::ds, cell.A), all(Kind::dv, cell.V), all(Kind::total, totals ? cell.A : 0)});
    const Places back = joined({given, all(Kind::after, cell.A), all(Kind::kept, cell.K), all(Kind::arrived, cell.A)});
    owned.push_back(first.empty() ? OwnedProgram{} : program(soon, first, rough, random));
    owned.push_back(program(now, joined({rest, all(Kind::kept, cell.K)}), rough, random));
    owned.push_back(late_errors.empty() ? OwnedProgram{} : program(back, late_errors, rough, random));
    owned.push_back(program(back, errors, rough, random));
    cell.early = owned[0].get(), cell.forward = owned[1].get(), cell.late_errors = owned[2].get(), cell.backward = owned[3].get();
  }
  OwnedCell(const OwnedCell&) = delete;
  OwnedCell& operator=(const OwnedCell&) = delete;

  StepCell cell{};

 private:
  std::vector<Share> shares;
  std::vector<int32_t> source, late, p_from_q;
  std::vector<OwnedProgram> owned;
};

struct Shape {
  std::shared_ptr<const OwnedCell> cell;
  bool reverse, bias, ragged, dx, errors, rough, cut;
  int64_t T, B, I, H;
  double clip;
  uint64_t seed;

  std::string text() const {
    const StepCell& c = cell->cell;
    char line[200];
    std::snprintf(line, sizeof line, "programs of G %d Q %d A %d V %d K %d, T %ld B %ld I %ld H %ld reverse %d ragged %d clip %g cut %d dx %d errors %d rough %d",
                  c.G, c.Q, c.A, c.V, c.K, static_cast<long>(T), static_cast<long>(B), static_cast<long>(I), static_cast<long>(H), reverse, ragged,
                  clip, cut, dx, errors, rough);
    return line;
  }
};

inline Shape shape(Random& random) {
  Shape s{};
  s.reverse = between(random, 0, 1), s.bias = between(random, 0, 1), s.ragged = between(random, 0, 1), s.dx = between(random, 0, 1);
  s.errors = between(random, 0, 1), s.rough = between(random, 0, 2) == 0;
  const bool large = between(random, 0, 9) == 0;
  s.T = between(random, 1, large ? 250 : 9), s.B = between(random, 1, between(random, 0, 1) ? 6 : 70);
  s.I = between(random, 1, 40), s.H = between(random, 1, large ? 150 : 70);
  s.clip = between(random, 0, 3) == 0 ? 0.5 : 0;
  s.cut = between(random, 0, 2) == 0;
  s.cell = std::make_shared<const OwnedCell>(s.rough, s.errors, random);
  s.seed = random();
  return s;
}

// A layer's arrays, drawn from its seed; `only` ≥ 0 keeps one sample of the batch.
template <class Real>
struct Run : Written<Real> {
  Run(const Shape& s, const Kernels<Real>& k, int threads, int64_t only = -1) {
    Random random(s.seed);
    const StepCell& c = s.cell->cell;
    const int64_t B = only < 0 ? s.B : 1;
    const double scale = 0.7 / std::sqrt(static_cast<double>(s.H));
    const auto drawn = [&](int64_t steps, int64_t width) { return batch<Real>(steps, s.B, width, random, only); };
    const auto weight = [&](int64_t count) { return filled<Real>(count, random, scale); };
    Edge<Real> x = drawn(s.T, s.I), dy = drawn(s.T, s.H);
    std::vector<Edge<Real>> held;
    const auto states = [&](auto make) {
      std::vector<Real*> found;
      for (int32_t a = 0; a < c.A; ++a) found.push_back(make());
      return found;
    };
    const auto given = [&] { return held.emplace_back(drawn(1, s.H)).get(); };
    const std::vector<Real*> initial = states(given), dfinal = states(given);
    Edge<Real> w_ih = weight(c.G * s.H * s.I), w_hh = weight(c.Q * s.H * s.H), b_ih = weight(c.G * s.H), b_hh = weight(c.Q * s.H), v = weight(c.V * s.H);
    Edge<int64_t> lengths(B);
    for (int64_t b = 0; b < s.B; ++b) {
      const int64_t length = between(random, 0, s.T);
      if (only < 0 || only == b) lengths.get()[only < 0 ? b : 0] = length;
    }
    // What is beyond a sample's end is not read.
    for (int64_t b = 0; s.ragged && b < B; ++b)
      for (int64_t t = lengths.get()[b]; t < s.T; ++t)
        std::fill_n(x.get() + (t * B + b) * s.I, s.I, std::numeric_limits<Real>::quiet_NaN());

    const auto out = [&](int64_t steps, int64_t width) { return this->array(steps, steps * B * width); };
    const auto sum = [&](int64_t count) { return this->array(0, count); };
    const std::vector<Real*> after = states([&] { return out(s.T, s.H); }), final = states([&] { return out(1, s.H); });
    const int64_t padded = (s.H + k.lanes - 1) / k.lanes * k.lanes;
    Edge<Real> kept(s.T * B * c.K * padded);
    StepLayer<Real> l{{s.reverse, s.T, B, s.I, s.H, s.ragged ? lengths.get() : nullptr, x.get(), w_ih.get(), c.Q > 0 ? w_hh.get() : nullptr,
                       s.bias ? b_ih.get() : nullptr, s.bias && c.Q > 0 ? b_hh.get() : nullptr},
                      c, c.V > 0 ? v.get() : nullptr, initial.data(), after.data(), kept.get()};
    k.step_forward(l, final.data(), threads);
    const Edge<bool> cut = cut_steps(s.T, random);
    StepGradients<Real> g{{dy.get(), s.clip, s.cut ? cut.get() : nullptr}};
    g.dfinal = dfinal.data();
    if (s.dx) g.dx = out(s.T, s.I);
    const std::vector<Real*> dinitial = states([&] { return out(1, s.H); });
    const std::vector<Real*> dstate = states([&]() -> Real* { return s.errors ? out(s.T, s.H) : nullptr; });
    g.dinitial = dinitial.data(), g.dstate = dstate.data();
    if (s.errors) g.dp = out(s.T, c.G * s.H);
    if (s.errors && c.Q > 0) g.dq = out(s.T, c.Q * s.H);
    g.dw_ih = sum(c.G * s.H * s.I);
    if (c.Q > 0) g.dw_hh = sum(c.Q * s.H * s.H);
    if (s.bias) g.db_ih = sum(c.G * s.H);
    if (s.bias && c.Q > 0) g.db_hh = sum(c.Q * s.H);
    if (c.V > 0) g.dv = sum(c.V * s.H);
    k.step_backward(l, g, threads);
    if (c.K > 0) return;
    // Inference keeps the first state alone, and gives the same.
    Edge<Real> again(s.T * B * s.H);
    std::vector<Real*> first(static_cast<size_t>(c.A));
    first[0] = again.get();
    l.after = first.data(), l.kept = nullptr;
    k.step_forward(l, final.data(), threads);
    demand(same(again, this->outputs[0].data), "inference differs");
  }

  std::vector<Edge<double>> measured;
};

inline void test(const Shape& s, const char* isa, Random& random) {
  const Run<float> narrow = check<Run, float>(s, isa, random);
  const Run<double> wide = check<Run, double>(s, isa, random);
  if (!s.rough) agree(narrow, wide, s.clip > 0 ? 1e-2 : 1e-3, isa);
}

}  // namespace stress::programs
