// One layer and direction over one sequence, forward and backward.
//
// The batch is cut into blocks by its size alone, and gradients of weights are summed over the blocks in order. A block runs the whole
// sequence: on one thread, or, where there are more threads than blocks, on a team that shares out its hidden units and meets once a step.
// Within a block, chunks of steps keep what is worked on in the cache: the input's projection on the way forward, δa on the way back,
// which therefore never reaches main memory.

constexpr int64_t kForwardRows = 96, kBackwardRows = 192;  // rows, steps times samples, of a chunk

// f(i) for i in [0, count), on up to `threads` threads.
template <class F>
void for_each(int64_t count, int threads, F f) {
  parallel_for(count, threads, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &f);
}

// One of the threads that work on a block together.
struct Member {
  int number, of;
  Barrier* barrier;

  bool leads() const { return number == 0; }
  void meet() const {
    if (of > 1) unvanish::meet(barrier, of);
  }
  // Its part of [0, count).
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
  together(
      static_cast<int>(wanted), threads,
      [](void* context, int member, int members) {
        Run& run = *static_cast<Run*>(context);
        if (members <= run.blocks || run.most <= 1) {
          for (int64_t b = take(&run.next); b < run.blocks; b = take(&run.next)) run.f(b, member, Member{0, 1, nullptr});
          return;
        }
        // OpenMP may grant any number up to the one asked for, and some may find no place in a team.
        const int64_t b = member % run.blocks, in_team = (members - b + run.blocks - 1) / run.blocks;
        const int of = static_cast<int>(in_team < run.most ? in_team : run.most), number = member / static_cast<int>(run.blocks);
        if (number < of) run.f(b, static_cast<int>(b), Member{number, of, run.barriers + b});
      },
      &run);
}

UV_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
UV_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class CellType, class Real>
struct Sizes {
  static constexpr int L = kLanes<Real>, kBlock = L * CellType::kUnits;
  static constexpr int64_t kMostRows = 16;  // of a block
  int64_t Hp, panels, width, saved, Rp, Ip, dh_stride;
  int64_t blocks, block_rows;
  int64_t team;  // members between whom a block's hidden units are worth sharing out

  explicit Sizes(const Layer<Real>& l) {
    Hp = round_up(l.H, kBlock);
    panels = Hp / kBlock;
    width = panels * CellType::kAcross * L;
    saved = panels * CellType::kSaved * L;
    Rp = round_up(l.R, kWide * L);
    Ip = round_up(l.I, kWide * L);
    dh_stride = round_up(l.H > l.R ? l.H : l.R, kWide * L);
    blocks = l.B <= 6 ? 1 : 2 * ((l.B + 2 * kMostRows - 1) / (2 * kMostRows));
    block_rows = (l.B + blocks - 1) / blocks;
    // A meeting takes as long as some thousand multiplications.
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
  // And that of a place among the gates of a sample.
  int64_t source_of(int64_t k, int64_t H) const {
    return source(k / (CellType::kAcross * L), static_cast<int>(k / L % CellType::kAcross), static_cast<int>(k % L), H);
  }
};

// Panels [p0, p1) of a layer's weights packed for the way forward: gates against k.
template <class CellType, class Real>
void pack_gates(const Sizes<CellType, Real>& s, const Real* w, int64_t H, int64_t K, Real* out, int64_t p0, int64_t p1) {
  constexpr int L = kLanes<Real>, across = CellType::kAcross * L;
  for (int64_t p = p0; p < p1; ++p)
    for (int v = 0; v < CellType::kAcross; ++v) {
      Real* to = out + p * K * across + v * L;
      const int64_t first = s.source(p, v, 0, H);
      if (first >= 0 && s.source(p, v, L - 1, H) >= 0) {
        const Real* from = w + first * K;
        for (int64_t k = 0; k < K; ++k)
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) to[k * across + j] = from[j * K + k];
        continue;
      }
      for (int j = 0; j < L; ++j) {
        const int64_t row = s.source(p, v, j, H);
        for (int64_t k = 0; k < K; ++k) to[k * across + j] = row < 0 ? Real(0) : w[row * K + k];
      }
    }
}

