// Random layers through the kernels, from several threads at once; meant to be built with sanitizers (see CONTRIBUTING.md).
//
//     stress [layers] [callers] [seed]
//
// Every array ends where an inaccessible page begins. Checked of each layer, on every instruction set that runs here: the same bits from
// 1, 2, 3 and 4 threads and for one sample alone, and float32 and float64 close to each other.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/unvanish.h"

using namespace unvanish;

namespace {

using Random = std::mt19937_64;

int64_t between(Random& random, int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(random); }

// Items up to the edge of a page behind which nothing may be touched.
template <class Item>
class Edge {
 public:
  Edge() = default;
  explicit Edge(int64_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<size_t>(count) * sizeof(Item);
    const size_t used = (bytes + page - 1) / page * page;
    size_ = used + page;
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + used, page, PROT_NONE) != 0) throw std::bad_alloc();
    memory_.reset(memory, [size = size_](void* m) { munmap(m, size); });
    data_ = reinterpret_cast<Item*>(static_cast<char*>(memory) + used - bytes);
  }
  Item* get() const { return data_; }
  int64_t count() const { return count_; }

 private:
  std::shared_ptr<void> memory_;
  Item* data_ = nullptr;
  int64_t count_ = 0;
  size_t size_ = 0;
};

struct Shape {
  Cell cell;
  bool reverse, bias, ragged, projected, dx, measured;
  int64_t T, B, I, H, R;
  double clip;
  uint64_t seed;

  int64_t gates() const { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }
};

Shape shape(Random& random) {
  Shape s{};
  s.cell = static_cast<Cell>(between(random, 0, 4));
  s.reverse = between(random, 0, 1), s.bias = between(random, 0, 1), s.ragged = between(random, 0, 1), s.dx = between(random, 0, 1);
  s.measured = between(random, 0, 3) == 0;
  const bool large = between(random, 0, 9) == 0;
  s.T = between(random, 1, large ? 250 : 9), s.B = between(random, 1, between(random, 0, 1) ? 6 : 70);
  s.I = between(random, 1, 40), s.H = between(random, 1, large ? 150 : 70);
  s.projected = s.cell == Cell::lstm && s.H > 1 && between(random, 0, 2) == 0;
  s.R = s.projected ? between(random, 1, s.H - 1) : s.H;
  s.clip = between(random, 0, 3) == 0 ? 0.5 : 0;
  s.seed = random();
  return s;
}

template <class Real>
Edge<Real> filled(int64_t count, Random& random, double scale) {
  Edge<Real> out(count);
  std::uniform_real_distribution<double> uniform(-scale, scale);
  for (int64_t k = 0; k < count; ++k) out.get()[k] = static_cast<Real>(static_cast<float>(uniform(random)));
  return out;
}

