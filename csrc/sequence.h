// One layer and direction over one sequence, forward and backward.
//
// The batch is cut into blocks by its size alone; a block runs the whole sequence on one thread, and gradients of weights are summed over
// the blocks in order. Within a block, chunks of steps keep what is worked on in the cache: the input's projection on the way forward,
// δa on the way back, which therefore never reaches main memory.

constexpr int64_t kChunkRows = 192;  // rows, steps times samples, of a chunk

// f(i) for i in [0, count), on up to `threads` threads.
template <class F>
void for_each(int64_t count, int threads, F f) {
  parallel_for(count, threads, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &f);
}

UV_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
UV_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class CellType, class Real>
struct Sizes {
  static constexpr int L = kLanes<Real>, kBlock = L * CellType::kUnits;
  int64_t Hp, panels, width, saved, Rp, Ip, dh_stride;
  int64_t blocks, block_rows, chunk_steps;

  explicit Sizes(const Layer<Real>& l) {
    Hp = round_up(l.H, kBlock);
    panels = Hp / kBlock;
    width = panels * CellType::kAcross * L;
    saved = panels * CellType::kSaved * L;
    Rp = round_up(l.R, kWide * L);
    Ip = round_up(l.I, kWide * L);
    dh_stride = round_up(l.H > l.R ? l.H : l.R, kWide * L);
    blocks = l.B <= 6 ? 1 : 2 * ((l.B + 31) / 32);
    block_rows = (l.B + blocks - 1) / blocks;
    chunk_steps = (kChunkRows + block_rows - 1) / block_rows;
  }

  // The row of torch's weight that vector v of panel p holds in lane j; −1 for padding.
  int64_t source(int64_t p, int v, int j, int64_t H) const {
    int64_t unit = CellType::kUnits == 1 ? p * L + j : (p * kWide + v) * L + j;
    int64_t gate = CellType::kUnits == 1 ? v : 0;
    return unit < H ? gate * H + unit : -1;
  }
};

// A layer's weights packed for the way forward: panels of gates against k.
template <class CellType, class Real>
void pack_gates(const Sizes<CellType, Real>& s, const Real* w, int64_t H, int64_t K, Real* out) {
  for (int64_t p = 0; p < s.panels; ++p)
    for (int v = 0; v < CellType::kAcross; ++v)
      for (int j = 0; j < s.L; ++j) {
        int64_t row = s.source(p, v, j, H);
        Real* column = out + p * K * CellType::kAcross * s.L + v * s.L + j;
        for (int64_t k = 0; k < K; ++k) column[k * CellType::kAcross * s.L] = row < 0 ? Real(0) : w[row * K + k];
      }
}