// And for the way back: gates, in the order in which δa lies, against wide panels of columns.
template <class CellType, class Real>
void pack_columns(const Sizes<CellType, Real>& s, const Real* w, int64_t H, int64_t columns, Real* out, int64_t p0, int64_t p1) {
  const int64_t wide = kWide * s.L, padded = round_up(columns, wide);
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
  for (int64_t n = 0; n < round_up(N, wide); ++n)
    for (int64_t k = 0; k < K; ++k) {
      Real value = n >= N ? Real(0) : transposed ? w[n * columns + k] : w[k * columns + n];
      out[(n / wide * K + k) * wide + n % wide] = value;
    }
}

// Flushes subnormal numbers to zero for a scope: they mean nothing here and can cost a hundredfold.
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
  // Where sample r of the block stood before step t, in an array [T, B, width] of states or in the initial one.
  const Real* before(const Real* states, const Real* initial, int64_t width, int64_t initial_width, int64_t t,
                     int64_t r) const {
    int64_t b = first + r;
    bool starts = l.reverse ? t + 1 >= (l.lengths == nullptr ? l.T : l.lengths[b]) : t == 0;
    return starts ? initial + b * initial_width : states + ((l.reverse ? t + 1 : t - 1) * l.B + b) * width;
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

// Work too short to wake a thread for is done by the caller.
UV_INLINE int threads_for(int64_t elements, int threads) { return elements < 65536 ? 1 : threads; }

// Memory handed out piece by piece, each on cache lines of its own.
template <class Real>
struct Carve {
  Real* memory;
  int64_t size = 0;

  Real* take(int64_t count) {
    Real* here = memory == nullptr ? nullptr : memory + size;
    size += round_up(count, 64 / static_cast<int64_t>(sizeof(Real)));
    return here;
  }
};

template <class CellType, class Real>
class Forward {
 public:
  static constexpr int L = kLanes<Real>, A = CellType::kAcross;

  Forward(const Layer<Real>& layer, const Final<Real>& final, const Statistics* wanted, int threads)
      : l(layer),
        final_(final),
        wanted_(wanted),
        s(layer),
        chunk_steps_(smaller(s.steps(kForwardRows), l.T)),
        slots_(s.blocks < threads ? s.blocks : threads),
        w_ih_(s.panels * l.I * A * L),
        w_hh_(s.panels * l.R * A * L),
        w_hr_(l.w_hr == nullptr ? 1 : l.H * s.Rp),
        bias_(s.width),
        bias_q_(s.width),
        memory_(slots_ * Work(*this, nullptr).size),
        log_carry_(wanted == nullptr ? 1 : s.blocks * l.H) {
    for_each(s.panels, threads_for(s.width * (l.I + l.R), threads), [&](int64_t p) {
      pack_gates(s, l.w_ih, l.H, l.I, w_ih_.get(), p, p + 1);
      pack_gates(s, l.w_hh, l.H, l.R, w_hh_.get(), p, p + 1);
    });
    if (l.w_hr != nullptr) pack_plain(l.w_hr, l.R, l.H, true, w_hr_.get());
    for (int64_t k = 0; k < s.width; ++k) {
      const int64_t row = s.source_of(k, l.H);
      const Real ih = row < 0 || l.b_ih == nullptr ? Real(0) : l.b_ih[row];
      const Real hh = row < 0 || l.b_hh == nullptr ? Real(0) : l.b_hh[row];
      const bool apart = CellType::kSplit && k / L % A == N;
      bias_.get()[k] = apart ? ih : ih + hh;
      bias_q_.get()[k] = apart ? hh : Real(0);
    }
  }

  void run(int threads) const {
    for_blocks(s.blocks, threads, s.team, [&](int64_t number, int slot, Member me) {
      const int64_t first = number * s.block_rows, rows = smaller(s.block_rows, l.B - first);
      if (rows > 0) block(number, Walk<Real>{l, first, rows}, Work(*this, memory_.get() + slot * Work(*this, nullptr).size), me);
    });
    gather();
  }

 private:
  // What a block works with.
  struct Work : Carve<Real> {
    Work(const Forward& run, Real* memory) : Carve<Real>{memory} {
      const Sizes<CellType, Real>& s = run.s;
      const int64_t rows = s.block_rows, most = run.chunk_steps_ * rows;
      now = this->take(rows * s.Rp);
      next = this->take(rows * s.Rp);
      m = run.l.w_hr == nullptr ? nullptr : this->take(rows * s.Hp);
      cell = this->take(rows * s.Hp);
      x = this->take(most * run.l.I);
      projected = this->take(most * s.width);
      partial_size = round_up(most * kWide * L, 16);
      partial = this->take(partial_size * (s.team > 1 ? s.team : 1));
    }

    Real *now, *next;  // [rows, Rp] h_{t−1}, h_t
    Real *m, *cell;    // [rows, Hp] o ⊙ tanh c before the projection, c
    Real *x;           // [chunk rows, I]
    Real *projected;   // [chunk rows, width]
    Real *partial;     // a member's sums of products
    int64_t partial_size;
  };

  // Adds the blocks' share of the statistics in order.
  void gather() const {
    if (wanted_ == nullptr || CellType::kCarry < 0) return;
    for (int64_t k = 0; k < l.H; ++k) {
      double total = 0;
      for (int64_t b = 0; b * s.block_rows < l.B; ++b) total += log_carry_.get()[b * l.H + k];
      wanted_->log_carry[k] = total;
    }
  }

  void block(int64_t number, const Walk<Real>& walk, Work w, const Member& me) const {
    FlushSubnormals flush;
    if (wanted_ == nullptr || !me.leads()) return steps(walk, w, me, nullptr);
    const Tally<CellType, Real> tally(*wanted_, l.H, s.Hp, s.saved);
    steps(walk, w, me, &tally);
    if (CellType::kCarry >= 0) tally.finish(log_carry_.get() + number * l.H);
  }

  void steps(const Walk<Real>& walk, Work& w, const Member& me, const Tally<CellType, Real>* tally) const {
    const int64_t first = walk.first, rows = walk.rows;
    w.partial += me.number * w.partial_size;
    if (me.leads()) {
      zero(w.now, w.next + rows * s.Rp - w.now);
      for (int64_t r = 0; r < rows; ++r) {
        copy(w.now + r * s.Rp, l.h0 + (first + r) * l.R, l.R);
        if (CellType::kHasC) {
          copy(w.cell + r * s.Hp, l.c0 + (first + r) * l.H, l.H);
          zero(w.cell + r * s.Hp + l.H, s.Hp - l.H);
        }
      }
    }
    for (int64_t i0 = 0; i0 < l.T; i0 += chunk_steps_) {
      const int64_t i1 = smaller(i0 + chunk_steps_, l.T);
      const int64_t filled = take_in(walk, i0, i1, w, me);
      me.meet();
      project(filled, w, me);
      Real* projected = w.projected;
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t t = walk.step(i), n = walk.active(t);
        step(walk, t, n, projected, w, me);
        projected += n * s.width;
        me.meet();
        if (tally != nullptr) tally->add(l.gates + (t * l.B + first) * s.saved, t * l.B + first, n);
        if (me.leads()) zero(l.y + (t * l.B + first + n) * l.R, (rows - n) * l.R);
        Real* before = w.now;
        w.now = w.next;
        w.next = before;
      }
    }
    if (!me.leads()) return;
    for (int64_t r = 0; r < rows; ++r) {
      copy(final_.h + (first + r) * l.R, w.now + r * s.Rp, l.R);
      if (CellType::kHasC) copy(final_.c + (first + r) * l.H, w.cell + r * s.Hp, l.H);
    }
  }

  // The active samples' inputs of steps [i0, i1), one after the other; how many there are.
  int64_t take_in(const Walk<Real>& walk, int64_t i0, int64_t i1, const Work& w, const Member& me) const {
    int64_t filled = 0;
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t t = walk.step(i), n = walk.active(t);
      if (i % me.of == me.number) copy(w.x + filled * l.I, l.x + (t * l.B + walk.first) * l.I, n * l.I);
      filled += n;
    }
    return filled;
  }

  void project(int64_t filled, const Work& w, const Member& me) const {
    const Rows<Real> x{w.x, l.I};
    for (int64_t p = me.from(s.panels); p < me.to(s.panels); ++p)
      product<A>(
          x, 0, filled, w_ih_.get() + p * l.I * A * L, l.I, w.partial,
          [&](int64_t, auto& acc) {
            for (auto& row : acc)
              for (int v = 0; v < A; ++v) row[v] = load(bias_.get() + (p * A + v) * L);
          },
          [&](int64_t r0, auto& acc) {
            Real* to = w.projected + r0 * s.width + p * A * L;
            for (auto& row : acc) {
              for (int v = 0; v < A; ++v) store(to + v * L, row[v]);
              to += s.width;
            }
          });
  }

  void step(const Walk<Real>& walk, int64_t t, int64_t n, const Real* projected, const Work& w, const Member& me) const {
    const int64_t at = t * l.B + walk.first;
    Real* gates = l.gates == nullptr ? nullptr : l.gates + at * s.saved;
    Real* cells = l.cells == nullptr ? nullptr : l.cells + at * s.Hp;
    Real* y = l.y + at * l.R;
    const Rows<Real> now{w.now, s.Rp};
    const bool whole = l.w_hr == nullptr;
    for (int64_t p = me.from(s.panels); p < me.to(s.panels); ++p)
      product<A>(
          now, 0, n, w_hh_.get() + p * l.R * A * L, l.R, w.partial,
          [&](int64_t r0, auto& acc) {
            for (auto& row : acc) {
              for (int v = 0; v < A; ++v)
                row[v] = CellType::kSplit ? load(bias_q_.get() + (p * A + v) * L) : load(projected + r0 * s.width + (p * A + v) * L);
              ++r0;
            }
          },
          [&](int64_t row, auto& acc) {
            for (auto& sums : acc) {
              Vec<Real> a[A];
              if (CellType::kSplit)
                for (int v = 0; v < A; ++v) a[v] = load(projected + row * s.width + (p * A + v) * L);
              for (int u = 0; u < CellType::kUnits; ++u) {
                const int64_t unit = (p * CellType::kUnits + u) * L;
                Vec<Real> saved[4], c{}, c_prev{}, h_prev{};
                if (CellType::kHasC) c_prev = load(w.cell + row * s.Hp + unit);
                if (CellType::kSplit) h_prev = load(w.now + row * s.Rp + unit);
                const Vec<Real> h = CellType::template forward<Real>(CellType::kSplit ? a : sums + u, sums, c_prev, saved, c, h_prev);
                if (whole) {
                  store(w.next + row * s.Rp + unit, h);
                  if (unit < l.R) store(y + row * l.R + unit, h, l.R - unit);
                } else {
                  store(w.m + row * s.Hp + unit, h);
                }
                if (CellType::kHasC) store(w.cell + row * s.Hp + unit, c);
                if (cells != nullptr) store(cells + row * s.Hp + unit, c);
                if (gates != nullptr) {
                  constexpr int kept = CellType::kSaved / CellType::kUnits;
                  for (int v = 0; v < kept; ++v) store(gates + row * s.saved + (p * CellType::kSaved + u * kept + v) * L, saved[v]);
                }
              }
              ++row;
            }
          });
    const int64_t wide = kWide * L, q0 = me.from(s.Rp / wide), q1 = me.to(s.Rp / wide);
    if (!whole) {
      me.meet();
      multiply_rows(Rows<Real>{w.m, s.Hp}, 0, n, w_hr_.get(), l.H, q0, q1, l.R, w.partial, [&](int64_t r) { return y + r * l.R; });
      for (int64_t r = 0; r < n; ++r) copy(w.next + r * s.Rp + q0 * wide, y + r * l.R + q0 * wide, smaller(q1 * wide, l.R) - q0 * wide);
    }
    // Samples that have no such step keep their state.
    const int64_t from = whole ? me.from(s.panels) * s.kBlock : q0 * wide, to = whole ? me.to(s.panels) * s.kBlock : q1 * wide;
    for (int64_t r = n; r < walk.rows; ++r) copy(w.next + r * s.Rp + from, w.now + r * s.Rp + from, to - from);
  }

  const Layer<Real>& l;
  const Final<Real>& final_;
  const Statistics* wanted_;
  const Sizes<CellType, Real> s;
  const int64_t chunk_steps_, slots_;
  Scratch<Real> w_ih_, w_hh_, w_hr_, bias_, bias_q_, memory_;
  Scratch<double> log_carry_;  // [blocks, H]
};
