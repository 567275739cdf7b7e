// Shared by the forward and the backward pass: the division of work among threads, and the memory layout.
//
// The batch is divided into blocks by its size alone, and gradients of weights are summed over the blocks in order. A block runs the whole
// sequence: on one thread or, where there are more threads than blocks, on a team that divides its hidden units, with one barrier per step.
// Within a block, steps are processed in chunks whose working set stays in the cache: the input's projection in the forward pass and δa in
// the backward pass, which therefore never reach main memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool.h"
#include "product.h"
#include "unvanish.h"
#include "vector.h"

namespace unvanish::UV_ISA {
namespace {

constexpr int64_t kForwardRows = 96, kBackwardRows = UV_BYTES == 64 ? 384 : 192;  // rows, steps times samples, of a chunk

constexpr int64_t kThreadPadding = 1 << 18;  // bytes between two threads' memory: the hardware prefetcher would otherwise steal cache lines from the other thread

// f(i), or f(i, member), for i in [0, count), on up to `threads` threads, the members.
template <class F>
void for_each(int64_t count, int threads, F f) {
  const auto call = [](void* given, int64_t i, int member) {
    F& f = *static_cast<F*>(given);
    if constexpr (requires { f(i, member); })
      f(i, member);
    else
      f(i);
  };
  parallel_for(count, threads, call, &f);
}

// One thread of the team that works on a block.
struct TeamMember {
  int number, of;
  Barrier* barrier;

  bool leads() const { return number == 0; }
  void sync() const {
    if (of > 1) unvanish::arrive_and_wait(barrier, of);
  }
  // This member's part of [0, count).
  int64_t from(int64_t count) const { return count * number / of; }
  int64_t to(int64_t count) const { return count * (number + 1) / of; }
};

// f(block, slot, member) for every block: whole blocks, each on one thread, or, with more threads than blocks and if `most` > 1, teams of
// up to `most` members. Blocks worked on at the same time have different slots below `threads`.
template <class F>
void for_blocks(int64_t blocks, int threads, int64_t most, F f) {
  struct Run {
    F& f;
    int64_t blocks, most, next;
    Barrier* barriers;
  };
  const bool teams = most > 1 && threads > blocks;
  Scratch<Barrier> barriers(teams ? blocks : 1);
  if (teams) __builtin_memset(static_cast<void*>(barriers.get()), 0, static_cast<size_t>(blocks) * sizeof(Barrier));
  Run run{f, blocks, most, 0, barriers.get()};
  const int64_t wanted = teams ? (threads < blocks * most ? threads : blocks * most) : threads < blocks ? threads : blocks;
  run_team(
      static_cast<int>(wanted), threads,
      [](void* context, int member, int members) {
        Run& run = *static_cast<Run*>(context);
        if (members <= run.blocks || run.most <= 1) {
          for (int64_t b = take(&run.next); b < run.blocks; b = take(&run.next)) run.f(b, member, TeamMember{0, 1, nullptr});
          return;
        }
        // OpenMP may grant fewer threads than requested, and some of them may not fit into a team.
        const int64_t b = member % run.blocks, in_team = (members - b + run.blocks - 1) / run.blocks;
        const int of = static_cast<int>(in_team < run.most ? in_team : run.most), number = member / static_cast<int>(run.blocks);
        if (number < of) run.f(b, static_cast<int>(b), TeamMember{number, of, run.barriers + b});
      },
      &run);
}

UV_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
UV_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class CellType, class Real>
struct Sizes {
  static constexpr int L = kLanes<Real>, kBlock = L * CellType::kUnits;
  int64_t Hp, panels, width, saved, Rp, Rv, Iv, dh_stride;
  int64_t blocks, block_rows;
  int64_t team;  // the most members among whom dividing a block's hidden units pays off

  explicit Sizes(const Layer<Real>& l) {
    Hp = round_up(l.H, kBlock);
    panels = Hp / kBlock;
    width = panels * CellType::kAcross * L;
    saved = panels * CellType::kSaved * L;
    Rp = round_up(l.R, kWide * L);
    Rv = round_up(l.R, L);
    Iv = round_up(l.I, L);
    dh_stride = round_up(l.H > l.R ? l.H : l.R, kWide * L);
    block_rows = unvanish::block_rows(l.B);
    blocks = l.B < 1 ? 1 : (l.B + block_rows - 1) / block_rows;
    // A barrier costs as much as a few thousand multiplications.
    const int64_t worth = block_rows * width * l.R / 8192, parts = round_up(Hp, kWide * L) / (kWide * L);
    team = worth < parts ? worth : parts;
  }

  int64_t steps(int64_t rows) const { return (rows + block_rows - 1) / block_rows; }