// A layer's arrays, drawn from its seed; `only` ≥ 0 keeps one sample of the batch.
template <class Real>
struct Run {
  Run(const Shape& shape, const Kernels<Real>& k, int threads, int64_t only = -1) : s(shape) {
    Random random(s.seed);
    const int64_t G = s.gates(), B = only < 0 ? s.B : 1;
    const bool lstm = s.cell == Cell::lstm;
    const double scale = 0.7 / std::sqrt(static_cast<double>(s.H));
    Edge<Real> x = batch(s.T, s.I, 1, random, only), h0 = batch(1, s.R, 1, random, only), c0 = batch(1, s.H, 1, random, only);
    Edge<Real> dy = batch(s.T, s.R, 1, random, only), dhn = batch(1, s.R, 1, random, only), dcn = batch(1, s.H, 1, random, only);
    Edge<Real> w_ih = filled<Real>(G * s.H * s.I, random, scale), w_hh = filled<Real>(G * s.H * s.R, random, scale);
    Edge<Real> b_ih = filled<Real>(G * s.H, random, scale), b_hh = filled<Real>(G * s.H, random, scale);
    Edge<Real> w_hr = filled<Real>(s.R * s.H, random, scale);
    std::vector<int64_t> all(static_cast<size_t>(s.B));
    for (auto& n : all) n = between(random, 0, s.T);
    std::sort(all.rbegin(), all.rend());
    Edge<int64_t> lengths(B);
    for (int64_t b = 0; b < B; ++b) lengths.get()[b] = all[static_cast<size_t>(only < 0 ? b : only)];

    auto out = [&](int64_t count) {
      Edge<Real> made(count);
      outs.push_back(made);
      return made.get();
    };
    Edge<Real> gates(s.T * B * k.saved_width(s.cell, s.H)), cells(s.T * B * k.padded(s.cell, s.H));
    Layer<Real> l{s.cell, s.reverse, s.T, B, s.I, s.H, s.R, s.ragged ? lengths.get() : nullptr, x.get(), h0.get(), lstm ? c0.get() : nullptr,
                  w_ih.get(), w_hh.get(), s.bias ? b_ih.get() : nullptr, s.bias ? b_hh.get() : nullptr,
                  s.projected ? w_hr.get() : nullptr, out(s.T * B * s.R), gates.get(), lstm ? cells.get() : nullptr};
    if (G == 1 && k.saved_width(s.cell, s.H) == s.H) l.gates = l.y;
    const Final<Real> final{out(B * s.R), lstm ? out(B * s.H) : nullptr};
    auto doubles = [&](int64_t count) {
      Edge<double> made(count);
      measured.push_back(made);
      return made.get();
    };
    const Statistics statistics{0.05, doubles(s.T * B * G), doubles(s.T * B * G), G > 1 ? doubles(s.H) : nullptr};
    k.forward(l, final, s.measured ? &statistics : nullptr, threads);
    Gradients<Real> g{dy.get(), dhn.get(), lstm ? dcn.get() : nullptr, s.clip, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                      nullptr, nullptr, nullptr, nullptr, nullptr};
    if (s.dx) g.dx = out(s.T * B * s.I);
    g.dh0 = out(B * s.R);
    if (lstm) g.dc0 = out(B * s.H);
    per_sample = outs.size();
    g.dw_ih = out(G * s.H * s.I), g.dw_hh = out(G * s.H * s.R);
    if (s.bias) g.db_ih = out(G * s.H), g.db_hh = out(G * s.H);
    if (s.projected) g.dw_hr = out(s.R * s.H);
    const Norms norms{doubles(s.T * B), lstm ? doubles(s.T * B) : nullptr, doubles(s.T * B * G), doubles(s.T)};
    k.backward(l, g, s.measured ? &norms : nullptr, threads);
    // Inference keeps nothing, and gives the same.
    l.gates = l.cells = nullptr;
    Edge<Real> again(s.T * B * s.R);
    Layer<Real> bare = l;
    bare.y = again.get();
    if (!s.measured) {
      k.forward(bare, final, nullptr, threads);
      if (std::memcmp(again.get(), l.y, static_cast<size_t>(again.count()) * sizeof(Real)) != 0) throw std::runtime_error("inference differs");
    }
  }

  Edge<Real> batch(int64_t steps, int64_t width, double scale, Random& random, int64_t only) const {
    Edge<Real> whole = filled<Real>(steps * s.B * width, random, scale);
    if (only < 0) return whole;
    Edge<Real> one(steps * width);
    for (int64_t t = 0; t < steps; ++t)
      std::memcpy(one.get() + t * width, whole.get() + (t * s.B + only) * width, static_cast<size_t>(width) * sizeof(Real));
    return one;
  }

  Shape s;
  std::vector<Edge<Real>> outs;  // y and the final states, ∂E/∂x, ∂E/∂(initial states); then of weights
  std::vector<Edge<double>> measured;
  size_t per_sample = 0;
};

