// The way back: δ from the last step read to the first, and the gradients of everything.

template <class CellType, class Real>
class Backward {
 public:
  static constexpr int L = kLanes<Real>, A = CellType::kAcross;

  Backward(const Layer<Real>& layer, const Gradients<Real>& gradients)
      : l(layer),
        g(gradients),
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

  void block(int64_t number) const {
    FlushSubnormals flush;
    const int64_t first = number * s.block_rows, rows = smaller(s.block_rows, l.B - first);
    Real* sums = partial_.get() + number * per_block();
    __builtin_memset(sums, 0, static_cast<size_t>(per_block()) * sizeof(Real));
    if (rows <= 0) return;
    const Walk<Real> walk{l, first, rows};
    const int64_t most = s.chunk_steps * rows;
    Work w{Scratch<Real>(rows * s.dh_stride), Scratch<Real>(rows * s.dh_stride), Scratch<Real>(rows * s.dh_stride),
           Scratch<Real>(rows * s.Hp),        Scratch<Real>(most * s.width),     Scratch<Real>(CellType::kSplit ? most * s.width : 1),
           Scratch<Real>(most * s.Rp),        Scratch<Real>(most * s.Ip),
           Scratch<Real>(l.w_hr == nullptr ? 1 : most * s.dh_stride), Scratch<Real>(l.w_hr == nullptr ? 1 : most * s.Rp)};
    zero(w.carried.get(), rows * s.dh_stride);
    zero(w.dm.get(), rows * s.dh_stride);
    zero(w.dc.get(), rows * s.Hp);
    zero(w.h_prev.get(), most * s.Rp);
    zero(w.x.get(), most * s.Ip);
    if (l.w_hr != nullptr) zero(w.m.get(), most * s.dh_stride);
    for (int64_t r = 0; r < rows; ++r) {
      if (g.dhn != nullptr) copy(w.carried.get() + r * s.dh_stride, g.dhn + (first + r) * l.R, l.R);
      if (CellType::kHasC && g.dcn != nullptr) copy(w.dc.get() + r * s.Hp, g.dcn + (first + r) * l.H, l.H);
    }
    for (int64_t i1 = l.T; i1 > 0; i1 -= s.chunk_steps) chunk(walk, i1 - smaller(i1, s.chunk_steps), i1, w, sums);
    for (int64_t r = 0; r < rows; ++r) {
      copy(g.dh0 + (first + r) * l.R, w.carried.get() + r * s.dh_stride, l.R);
      if (CellType::kHasC) copy(g.dc0 + (first + r) * l.H, w.dc.get() + r * s.Hp, l.H);
    }
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
  struct Work {
    Scratch<Real> carried;  // [rows, dh_stride] what δh_{t−1} gets from step t
    Scratch<Real> dh;       // [rows, dh_stride] δh_t
    Scratch<Real> dm;       // [rows, dh_stride] δh_t before the projection
    Scratch<Real> dc;       // [rows, Hp] what c gets from later steps
    Scratch<Real> da, da_hh;        // [chunk rows, width]
    Scratch<Real> h_prev;           // [chunk rows, Rp]
    Scratch<Real> x;                // [chunk rows, Ip]
    Scratch<Real> m, projected_dh;  // [chunk rows, dh_stride], [chunk rows, Rp]
  };

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

  void chunk(const Walk<Real>& walk, int64_t i0, int64_t i1, Work& w, Real* sums) const {
    int64_t filled = 0;
    for (int64_t i = i1 - 1; i >= i0; --i) {
      const int64_t t = walk.step(i), n = walk.active(t);
      Real* da = w.da.get() + filled * s.width;
      Real* da_hh = CellType::kSplit ? w.da_hh.get() + filled * s.width : da;
      step(walk, t, n, filled, w, da, da_hh);
      if (g.dx != nullptr) {
        Real* dx = g.dx + (t * l.B + walk.first) * l.I;
        multiply_rows(da, s.width, n, w_ih_.get(), s.width, dx, l.I, l.I);
        zero(dx + n * l.I, (walk.rows - n) * l.I);
      }
      filled += n;
    }
    const Real* da_hh = CellType::kSplit ? w.da_hh.get() : w.da.get();
    add_outer(w.da.get(), s.width, w.x.get(), s.Ip, filled, sums + dw_ih());
    add_outer(da_hh, s.width, w.h_prev.get(), s.Rp, filled, sums + dw_hh());
    add_rows(w.da.get(), filled, sums + db_ih());
    if (CellType::kSplit) add_rows(da_hh, filled, sums + db_hh());
    if (l.w_hr != nullptr) add_outer_any(w.projected_dh.get(), l.R, s.Rp, w.m.get(), s.dh_stride, filled, sums + dw_hr());
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

  void step(const Walk<Real>& walk, int64_t t, int64_t n, int64_t filled, Work& w, Real* da, Real* da_hh) const {
    const int64_t D = s.dh_stride;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t b = walk.first + r;
      Real* dh = w.dh.get() + r * D;
      copy(dh, w.carried.get() + r * D, D);
      if (g.dy != nullptr) {
        const Real* dy = g.dy + (t * l.B + b) * l.R;
        for (int64_t k = 0; k < l.R; ++k) dh[k] += dy[k];
      }
      copy(w.h_prev.get() + (filled + r) * s.Rp, walk.before(l.y, l.h0, l.R, l.R, t, r), l.R);
      copy(w.x.get() + (filled + r) * s.Ip, l.x + (t * l.B + b) * l.I, l.I);
    }
    const Real* dm = w.dh.get();
    if (l.w_hr != nullptr) {
      multiply_rows(w.dh.get(), D, n, w_hr_.get(), l.R, w.dm.get(), D, D);
      for (int64_t r = 0; r < n; ++r) copy(w.projected_dh.get() + (filled + r) * s.Rp, w.dh.get() + r * D, s.Rp);
      dm = w.dm.get();
    }
    for (int64_t r = 0; r < n; ++r) {
      Real* m = l.w_hr == nullptr ? nullptr : w.m.get() + (filled + r) * D;
      pointwise(walk, t, r, dm + r * D, w.dh.get() + r * D, w.dc.get() + r * s.Hp, w.carried.get() + r * D,
                w.h_prev.get() + (filled + r) * s.Rp, da + r * s.width, da_hh + r * s.width, m);
    }
    hand_back(n, da_hh, w.carried.get());
    if (g.clip > 0)
      for (int64_t r = 0; r < n; ++r) {
        clip(w.carried.get() + r * D, l.R);
        if (CellType::kHasC) clip(w.dc.get() + r * s.Hp, l.H);
      }
  }

  // δa of one sample and step; leaves in `carried` what reaches h_{t−1} other than through W_hh.
  void pointwise(const Walk<Real>& walk, int64_t t, int64_t r, const Real* dm, const Real* dh, Real* dc, Real* carried,
                 const Real* h_prev, Real* da, Real* da_hh, Real* m) const {
    const int64_t b = walk.first + r, at = t * l.B + b;
    const Real* saved_row = l.gates + at * s.saved;
    const Real* c_row = CellType::kHasC ? l.cells + at * s.Hp : nullptr;
    const Real* c_before = CellType::kHasC ? walk.before(l.cells, l.c0, s.Hp, l.H, t, r) : nullptr;
    const bool c_whole = CellType::kHasC && c_before >= l.cells && c_before < l.cells + l.T * l.B * s.Hp;
    double squares[CellType::kGates] = {}, square_c = 0;
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
          if (g.norm_a != nullptr) squares[v] += sum_of_squares(gates[v]);
        }
        if (g.norm_c != nullptr) square_c += sum_of_squares(total);
        if (unit < l.H) {
          if (CellType::kHasC && g.delta_c != nullptr) store(g.delta_c + at * l.H + unit, total, l.H - unit);
          for (int v = 0; v < CellType::kGates; ++v) {
            const int64_t k = (at * CellType::kGates + v) * l.H + unit;
            if (g.delta_a != nullptr) store(g.delta_a + k, gates[v], l.H - unit);
            if (CellType::kSplit && g.delta_a_hh != nullptr) store(g.delta_a_hh + k, gates_hh[v], l.H - unit);
          }
        }
      }
    if (g.norm_a != nullptr)
      for (int v = 0; v < CellType::kGates; ++v) g.norm_a[at * CellType::kGates + v] = __builtin_sqrt(squares[v]);
    if (g.norm_c != nullptr) g.norm_c[at] = __builtin_sqrt(square_c);
    if (g.delta_h != nullptr) copy(g.delta_h + at * l.R, dh, l.R);
    if (g.norm_h != nullptr) {
      double square = 0;
      for (int64_t k = 0; k < l.R; k += L) square += sum_of_squares(load(dh + k));
      g.norm_h[at] = __builtin_sqrt(square);
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
  const Sizes<CellType, Real> s;
  Scratch<Real> w_hh_, w_ih_, w_hr_, partial_;
};