  // The row of torch's weight that vector v of panel p holds in lane j; −1 for padding.
  int64_t source(int64_t p, int v, int j, int64_t H) const {
    int64_t unit = CellType::kUnits == 1 ? p * L + j : (p * kWide + v) * L + j;
    int64_t gate = CellType::kUnits == 1 ? v : 0;
    return unit < H ? gate * H + unit : -1;
  }
  // The row for a position among the gates of a sample.
  int64_t source_of(int64_t k, int64_t H) const {
    return source(k / (CellType::kAcross * L), static_cast<int>(k / L % CellType::kAcross), static_cast<int>(k % L), H);
  }
};

// Panels [p0, p1) of a layer's weights packed for the forward pass: gates against k.
template <class CellType, class Real>
void pack_gates(const Sizes<CellType, Real>& s, const Real* w, int64_t H, int64_t K, Real* out, int64_t p0, int64_t p1) {
  constexpr int L = kLanes<Real>, across = CellType::kAcross * L;
  for (int64_t p = p0; p < p1; ++p)
    for (int v = 0; v < CellType::kAcross; ++v) {
      Real* to = out + p * K * across + v * L;
      const int64_t first = s.source(p, v, 0, H);
      if (first >= 0 && s.source(p, v, L - 1, H) >= 0) {
        for (int64_t k = 0; k < K; k += L) {
          const int64_t n = smaller(L, K - k);
          Vec<Real> tile[L];
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) tile[j] = load(w + (first + j) * K + k, n);
          transpose<Real>(tile);
          for (int64_t i = 0; i < n; ++i) store(to + (k + i) * across, tile[i]);
        }
        continue;
      }
      for (int j = 0; j < L; ++j) {
        const int64_t row = s.source(p, v, j, H);
        for (int64_t k = 0; k < K; ++k) to[k * across + j] = row < 0 ? Real(0) : w[row * K + k];
      }
    }
}

// The same for the backward pass: gates, in the order of δa, against panels of columns.
template <int NV = kWide, class CellType, class Real>
void pack_columns(const Sizes<CellType, Real>& s, const Real* w, int64_t H, int64_t columns, Real* out, int64_t p0, int64_t p1) {
  const int64_t wide = NV * s.L, padded = round_up(columns, wide);
  for (int64_t k = p0 * CellType::kAcross * s.L; k < p1 * CellType::kAcross * s.L; ++k) {
    const int64_t row = s.source_of(k, H);
    for (int64_t c = 0; c < padded; c += wide) {
      const int64_t n = row < 0 ? 0 : smaller(wide, columns - c);
      Real* to = out + (c / wide * s.width + k) * wide;
      if (n > 0) __builtin_memcpy(to, w + row * columns + c, static_cast<size_t>(n) * sizeof(Real));
      for (int64_t j = n; j < wide; ++j) to[j] = 0;
    }
  }
}

// A plain matrix w [rows, columns], transposed or not, in wide panels `[q][K, wide]`, for multiply_rows.
template <class Real>
void pack_plain(const Real* w, int64_t rows, int64_t columns, bool transposed, Real* out) {
  const int64_t wide = kWide * kLanes<Real>, K = transposed ? columns : rows, N = transposed ? rows : columns;
  for (int64_t n = 0; n < N; n += wide)
    for (int64_t k = 0; k < K; ++k) {
      Real* to = out + n * K + k * wide;
      const int64_t here = smaller(wide, N - n);
      if (transposed)
        for (int64_t j = 0; j < here; ++j) to[j] = w[(n + j) * columns + k];
      else
        __builtin_memcpy(to, w + k * columns + n, static_cast<size_t>(here) * sizeof(Real));
      for (int64_t j = here; j < wide; ++j) to[j] = 0;
    }
}

// Flushes subnormal numbers to zero within a scope: they are negligible here and can be a hundred times slower.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() {}
#endif
};

// Walks the steps in reading order, for a block of samples [first, first + rows).
template <class Real>
struct Walk {
  const Layer<Real>& l;
  int64_t first, rows;

  int64_t step(int64_t i) const { return l.reverse ? l.T - 1 - i : i; }
  int64_t active(int64_t t) const {
    if (l.lengths == nullptr) return rows;
    int64_t n = 0;
    while (n < rows && l.lengths[first + n] > t) ++n;
    return n;
  }
  int64_t before(int64_t t) const { return l.reverse ? t + 1 : t - 1; }
  // h and c of sample r of the block before step t; a stored c has `width` entries, the initial one H.
  const Real* h_before(int64_t t, int64_t r) const {
    return starts(t, r) ? l.h0 + (first + r) * l.R : l.y + (before(t) * l.B + first + r) * l.R;
  }
  const Real* c_before(int64_t t, int64_t r, int64_t width) const {
    return starts(t, r) ? l.c0 + (first + r) * l.H : cells(before(t), width) + r * width;
  }
  // The stored values of the block's samples at step t, `width` for each.
  Real* gates(int64_t t, int64_t width) const { return l.gates == l.y ? l.y + (t * l.B + first) * l.R : kept(l.gates, t, width); }
  Real* cells(int64_t t, int64_t width) const { return kept(l.cells, t, width); }
  Real* kept(Real* from, int64_t t, int64_t width) const { return from + (first * l.T + t * rows) * width; }
  // Whether step t is the first one read for sample r.
  bool starts(int64_t t, int64_t r) const {
    return l.reverse ? t + 1 >= (l.lengths == nullptr ? l.T : l.lengths[first + r]) : t == 0;
  }
};

template <class Real>
UV_INLINE void copy(Real* to, const Real* from, int64_t n) {
  __builtin_memcpy(to, from, static_cast<size_t>(n > 0 ? n : 0) * sizeof(Real));
}
template <class Real>
UV_INLINE void zero(Real* p, int64_t n) {
  __builtin_memset(p, 0, static_cast<size_t>(n > 0 ? n : 0) * sizeof(Real));
}

// The caller does work that is too short to be worth waking a thread.
UV_INLINE int threads_for(int64_t elements, int threads) { return elements < 65536 ? 1 : threads; }

// An arena: memory allocated piece by piece, each on its own cache lines. Without memory it only counts the size needed.
template <class Real>
struct Arena {
  Real* memory;
  int64_t size = 0;

  Real* take(int64_t count) {
    Real* here = memory == nullptr ? nullptr : memory + size;
    size += round_up(count, 64 / static_cast<int64_t>(sizeof(Real)));
    return here;
  }
};

}  // namespace
}  // namespace unvanish::UV_ISA