// And for the way back: gates, in the order in which δa lies, against wide panels of columns.
template <class CellType, class Real>
void pack_columns(const Sizes<CellType, Real>& s, const Real* w, int64_t H, int64_t columns, Real* out) {
  const int64_t wide = kWide * s.L, padded = round_up(columns, wide);
  for (int64_t p = 0; p < s.panels; ++p)
    for (int v = 0; v < CellType::kAcross; ++v)
      for (int j = 0; j < s.L; ++j) {
        int64_t row = s.source(p, v, j, H), k = (p * CellType::kAcross + v) * s.L + j;
        for (int64_t c = 0; c < padded; ++c)
          out[(c / wide * s.width + k) * wide + c % wide] = row < 0 || c >= columns ? Real(0) : w[row * columns + c];
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

template <class CellType, class Real>
class Forward {
 public:
  static constexpr int L = kLanes<Real>, A = CellType::kAcross;

  Forward(const Layer<Real>& layer, const Final<Real>& final, const Statistics* wanted)
      : l(layer),
        final_(final),
        wanted_(wanted),
        s(layer),
        w_ih_(s.panels * l.I * A * L),
        w_hh_(s.panels * l.R * A * L),
        w_hr_(l.w_hr == nullptr ? 1 : l.H * s.Rp),
        bias_(s.width),
        bias_q_(s.width),
        log_carry_(wanted == nullptr ? 1 : s.blocks * l.H) {
    pack_gates(s, l.w_ih, l.H, l.I, w_ih_.get());
    pack_gates(s, l.w_hh, l.H, l.R, w_hh_.get());
    if (l.w_hr != nullptr) pack_plain(l.w_hr, l.R, l.H, true, w_hr_.get());
    for (int64_t p = 0; p < s.panels; ++p)
      for (int v = 0; v < A; ++v)
        for (int j = 0; j < L; ++j) {
          int64_t row = s.source(p, v, j, l.H), k = (p * A + v) * L + j;
          Real ih = row < 0 || l.b_ih == nullptr ? Real(0) : l.b_ih[row];
          Real hh = row < 0 || l.b_hh == nullptr ? Real(0) : l.b_hh[row];
          bool apart = CellType::kSplit && v == N;
          bias_.get()[k] = apart ? ih : ih + hh;
          bias_q_.get()[k] = apart ? hh : Real(0);
        }
  }

  void block(int64_t number) const {
    if (wanted_ == nullptr) return run(number, nullptr);
    const Tally<CellType, Real> tally(*wanted_, l.H, s.Hp, s.saved);
    run(number, &tally);
  }

  int64_t blocks() const { return s.blocks; }

  // Adds the blocks' share of the statistics in order.
  void gather() const {
    if (wanted_ == nullptr || CellType::kCarry < 0) return;
    for (int64_t k = 0; k < l.H; ++k) {
      double total = 0;
      for (int64_t b = 0; b * s.block_rows < l.B; ++b) total += log_carry_.get()[b * l.H + k];
      wanted_->log_carry[k] = total;
    }
  }

 private:
  void run(int64_t number, const Tally<CellType, Real>* tally) const {
    FlushSubnormals flush;
    const int64_t first = number * s.block_rows, rows = smaller(s.block_rows, l.B - first);
    if (rows <= 0) return;
    const Walk<Real> walk{l, first, rows};
    Scratch<Real> projected(s.chunk_steps * rows * s.width), now(rows * l.R), next(rows * s.Hp), cell(rows * s.Hp);
    for (int64_t r = 0; r < rows; ++r) {
      copy(now.get() + r * l.R, l.h0 + (first + r) * l.R, l.R);
      if (CellType::kHasC) copy_padded(cell.get() + r * s.Hp, l.c0 + (first + r) * l.H, l.H, s.Hp);
    }
    for (int64_t i0 = 0; i0 < l.T; i0 += s.chunk_steps) {
      const int64_t i1 = smaller(i0 + s.chunk_steps, l.T);
      project(walk, i0, i1, projected.get());
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t t = walk.step(i), n = walk.active(t);
        step(walk, t, n, projected.get() + (i - i0) * rows * s.width, now.get(), next.get(), cell.get());
        if (tally != nullptr) tally->add(l.gates + (t * l.B + first) * s.saved, t * l.B + first, n);
        Real* y = l.y + (t * l.B + first) * l.R;
        if (l.w_hr == nullptr)
          for (int64_t r = 0; r < n; ++r) copy(y + r * l.R, next.get() + r * s.Hp, l.R);
        else
          multiply_rows(next.get(), s.Hp, n, w_hr_.get(), l.H, y, l.R, l.R);
        for (int64_t k = 0; k < n * l.R; ++k) now.get()[k] = y[k];
        for (int64_t k = n * l.R; k < rows * l.R; ++k) y[k] = 0;
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      copy(final_.h + (first + r) * l.R, now.get() + r * l.R, l.R);
      if (CellType::kHasC) copy(final_.c + (first + r) * l.H, cell.get() + r * s.Hp, l.H);
    }
    if (tally != nullptr && CellType::kCarry >= 0) tally->finish(log_carry_.get() + number * l.H);
  }

  static void copy(Real* to, const Real* from, int64_t n) { __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(Real)); }
  static void copy_padded(Real* to, const Real* from, int64_t n, int64_t padded) {
    copy(to, from, n);
    for (int64_t k = n; k < padded; ++k) to[k] = 0;
  }

  void project(const Walk<Real>& walk, int64_t i0, int64_t i1, Real* out) const {
    for (int64_t p = 0; p < s.panels; ++p) {
      const Real* panel = w_ih_.get() + p * l.I * A * L;
      Vec<Real> bias[A];
      for (int v = 0; v < A; ++v) bias[v] = load(bias_.get() + (p * A + v) * L);
      for (int64_t i = i0; i < i1; ++i) {
        const int64_t t = walk.step(i);
        const Real* x = l.x + (t * l.B + walk.first) * l.I;
        Real* here = out + (i - i0) * walk.rows * s.width + p * A * L;
        for_tiles(walk.active(t), [&](auto tile, int64_t r0) {
          constexpr int M = decltype(tile)::value;
          Vec<Real> acc[M][A];
          for (int r = 0; r < M; ++r)
            for (int v = 0; v < A; ++v) acc[r][v] = bias[v];
          multiply<Real, M, A>(acc, x + r0 * l.I, l.I, panel, l.I);
          for (int r = 0; r < M; ++r)
            for (int v = 0; v < A; ++v) store(here + (r0 + r) * s.width + v * L, acc[r][v]);
        });
      }
    }
  }

  void step(const Walk<Real>& walk, int64_t t, int64_t n, const Real* projected, const Real* now, Real* next,
            Real* cell) const {
    Real* gates = l.gates == nullptr ? nullptr : l.gates + (t * l.B + walk.first) * s.saved;
    Real* cells = l.cells == nullptr ? nullptr : l.cells + (t * l.B + walk.first) * s.Hp;
    for (int64_t p = 0; p < s.panels; ++p) {
      const Real* panel = w_hh_.get() + p * l.R * A * L;
      for_tiles(n, [&](auto tile, int64_t r0) {
        constexpr int M = decltype(tile)::value;
        Vec<Real> acc[M][A];
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < A; ++v)
            acc[r][v] = CellType::kSplit ? load(bias_q_.get() + (p * A + v) * L)
                                         : load(projected + (r0 + r) * s.width + (p * A + v) * L);
        multiply<Real, M, A>(acc, now + r0 * l.R, l.R, panel, l.R);
        for (int r = 0; r < M; ++r) {
          const int64_t row = r0 + r;
          Vec<Real> a[A];
          if (CellType::kSplit)
            for (int v = 0; v < A; ++v) a[v] = load(projected + row * s.width + (p * A + v) * L);
          for (int u = 0; u < CellType::kUnits; ++u) {
            const int64_t unit = (p * CellType::kUnits + u) * L;
            Vec<Real> saved[4], c{}, c_prev{}, h_prev{};
            if (CellType::kHasC) c_prev = load(cell + row * s.Hp + unit);
            if (CellType::kSplit && unit < l.H) h_prev = load(now + row * l.R + unit, l.H - unit);
            Vec<Real> h = CellType::template forward<Real>(CellType::kSplit ? a : acc[r] + u, acc[r], c_prev, saved, c, h_prev);
            store(next + row * s.Hp + unit, h);
            if (CellType::kHasC) store(cell + row * s.Hp + unit, c);
            if (cells != nullptr) store(cells + row * s.Hp + unit, c);
            if (gates != nullptr) {
              constexpr int kept = CellType::kSaved / CellType::kUnits;
              for (int v = 0; v < kept; ++v) store(gates + row * s.saved + (p * CellType::kSaved + u * kept + v) * L, saved[v]);
            }
          }
        }
      });
    }
  }

  const Layer<Real>& l;
  const Final<Real>& final_;
  const Statistics* wanted_;
  const Sizes<CellType, Real> s;
  Scratch<Real> w_ih_, w_hh_, w_hr_, bias_, bias_q_;
  Scratch<double> log_carry_;  // [blocks, H]
};
