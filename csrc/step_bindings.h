// The bindings of cells given by programs; a part of bindings.cpp.

inline const char* const kOps[] = {
#define UV_NAME(name) #name,
    UV_OPS(UV_NAME)
#undef UV_NAME
};
constexpr int kOpCount = sizeof kOps / sizeof *kOps;

// A program and its memory, from Python's (code, inputs, outputs, constants, temporaries): code has five numbers per instruction, inputs
// and outputs have two per register. Every number is checked here, since the interpreter checks none.
class OwnedProgram {
 public:
  OwnedProgram(nb::handle given, const StepCell& cell) {
    const nb::tuple parts = nb::cast<nb::tuple>(given);
    if (parts.size() != 5) throw std::invalid_argument("program: expected code, inputs, outputs, constants, temporaries");
    const auto code = nb::cast<std::vector<int32_t>>(parts[0]);
    inputs_ = places(parts[1], cell);
    outputs_ = places(parts[2], cell);
    constants_ = nb::cast<std::vector<double>>(parts[3]);
    const auto temporaries = nb::cast<int64_t>(parts[4]);
    const auto registers = static_cast<int64_t>(inputs_.size() + outputs_.size() + constants_.size()) + temporaries;
    if (code.size() % 5 != 0 || temporaries < 0) throw std::invalid_argument("program: instructions are five numbers each");
    for (size_t i = 0; i < code.size(); i += 5) {
      for (size_t k = 1; k < 5; ++k)
        if (code[i + k] < 0 || code[i + k] >= registers) throw std::invalid_argument("program: no such register");
      if (code[i] < 0 || code[i] >= kOpCount) throw std::invalid_argument("program: no such operation");
      code_.push_back({static_cast<Op>(code[i]), code[i + 1], code[i + 2], code[i + 3], code[i + 4]});
    }
    program = {code_.data(), inputs_.data(), outputs_.data(), constants_.data(), static_cast<int64_t>(code_.size()),
               static_cast<int64_t>(inputs_.size()), static_cast<int64_t>(outputs_.size()), static_cast<int64_t>(constants_.size()),
               temporaries};
  }
  OwnedProgram(const OwnedProgram&) = delete;
  OwnedProgram& operator=(const OwnedProgram&) = delete;

  Program program;

 private:
  static std::vector<Place> places(nb::handle given, const StepCell& cell) {
    const int32_t counts[] = {cell.n_shares, cell.A, cell.A, cell.V, cell.K, cell.A, cell.Q, cell.G, cell.A, cell.V, cell.A};
    const auto numbers = nb::cast<std::vector<int32_t>>(given);
    std::vector<Place> found;
    for (size_t i = 0; i + 1 < numbers.size(); i += 2) {
      const int32_t kind = numbers[i], index = numbers[i + 1];
      if (kind < 0 || kind >= static_cast<int32_t>(std::size(counts)) || index < 0 || index >= counts[kind])
        throw std::invalid_argument("program: no such input or output");
      found.push_back({static_cast<Kind>(kind), index});
    }
    return found;
  }

  std::vector<Instruction> code_;
  std::vector<Place> inputs_, outputs_;
  std::vector<double> constants_;
};

// From (counts G, Q, A, V, K; shares, two numbers each; source; late; p_from_q; the programs early, forward, late_errors, backward).
class OwnedCell {
 public:
  explicit OwnedCell(const nb::tuple& given) : cell_(counts(given)), early_(given[5], cell_), forward_(given[6], cell_), late_errors_(given[7], cell_), backward_(given[8], cell_) {
    const auto shares = nb::cast<std::vector<int32_t>>(given[1]);
    for (size_t i = 0; i + 1 < shares.size(); i += 2) {
      shares_.push_back({shares[i], shares[i + 1]});
      if (shares[i] < -1 || shares[i] >= cell_.G || shares[i + 1] < -1 || shares[i + 1] >= cell_.Q) throw std::invalid_argument("cell: no such gate");
    }
    source_ = within(given[2], cell_.Q, 0, cell_.A);
    late_ = within(given[3], cell_.Q, 0, 2);
    p_from_q_ = within(given[4], cell_.G, -1, cell_.Q);
    cell_.shares = shares_.data();
    cell_.source = source_.data();
    cell_.late = late_.data();
    cell_.p_from_q = p_from_q_.data();
    cell_.early = early_.program;
    cell_.forward = forward_.program;
    cell_.late_errors = late_errors_.program;
    cell_.backward = backward_.program;
  }
  OwnedCell(const OwnedCell&) = delete;
  OwnedCell& operator=(const OwnedCell&) = delete;

