// The way back: δ from the last step read to the first, and the gradients of everything.

template <class CellType, class Real>
class Backward {
 public:
  static constexpr int L = kLanes<Real>, A = CellType::kAcross;

  Backward(const Layer<Real>& layer, const Gradients<Real>& gradients, const Norms* norms)
      : l(layer),
        g(gradients),
        norms_(norms),
        s(layer),
        w_hh_(s.width * s.Rp),
        w_ih_(g.dx == nullptr ? 1 : s.width * s.Ip),
        w_hr_(l.w_hr == nullptr ? 1 : l.R * s.dh_stride),
        partial_(s.blocks * per_block()) {
    pack_columns(s, l.w_hh, l.H, l.R, w_hh_.get());
    if (g.dx != nullptr) pack_columns(s, l.w_ih, l.H, l.I, w_ih_.get());
    if (l.w_hr != nullptr) pack_plain(l.w_hr, l.R, l.H, false, w_hr_.get());
  }

  int64_t blocks() const { return s.blocks; }

  // A whole block on its own.
  void block(int64_t number) const {
    Scratch<Real> memory(Work(*this, nullptr).size);
    Work w(*this, memory.get());
    begin(number, w);
    for (int64_t i1 = l.T; i1 > 0; i1 -= s.chunk_steps) chunk(number, i1 - smaller(i1, s.chunk_steps), i1, 0, w);
    end(number, w);
  }

  // All blocks side by side, so that g_t, to which all samples contribute, can be measured as they go. One round of tasks is a chunk of
  // every block, then the steps of the chunk before, each to be measured. Tasks are taken in order and wait only for earlier ones, so
  // that any number of threads gets through.
  void in_step(int threads) const {
    const int64_t chunks = (l.T + s.chunk_steps - 1) / s.chunk_steps, size = Work(*this, nullptr).size;
    Scratch<Real> memory(s.blocks * size);
    Scratch<int64_t> done(s.blocks), measured(chunks);  // chunks of each block, steps of each chunk
    for (int64_t b = 0; b < s.blocks; ++b) done.get()[b] = 0;
    for (int64_t c = 0; c < chunks; ++c) measured.get()[c] = 0;
    const auto end_of = [&](int64_t c) { return l.T - c * s.chunk_steps; };
    const auto start_of = [&](int64_t c) { return end_of(c) > s.chunk_steps ? end_of(c) - s.chunk_steps : 0; };
    const auto work = [&](int64_t b) { return Work(*this, memory.get() + b * size); };
    const int64_t round = s.blocks + s.chunk_steps;
    for_each((chunks + 1) * round, threads, [&](int64_t task) {
      const int64_t c = task / round, b = task % round;
      if (b < s.blocks) {
        if (c == chunks) return;
        wait_for(done.get() + b, c);
        // The memory of two chunks is used in turn.
        if (c >= 2) wait_for(measured.get() + c - 2, s.chunk_steps);
        if (c == 0) begin(b, work(b));
        chunk(b, start_of(c), end_of(c), c % kChunksHeld, work(b));
        if (c == chunks - 1) end(b, work(b));
        signal(done.get() + b);
      } else if (c > 0) {
        const int64_t i = end_of(c - 1) - 1 - (b - s.blocks);
        if (i < start_of(c - 1)) return;
        for (int64_t each = 0; each < s.blocks; ++each) wait_for(done.get() + each, c);
        measure(i, end_of(c - 1), (c - 1) % kChunksHeld, work);
        signal(measured.get() + c - 1);
      }
    });
  }

  // Adds the blocks' sums in order and puts them where torch wants them; row is one of s.width.
  void gather(int64_t row) const {
    const int64_t p = row / (A * L), v = row / L % A, j = row % L, to = s.source(p, static_cast<int>(v), static_cast<int>(j), l.H);
    if (to < 0) return;
    add_blocks(dw_ih() + row * s.Ip, g.dw_ih + to * l.I, l.I);
    add_blocks(dw_hh() + row * s.Rp, g.dw_hh + to * l.R, l.R);
    if (g.db_ih != nullptr) add_blocks(db_ih() + row, g.db_ih + to, 1);
    if (g.db_hh != nullptr) add_blocks((CellType::kSplit ? db_hh() : db_ih()) + row, g.db_hh + to, 1);
  }