template <class Item>
bool same(const Edge<Item>& a, const Edge<Item>& b) {
  return a.count() == b.count() && std::memcmp(a.get(), b.get(), static_cast<size_t>(a.count()) * sizeof(Item)) == 0;
}

void demand(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

template <class Real>
Run<Real> check(const Shape& s, const char* isa, Random& random) {
  const Kernels<Real>& k = *kernels<Real>(isa);
  Run<Real> one(s, k, 1);
  for (int threads = 2; threads <= 4; ++threads) {
    const Run<Real> more(s, k, threads);
    for (size_t i = 0; i < one.outs.size(); ++i) demand(same(one.outs[i], more.outs[i]), std::to_string(threads) + " threads differ, array " + std::to_string(i));
    for (size_t i = 0; i < one.measured.size(); ++i) demand(same(one.measured[i], more.measured[i]), "measurements differ");
  }
  const int64_t b = between(random, 0, s.B - 1);
  const Run<Real> alone(s, k, 2, b);
  for (size_t i = 0; i < one.per_sample; ++i) {
    const bool final = i == 1 || (s.cell == Cell::lstm && i == 2), initial = i + (s.cell == Cell::lstm ? 2 : 1) >= one.per_sample;
    const int64_t steps = final || initial ? 1 : s.T, width = one.outs[i].count() / (steps * s.B);
    for (int64_t t = 0; t < steps; ++t)
      demand(std::memcmp(one.outs[i].get() + (t * s.B + b) * width, alone.outs[i].get() + t * width, static_cast<size_t>(width) * sizeof(Real)) == 0,
             "a sample alone differs, array " + std::to_string(i));
  }
  return one;
}

void layer(const Shape& s, Random& random) {
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (kernels<float>(isa) == nullptr) continue;
    const Run<float> narrow = check<float>(s, isa, random);
    const Run<double> wide = check<double>(s, isa, random);
    for (size_t i = 0; i < narrow.outs.size(); ++i) {
      double off = 0, size = 0;
      for (int64_t k = 0; k < narrow.outs[i].count(); ++k) {
        const double a = narrow.outs[i].get()[k], b = wide.outs[i].get()[k];
        off += (a - b) * (a - b), size += b * b;
      }
      // A unit of a relu that the two precisions put on either side of its edge changes gradients at once.
      const double tolerance = s.cell == Cell::rnn_relu || s.clip > 0 ? 1e-2 : 1e-4;
      demand(std::sqrt(off) <= tolerance * std::sqrt(size) + 1e-6, std::string(isa) + ": precisions differ, array " + std::to_string(i));
    }
  }
}

int work(int caller, long layers, uint64_t seed) {
  Random random(seed + static_cast<uint64_t>(caller));
  for (long i = 0; i < layers; ++i) {
    const Shape s = shape(random);
    try {
      layer(s, random);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "caller %d, layer %ld: %s\n  cell %d T %ld B %ld I %ld H %ld R %ld reverse %d ragged %d clip %g measured %d dx %d\n", caller, i,
                   error.what(), static_cast<int>(s.cell), static_cast<long>(s.T), static_cast<long>(s.B), static_cast<long>(s.I),
                   static_cast<long>(s.H), static_cast<long>(s.R), s.reverse, s.ragged, s.clip, s.measured, s.dx);
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const long layers = count > 1 ? std::atol(arguments[1]) : 100;
  const int callers = count > 2 ? std::atoi(arguments[2]) : 2;
  const uint64_t seed = count > 3 ? std::strtoull(arguments[3], nullptr, 10) : 0;
  std::vector<std::thread> threads;
  std::vector<int> failed(static_cast<size_t>(callers));
  for (int i = 0; i < callers; ++i)
    threads.emplace_back([&, i] { failed[static_cast<size_t>(i)] = work(i, layers / callers, seed); });
  for (auto& thread : threads) thread.join();
  for (int each : failed)
    if (each != 0) return 1;
  std::printf("%ld layers from %d callers: all right\n", layers / callers * callers, callers);
  return 0;
}