  const StepCell& get() const { return cell_; }

 private:
  static StepCell counts(const nb::tuple& given) {
    if (given.size() != 9) throw std::invalid_argument("cell: expected nine parts");
    const auto n = nb::cast<std::array<int32_t, 5>>(given[0]);
    for (int32_t count : n)
      if (count < 0 || count > kMostGates) throw std::invalid_argument("cell: too many gates, states, vectors or values kept");
    StepCell cell{};
    cell.G = n[0], cell.Q = n[1], cell.A = n[2], cell.V = n[3], cell.K = n[4];
    cell.n_shares = static_cast<int32_t>(nb::len(nb::handle(given[1])) / 2);
    if (cell.n_shares > kMostGates) throw std::invalid_argument("cell: too many gates");
    return cell;
  }
  static std::vector<int32_t> within(nb::handle given, int32_t count, int32_t least, int32_t end) {
    auto found = nb::cast<std::vector<int32_t>>(given);
    bool fits = found.size() == static_cast<size_t>(count);
    for (int32_t number : found) fits = fits && number >= least && number < end;
    if (!fits) throw std::invalid_argument("cell: no such state or gate");
    return found;
  }

  StepCell cell_;
  OwnedProgram early_, forward_, late_errors_, backward_;
  std::vector<Share> shares_;
  std::vector<int32_t> source_, late_, p_from_q_;
};

constexpr const char* kOwned = "unvanish.StepCell";

inline const StepCell& cell_in(const nb::capsule& owned) {
  const char* name = owned.name();
  if (name == nullptr || std::strcmp(name, kOwned) != 0) throw std::invalid_argument("cell: expected what step_cell returned");
  return static_cast<const OwnedCell*>(owned.data())->get();
}

// One address per state; 0 is null.
template <class Real>
struct StateArrays {
  StateArrays(Arguments& a, const StepCell& cell)
      : initial(a.addresses<Real*, "initial">(cell.A)), after(a.addresses<Real*, "after">(cell.A)) {}
  std::vector<Real*> initial, after;
};

template <class Real>
StepLayer<Real> step_layer(Arguments& a, const StepCell& cell, const StateArrays<Real>& states) {
  StepLayer<Real> l{layer_input<Real>(a), cell};
  l.v = a.get<const Real*, "v">();
  l.initial = states.initial.data();
  l.after = states.after.data();
  l.kept = a.get<Real*, "kept">();
  return l;
}

template <class Real>
void step_forward(const nb::capsule& owned, const std::optional<std::string>& isa, int threads, const nb::kwargs& arguments) {
  const StepCell& cell = cell_in(owned);
  Arguments a(arguments);
  const StateArrays<Real> states(a, cell);
  const StepLayer<Real> l = step_layer<Real>(a, cell, states);
  const auto final = a.addresses<Real*, "final">(cell.A);
  a.all_read();
  const Kernels<Real>& k = chosen<Real>(isa);
  nb::gil_scoped_release release;
  k.step_forward(l, final.data(), threads);
}

template <class Real>
void step_backward(const nb::capsule& owned, const std::optional<std::string>& isa, int threads, const nb::kwargs& arguments) {
  const StepCell& cell = cell_in(owned);
  Arguments a(arguments);
  const StateArrays<Real> states(a, cell);
  const StepLayer<Real> l = step_layer<Real>(a, cell, states);
  const auto dfinal = a.addresses<Real*, "dfinal">(cell.A), dinitial = a.addresses<Real*, "dinitial">(cell.A),
             dstate = a.addresses<Real*, "dstate">(cell.A);
  StepGradients<Real> gradients{layer_gradients<Real>(a)};
  gradients.dfinal = dfinal.data();
  gradients.dv = a.get<Real*, "dv">();
  gradients.dinitial = dinitial.data();
  gradients.dstate = dstate.data();
  gradients.dp = a.get<Real*, "dp">();
  gradients.dq = a.get<Real*, "dq">();
  a.all_read();
  const Kernels<Real>& k = chosen<Real>(isa);
  nb::gil_scoped_release release;
  k.step_backward(l, gradients, threads);
}