  void gather_projection() const {
    if (l.w_hr == nullptr) return;
    for (int64_t r = 0; r < l.R; ++r) add_blocks(dw_hr() + r * s.dh_stride, g.dw_hr + r * l.H, l.H);
  }

  int64_t gathered() const { return s.width; }

 private:
  static constexpr int64_t kChunksHeld = 2;  // where blocks go in step: one worked on, one measured

  // What a block works with, carved from one piece of memory.
  struct Work {
    Work(const Backward& run, Real* memory) {
      const Sizes<CellType, Real>& s = run.s;
      const bool projected = run.l.w_hr != nullptr;
      const int64_t rows = s.block_rows, most = s.chunk_steps * rows * (run.norms_ == nullptr ? 1 : kChunksHeld);
      auto take = [&](int64_t count) {
        Real* here = memory + size;
        size += round_up(count, L);
        return here;
      };
      carried = take(rows * s.dh_stride);
      dh = take(rows * s.dh_stride);
      dm = take(rows * s.dh_stride);
      dc = take(rows * s.Hp);
      h_prev = take(most * s.Rp);
      x = take(most * s.Ip);
      da = take(most * s.width);
      da_hh = CellType::kSplit ? take(most * s.width) : da;
      m = projected ? take(most * s.dh_stride) : nullptr;
      projected_dh = projected ? take(most * s.Rp) : nullptr;
    }

    Real *carried;           // [rows, dh_stride] what δh_{t−1} gets from step t
    Real *dh;                // [rows, dh_stride] δh_t
    Real *dm;                // [rows, dh_stride] δh_t before the projection
    Real *dc;                // [rows, Hp] what c gets from later steps
    Real *h_prev, *x;        // [chunk rows, Rp], [chunk rows, Ip]
    Real *da, *da_hh;        // [chunk rows, width]
    Real *m, *projected_dh;  // [chunk rows, dh_stride], [chunk rows, Rp]
    int64_t size = 0;
  };

  Walk<Real> walk(int64_t number) const {
    const int64_t first = number * s.block_rows;
    return {l, first, smaller(s.block_rows, l.B - first)};
  }
  Real* sums_of(int64_t number) const { return partial_.get() + number * per_block(); }

  void begin(int64_t number, const Work& w) const {
    __builtin_memset(sums_of(number), 0, static_cast<size_t>(per_block()) * sizeof(Real));
    const Walk<Real> walk = this->walk(number);
    // The padding, and what is added to.
    __builtin_memset(w.carried, 0, static_cast<size_t>(w.da - w.carried) * sizeof(Real));
    if (l.w_hr != nullptr) __builtin_memset(w.m, 0, static_cast<size_t>(w.projected_dh - w.m) * sizeof(Real));
    for (int64_t r = 0; r < walk.rows; ++r) {
      if (g.dhn != nullptr) copy(w.carried + r * s.dh_stride, g.dhn + (walk.first + r) * l.R, l.R);
      if (CellType::kHasC && g.dcn != nullptr) copy(w.dc + r * s.Hp, g.dcn + (walk.first + r) * l.H, l.H);
    }
  }

  void end(int64_t number, const Work& w) const {
    const Walk<Real> walk = this->walk(number);
    for (int64_t r = 0; r < walk.rows; ++r) {
      copy(g.dh0 + (walk.first + r) * l.R, w.carried + r * s.dh_stride, l.R);
      if (CellType::kHasC) copy(g.dc0 + (walk.first + r) * l.H, w.dc + r * s.Hp, l.H);
    }
  }

  int64_t dw_ih() const { return 0; }
  int64_t dw_hh() const { return s.width * s.Ip; }
  int64_t db_ih() const { return dw_hh() + s.width * s.Rp; }
  int64_t db_hh() const { return db_ih() + s.width; }
  int64_t dw_hr() const { return db_hh() + s.width; }
  int64_t per_block() const { return dw_hr() + (l.w_hr == nullptr ? 0 : round_up(l.R, 1) * s.dh_stride); }

