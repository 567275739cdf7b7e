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

  // All blocks side by side, so that g_t, to which all samples contribute, can be measured as they go.
  void in_step(int threads) {
    const int64_t size = Work(*this, nullptr).size;
    Scratch<Real> memory(s.blocks * size);
    memory_ = memory.get();
    size_ = size;
    for_each(s.blocks, threads, [&](int64_t b) { begin(b, work(b)); });
    const int64_t span = s.chunk_steps * kSpan;
    for (int64_t i1 = l.T; i1 > 0; i1 -= span) {
      const int64_t i0 = i1 > span ? i1 - span : 0;
      for_each(s.blocks, threads, [&](int64_t b) {
        Work w = work(b);
        for (int64_t j1 = i1, part = 0; j1 > i0; j1 -= s.chunk_steps, ++part)
          chunk(b, j1 - smaller(j1 - i0, s.chunk_steps), j1, part, w);
      });
      for_each(i1 - i0, threads, [&](int64_t i) { measure(i0 + i, i1); });
    }
    for_each(s.blocks, threads, [&](int64_t b) { end(b, work(b)); });
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
  static constexpr int64_t kSpan = 4;  // chunks between two measurements: waking threads has its price

  // What a block works with, carved from one piece of memory.
  struct Work {
    Work(const Backward& run, Real* memory) {
      const Sizes<CellType, Real>& s = run.s;
      const bool projected = run.l.w_hr != nullptr;
      const int64_t rows = s.block_rows, most = s.chunk_steps * rows * (run.norms_ == nullptr ? 1 : kSpan);
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

  Work work(int64_t number) const { return Work(*this, memory_ + number * size_); }
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

  // Steps [i0, i1) backwards; `part` counts the chunks whose rows are kept.
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

  // ‖g_t‖_F of step i of a span that ends before i1, by the Gram identity ‖Σ_b u_bᵀ v_b‖² = Σ_{b,b'} (u_b · u_b')(v_b · v_b').
  void measure(int64_t i, int64_t i1) const {
    const Walk<Real> all_samples{l, 0, l.B};
    const int64_t t = all_samples.step(i), n = all_samples.active(t), padded = round_up(n, kColumns);
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
    Scratch<const Real*> rows(4 * padded);
    Scratch<Real> nothing(s.width > s.Rp + s.Ip ? s.width : s.Rp + s.Ip);
    zero(nothing.get(), s.width > s.Rp + s.Ip ? s.width : s.Rp + s.Ip);
    const Real **da = rows.get(), **da_hh = da + padded, **h = da_hh + padded, **x = h + padded;
    for (int64_t b = 0; b < padded; ++b) da[b] = da_hh[b] = h[b] = x[b] = nothing.get();
    // A power of two brings δ to about 1 where its squares would leave Real's range.
    int exponent = 0;
    __builtin_frexp(largest, &exponent);
    constexpr int safe = sizeof(Real) == 4 ? 24 : 250;
    const int shift = exponent > safe || exponent < -safe ? -exponent : 0;
    for (int64_t number = 0; number * s.block_rows < n; ++number) {
      const Walk<Real> walk = this->walk(number);
      const Work w = work(number);
      const int64_t chunk = (i1 - 1 - i) / s.chunk_steps, newest = i1 - 1 - chunk * s.chunk_steps;
      int64_t row = chunk * s.chunk_steps * s.block_rows;
      for (int64_t j = newest; j > i; --j) row += walk.active(walk.step(j));
      for (int64_t r = 0; r < walk.active(t); ++r, ++row) {
        const int64_t b = walk.first + r;
        if (shift != 0) {
          scale(w.da + row * s.width, shift);
          if (CellType::kSplit) scale(w.da_hh + row * s.width, shift);
        }
        da[b] = w.da + row * s.width;
        da_hh[b] = w.da_hh + row * s.width;
        h[b] = w.h_prev + row * s.Rp;
        x[b] = w.x + row * s.Ip;
      }
    }
    double total = 0;
    for (int64_t a = 0; a < padded; a += kColumns)
      for (int64_t b = a; b < padded; b += kColumns) {
        double pairs = 0;
        for (int64_t r = a; r < a + kColumns; r += kRows) {
          Vec<Real> u = dots(da + r, da + b, s.width), u_hh = CellType::kSplit ? dots(da_hh + r, da_hh + b, s.width) : u;
          pairs += total_of(u * dots(x + r, x + b, s.Ip) + u_hh * dots(h + r, h + b, s.Rp));
        }
        total += a == b ? pairs : 2 * pairs;
      }
    norms_->w[t] = __builtin_ldexp(__builtin_sqrt(total > 0 ? total : 0), -shift);
  }

  // Lane i · kColumns + j: a_i · b_j.
  static constexpr int kColumns = L >= 8 ? 4 : 2, kRows = L / kColumns;
  UV_INLINE Vec<Real> dots(const Real* const* a, const Real* const* b, int64_t n) const {
    Vec<Real> acc[L] = {};
    for (int64_t k = 0; k < n; k += L) {
      Vec<Real> right[kColumns];
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) right[j] = load(b[j] + k);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        Vec<Real> left = load(a[i] + k);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) acc[i * kColumns + j] += left * right[j];
      }
    }
    return sums<Real, L>(acc);
  }

  static double total_of(Vec<Real> v) {
    double total = 0;
    for (int j = 0; j < L; ++j) total += static_cast<double>(v[j]);
    return total;
  }

  void scale(Real* row, int shift) const {
    for (int64_t k = 0; k < s.width; ++k) row[k] = static_cast<Real>(__builtin_ldexp(static_cast<double>(row[k]), shift));
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
    Vec<double> squares[4] = {}, square_c{}, square_h{};
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
        if (kNorms && CellType::kHasC) add_squares(square_c, total);
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
      for (int64_t k = 0; k < l.R; k += L) add_squares(square_h, load(dh + k));
      norms_->h[at] = norm(square_h);
      if (CellType::kHasC) norms_->c[at] = norm(square_c);
      for (int v = 0; v < CellType::kGates; ++v) norms_->a[at * CellType::kGates + v] = norm(squares[v]);
    }
  }

  static double norm(Vec<double> squares) {
    const Vec<double> part[1] = {squares};
    return __builtin_sqrt(sums<double, 1>(part)[0]);
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
  Real* memory_ = nullptr;  // of all blocks' work, where they go in step
  int64_t size_ = 0;
};