  static void copy(Real* to, const Real* from, int64_t n) { __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(Real)); }
  static void zero(Real* p, int64_t n) { __builtin_memset(p, 0, static_cast<size_t>(n) * sizeof(Real)); }

  void add_blocks(int64_t at, Real* out, int64_t n) const {
    for (int64_t k = 0; k < n; ++k) {
      Real total = partial_.get()[at + k];
      for (int64_t b = 1; b < s.blocks; ++b) total += partial_.get()[b * per_block() + at + k];
      out[k] = total;
    }
  }

  // Steps [i0, i1) backwards; `part` says which of the chunks held.
  void chunk(int64_t number, int64_t i0, int64_t i1, int64_t part, const Work& work) const {
    FlushSubnormals flush;
    const Walk<Real> walk = this->walk(number);
    if (walk.rows <= 0) return;
    const int64_t skipped = part * s.chunk_steps * s.block_rows;
    Work w = work;
    w.da += skipped * s.width;
    w.da_hh += skipped * s.width;
    w.h_prev += skipped * s.Rp;
    w.x += skipped * s.Ip;
    if (l.w_hr != nullptr) {
      w.m += skipped * s.dh_stride;
      w.projected_dh += skipped * s.Rp;
    }
    int64_t filled = 0;
    for (int64_t i = i1 - 1; i >= i0; --i) {
      const int64_t t = walk.step(i), n = walk.active(t);
      Real* da = w.da + filled * s.width;
      Real* da_hh = CellType::kSplit ? w.da_hh + filled * s.width : da;
      if (norms_ == nullptr) step<false>(walk, t, n, filled, w, da, da_hh);
      else step<true>(walk, t, n, filled, w, da, da_hh);
      if (g.dx != nullptr) {
        Real* dx = g.dx + (t * l.B + walk.first) * l.I;
        multiply_rows(da, s.width, n, w_ih_.get(), s.width, dx, l.I, l.I);
        zero(dx + n * l.I, (walk.rows - n) * l.I);
      }
      filled += n;
    }
    Real* sums = sums_of(number);
    add_outer(w.da, s.width, w.x, s.Ip, filled, sums + dw_ih());
    add_outer(w.da_hh, s.width, w.h_prev, s.Rp, filled, sums + dw_hh());
    add_rows(w.da, filled, sums + db_ih());
    if (CellType::kSplit) add_rows(w.da_hh, filled, sums + db_hh());
    if (l.w_hr != nullptr) add_outer_any(w.projected_dh, l.R, s.Rp, w.m, s.dh_stride, filled, sums + dw_hr());
  }

  // ‖g_t‖_F of step i of a chunk that ends before i1, kept as `part` of the blocks' work, by the Gram identity ‖Σ_b u_bᵀ v_b‖² = Σ_{b,b'} (u_b · u_b')(v_b · v_b').
  template <class WorkOf>
  void measure(int64_t i, int64_t i1, int64_t part, const WorkOf& work) const {
    const Walk<Real> all_samples{l, 0, l.B};
    const int64_t t = all_samples.step(i), n = all_samples.active(t), padded = round_up(n, kGroup);
    double largest = 0;
    for (int64_t b = 0; b < n; ++b) {
      double square = 0;
      for (int v = 0; v < CellType::kGates; ++v) square += __builtin_pow(norms_->a[(t * l.B + b) * CellType::kGates + v], 2);
      if (!(square <= largest)) largest = square;
    }
    largest = __builtin_sqrt(largest);
    if (!(largest > 0) || largest > __DBL_MAX__) {
      norms_->w[t] = largest;
      return;
    }
    // A power of two brings δ to about 1: its squares could leave Real's range.
    int exponent = 0;
    __builtin_frexp(largest, &exponent);
    const Real scale = static_cast<Real>(__builtin_ldexp(1.0, exponent > kFar ? -kFar : exponent < -kFar ? kFar : -exponent));
    // The GRU's δa with respect to W_ih x and to W_hh h differ in the candidate alone.
    const int64_t apart = CellType::kSplit ? s.Hp : 0, common = s.width - apart;
    Scratch<Real> packed(padded * (common + 2 * apart + s.Rp + s.Ip));
    Real *u = packed.get(), *u_x = u + padded * common, *u_h = u_x + padded * apart, *h = u_h + padded * apart, *x = h + padded * s.Rp;
    if (padded > n) zero(u, padded * (common + 2 * apart + s.Rp + s.Ip));
    for (int64_t number = 0; number * s.block_rows < n; ++number) {
      const Walk<Real> walk = this->walk(number);
      const Work w = work(number);
      int64_t row = part * s.chunk_steps * s.block_rows;
      for (int64_t j = i1 - 1; j > i; --j) row += walk.active(walk.step(j));
      for (int64_t r = 0; r < walk.active(t); ++r, ++row) {
        const int64_t b = walk.first + r;
        const Real *da = w.da + row * s.width, *da_hh = w.da_hh + row * s.width;
        if constexpr (CellType::kSplit) {
          for (int64_t p = 0; p < s.panels; ++p) {
            interleave(da + p * A * L, b, N * L, scale, u, common, p * N * L);
            interleave(da + (p * A + N) * L, b, L, scale, u_x, apart, p * L);
            interleave(da_hh + (p * A + N) * L, b, L, scale, u_h, apart, p * L);
          }
        } else {
          interleave(da, b, common, scale, u, common, 0);
        }
        interleave(w.h_prev + row * s.Rp, b, s.Rp, Real(1), h, s.Rp, 0);
        interleave(w.x + row * s.Ip, b, s.Ip, Real(1), x, s.Ip, 0);
      }
    }
    Vec<Real> total{};
    for (int64_t a = 0; a < padded; a += kGroup)
      for (int64_t b = a; b < padded; b += kGroup)
        for (int r = 0; r < kGroup; r += kRows) {
          Vec<Real> us[L] = {}, xs[L] = {}, pairs;
          add_products(u, a, b, r, common, us);
          add_products(x, a, b, r, s.Ip, xs);
          if constexpr (CellType::kSplit) {
            Vec<Real> hs[L] = {}, us_x[L] = {}, us_h[L] = {};
            add_products(h, a, b, r, s.Rp, hs);
            add_products(u_x, a, b, r, apart, us_x);
            add_products(u_h, a, b, r, apart, us_h);
            const Vec<Real> shared = sums<Real, L>(us), of_x = sums<Real, L>(xs), of_h = sums<Real, L>(hs);
            pairs = (shared + sums<Real, L>(us_x)) * of_x + (shared + sums<Real, L>(us_h)) * of_h;
          } else {
            add_products(h, a, b, r, s.Rp, xs);
            pairs = sums<Real, L>(us) * sums<Real, L>(xs);
          }
          total += a == b ? pairs : pairs + pairs;
        }
    double square = 0;
    for (int j = 0; j < L; ++j) square += static_cast<double>(total[j]);
    norms_->w[t] = __builtin_sqrt(square > 0 ? square : 0) / static_cast<double>(scale);
  }

  static constexpr int kFar = sizeof(Real) == 4 ? 120 : 1000;  // 2^±kFar is normal
  static constexpr int kGroup = L >= 8 ? 4 : 2, kRows = L / kGroup;  // kRows · kGroup products fill a vector

  // n elements, from column `at` on, of row `number` of a matrix whose rows lie interleaved, vector by vector, in groups of kGroup.
  static void interleave(const Real* from, int64_t number, int64_t n, Real scale, Real* matrix, int64_t columns, int64_t at) {
    Real* to = matrix + number / kGroup * kGroup * columns + number % kGroup * L + at * kGroup;
    for (int64_t k = 0; k < n; k += L) store(to + k * kGroup, load(from + k) * scale);
  }

  // sums[i · kGroup + j] += the product of row a + first + i and row b + j, lane by lane.
  static UV_INLINE void add_products(const Real* rows, int64_t a, int64_t b, int first, int64_t n, Vec<Real> (&sums)[L]) {
    const Real *left = rows + a * n + first * L, *right = rows + b * n;
    for (int64_t k = 0; k < n * kGroup; k += L * kGroup) {
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

  void add_rows(const Real* a, int64_t rows, Real* out) const {
    for (int64_t k = 0; k < s.width; k += L) {
      Vec<Real> total{};
      for (int64_t r = 0; r < rows; ++r) total += load(a + r * s.width + k);
      store(out + k, load(out + k) + total);
    }
  }

  // As add_outer, for a left matrix whose rows are wider than the m columns that count.
  static void add_outer_any(const Real* a, int64_t m, int64_t a_stride, const Real* b, int64_t n, int64_t rows, Real* c) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t k = 0; k < n; k += L) {
        Vec<Real> total{};
        for (int64_t r = 0; r < rows; ++r) total += all<Real>(a[r * a_stride + i]) * load(b + r * n + k);
        store(c + i * n + k, load(c + i * n + k) + total);
      }
  }

  template <bool kNorms>
  void step(const Walk<Real>& walk, int64_t t, int64_t n, int64_t filled, const Work& w, Real* da, Real* da_hh) const {
    const int64_t D = s.dh_stride;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t b = walk.first + r;
      Real* dh = w.dh + r * D;
      copy(dh, w.carried + r * D, D);
      if (g.dy != nullptr) {
        const Real* dy = g.dy + (t * l.B + b) * l.R;
        for (int64_t k = 0; k < l.R; ++k) dh[k] += dy[k];
      }
      copy(w.h_prev + (filled + r) * s.Rp, walk.before(l.y, l.h0, l.R, l.R, t, r), l.R);
      copy(w.x + (filled + r) * s.Ip, l.x + (t * l.B + b) * l.I, l.I);
    }
    const Real* dm = w.dh;
    if (l.w_hr != nullptr) {
      multiply_rows(w.dh, D, n, w_hr_.get(), l.R, w.dm, D, D);
      for (int64_t r = 0; r < n; ++r) copy(w.projected_dh + (filled + r) * s.Rp, w.dh + r * D, s.Rp);
      dm = w.dm;
    }
    for (int64_t r = 0; r < n; ++r) {
      Real* m = l.w_hr == nullptr ? nullptr : w.m + (filled + r) * D;
      pointwise<kNorms>(walk, t, r, dm + r * D, w.dh + r * D, w.dc + r * s.Hp, w.carried + r * D,
                w.h_prev + (filled + r) * s.Rp, da + r * s.width, da_hh + r * s.width, m);
    }
    hand_back(n, da_hh, w.carried);
    if (g.clip > 0)
      for (int64_t r = 0; r < n; ++r) {
        clip(w.carried + r * D, l.R);
        if (CellType::kHasC) clip(w.dc + r * s.Hp, l.H);
      }
  }

  // δa of one sample and step; leaves in `carried` what reaches h_{t−1} other than through W_hh.
  template <bool kNorms>
  void pointwise(const Walk<Real>& walk, int64_t t, int64_t r, const Real* dm, const Real* dh, Real* dc, Real* carried,
                 const Real* h_prev, Real* da, Real* da_hh, Real* m) const {
    const int64_t b = walk.first + r, at = t * l.B + b;
    const Real* saved_row = l.gates + at * s.saved;
    const Real* c_row = CellType::kHasC ? l.cells + at * s.Hp : nullptr;
    const Real* c_before = CellType::kHasC ? walk.before(l.cells, l.c0, s.Hp, l.H, t, r) : nullptr;
    const bool c_whole = CellType::kHasC && c_before >= l.cells && c_before < l.cells + l.T * l.B * s.Hp;
    Vec<double> squares[8] = {};  // of the gates' δa, of δc, of δh
    for (int64_t p = 0; p < s.panels; ++p)
      for (int u = 0; u < CellType::kUnits; ++u) {
        const int64_t unit = (p * CellType::kUnits + u) * L, kept = CellType::kSaved / CellType::kUnits;
        Vec<Real> saved[4] = {}, gates[4], gates_hh[4], c{}, c_prev{}, h{}, later{}, total{}, rest{};
        for (int v = 0; v < kept; ++v) saved[v] = load(saved_row + (p * CellType::kSaved + u * kept + v) * L);
        if (CellType::kHasC) {
          c = load(c_row + unit);
          c_prev = c_whole ? load(c_before + unit) : unit < l.H ? load(c_before + unit, l.H - unit) : c_prev;
          later = load(dc + unit);
        }
        if (CellType::kSplit) h = load(h_prev + unit);
        CellType::template backward<Real>(load(dm + unit), later, total, saved, c, c_prev, h, gates, gates_hh, rest);
        if (CellType::kHasC) store(dc + unit, later);
        if (CellType::kSplit) store(carried + unit, rest);
        if (m != nullptr) store(m + unit, saved[O] * tanh<Real>(c));
        for (int v = 0; v < CellType::kGates; ++v) {
          const int64_t k = (p * A + (CellType::kUnits == 1 ? v : u)) * L;
          store(da + k, gates[v]);
          if (CellType::kSplit) store(da_hh + k, gates_hh[v]);
          if (kNorms) add_squares(squares[v], gates[v]);
        }
        if (kNorms && CellType::kHasC) add_squares(squares[4], total);
        if (unit < l.H) {
          if (CellType::kHasC && g.delta_c != nullptr) store(g.delta_c + at * l.H + unit, total, l.H - unit);
          for (int v = 0; v < CellType::kGates; ++v) {
            const int64_t k = (at * CellType::kGates + v) * l.H + unit;
            if (g.delta_a != nullptr) store(g.delta_a + k, gates[v], l.H - unit);
            if (CellType::kSplit && g.delta_a_hh != nullptr) store(g.delta_a_hh + k, gates_hh[v], l.H - unit);
          }
        }
      }
    if (g.delta_h != nullptr) copy(g.delta_h + at * l.R, dh, l.R);
    if (kNorms) {
      for (int64_t k = 0; k < l.R; k += L) add_squares(squares[5], load(dh + k));
      constexpr int together = kLanes<double> < 4 ? kLanes<double> : 4;
      double totals[8 + kLanes<double>];
      for (int k = 0; k < 8; k += together) {
        Vec<double> part[together];
        for (int j = 0; j < together; ++j) part[j] = squares[k + j];
        store(totals + k, sums<double, together>(part));
      }
      for (int v = 0; v < CellType::kGates; ++v) norms_->a[at * CellType::kGates + v] = __builtin_sqrt(totals[v]);
      if (CellType::kHasC) norms_->c[at] = __builtin_sqrt(totals[4]);
      norms_->h[at] = __builtin_sqrt(totals[5]);
    }
  }

  // carried (+)= δa_hh W_hh
  void hand_back(int64_t n, const Real* da_hh, Real* carried) const {
    constexpr int64_t wide = kWide * L;
    for (int64_t q = 0; q * wide < s.Rp; ++q) {
      const Real* panel = w_hh_.get() + q * s.width * wide;
      for_tiles(n, [&](auto tile, int64_t r0) {
        constexpr int M = decltype(tile)::value;
        Vec<Real> acc[M][kWide] = {};
        multiply<Real, M, kWide>(acc, da_hh + r0 * s.width, s.width, panel, s.width);
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < kWide; ++v) {
            Real* to = carried + (r0 + r) * s.dh_stride + q * wide + v * L;
            store(to, CellType::kSplit ? load(to) + acc[r][v] : acc[r][v]);
          }
      });
    }
  }

  void clip(Real* v, int64_t n) const {
    double square = 0;
    for (int64_t k = 0; k < n; ++k) square += static_cast<double>(v[k]) * v[k];
    double norm = __builtin_sqrt(square);
    if (norm <= g.clip) return;
    Real scale = static_cast<Real>(g.clip / norm);
    for (int64_t k = 0; k < n; ++k) v[k] *= scale;
  }

  const Layer<Real>& l;
  const Gradients<Real>& g;
  const Norms* norms_;
  const Sizes<CellType, Real> s;
  Scratch<Real> w_hh_, w_ih_, w_hr_, partial_;
};
