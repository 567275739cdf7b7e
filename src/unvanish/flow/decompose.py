"""Which path carries the gradient one step back: the exact terms of δm_{t−1}, m the state that is the cell's memory.

With the symbols of `unvanish.cells.calculus`, the gradient that step t sends back to the states at t − 1 has one part
per carry and one per gate,

    carry     C_mm ⊙ δm_t                     the state's own old value
    from_a    C_am ⊙ δs^a_t                   another state that reads it
    through_b Σ_a C_ab ⊙ δs^a_t               another state that is read
    gate γ    W_γᵀ δq^γ_t                     through γ's matrix, to the state that it reads

and a gradient at a state other than m counts as far as that state is computed from m. For the LSTM, whose h_t is
computed from c_t with u_t = ∂h_t/∂c_t (through W_hr where there is a projection), that is

    δc_{t−1} = u_{t−1} ⊙ ∂E_{t−1}/∂h_{t−1} + A + B + C + D + O
    A = u_{t−1} ⊙ W_hfᵀ δa^f_t      B = f_t ⊙ δc_t      C = u_{t−1} ⊙ W_hiᵀ δa^i_t
    D = u_{t−1} ⊙ W_hgᵀ δa^g_t      O = u_{t−1} ⊙ W_hoᵀ δa^o_t

GRU:  δh_{t−1} = ∂E_{t−1}/∂h_{t−1} + z_t ⊙ δh_t + W_hrᵀ δa^r_t + W_hzᵀ δa^z_t + W_hnᵀ (r_t ⊙ δa^n_t)
RNN:  δh_{t−1} = ∂E_{t−1}/∂h_{t−1} + W_hhᵀ δa_t
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.cells import Cell, calculus
from unvanish.engine.precision import full_precision
from unvanish.extras import extra
from unvanish.flow.descent import flow_at
from unvanish.flow.exponents import Rows, log_norms, times_power_of_two
from unvanish.flow.files import Record
from unvanish.flow.stack import Stack, run_stack
from unvanish.flow.textbook_product import TextbookProduct, textbook_product
from unvanish.nn.modules import SequenceModule

if TYPE_CHECKING:
    import pandas as pd


LETTERS = {"forget_gate": "A", "carry": "B", "input_gate": "C", "candidate": "D", "output_gate": "O"}
"""The letters of the equations above, for a cell with exactly the LSTM's five paths."""


@dataclass(frozen=True, repr=False)
class Term(Record):
    """One path of the gradient from step t + 1 (in the layer's reading order) back to the state at t."""

    name: str
    title: str
    """its name in pictures: "B · carry, diag(f)", "A · through the forget gate's weights" """
    log_norm: Tensor
    """[T, B] float64 ln‖term‖₂; −inf where it is zero, as at the last step, at which no gradient arrives"""
    share: Tensor
    """[T, B] float64 ⟨term, δ⟩ / ‖δ‖², δ the sum of all terms: signed, they sum to 1; NaN where δ = 0"""
    matrix: Tensor | None = None
    """[T, B, H, H] the term as a matrix M acting forward, ∂c_{t+1}/∂c_t = Σ M + …, on request; 0 at the last step"""

    @property
    def norm(self) -> Tensor:
        """[T, B] ‖term‖₂; 0 also where it is below float64's range."""
        return self.log_norm.exp()

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per step and sample: t, sample, term, log_norm, norm, share."""
        with extra("report"):
            import pandas as pd

        t, b = torch.meshgrid(*(torch.arange(n, device="cpu") for n in self.log_norm.shape), indexing="ij")
        columns = {"t": t, "sample": b, "term": self.name}
        columns |= {"log_norm": self.log_norm, "norm": self.norm, "share": self.share}
        return pd.DataFrame({k: v.flatten().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()})

    def __repr__(self) -> str:
        return f"Term {self.name}: median norm {self.norm.median():.2e}, median share {self.share.nanmedian():.3f}"


@dataclass(frozen=True, repr=False)
class StateTerms(Record):
    """The terms of one layer and direction by name, also as attributes: `terms.carry`, `terms.forget_gate`, …

    A gate's term is the path through that gate's recurrent matrix; `carry` is the path along the state itself:
    diag(f_t) for the LSTM, diag(z_t) for the GRU.
    """

    cell: str
    at: str
    """the layer and direction: "l0", "l1.reverse" """
    terms: dict[str, Term]
    log_total: Tensor
    """[T, B] float64 ln‖Σ terms‖₂: the gradient that arrived from later steps"""
    textbook: TextbookProduct | None = None

    @property
    def total(self) -> Tensor:
        """[T, B] ‖Σ terms‖₂; 0 also where it is below float64's range."""
        return self.log_total.exp()

    def __getattr__(self, name: str) -> Term:
        terms = self.__dict__.get("terms", {})
        if name in terms:
            return terms[name]
        raise AttributeError(f"{name!r}: the terms of {self.__dict__.get('cell')} are {', '.join(terms)}")

    def to_dataframe(self) -> "pd.DataFrame":
        """All terms' rows; see `Term.to_dataframe`."""
        with extra("report"):
            import pandas as pd

        return pd.concat([term.to_dataframe() for term in self.terms.values()], ignore_index=True)

    def _draw(self, ax: Any) -> Any:
        from unvanish import draw

        shares = {term.title: term.share.nanmedian(1).values.tolist() for term in self.terms.values()}
        steps = range(len(self.log_total))
        return draw.lines(shares, steps, "step t", "share of the gradient that comes back", ax, zero=True)

    def __repr__(self) -> str:
        return "\n".join([f"StateTerms of {self.cell} {self.at}", *(f"  {term!r}" for term in self.terms.values())])


@torch.no_grad()
@full_precision()
def decompose(
    layer: SequenceModule,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    error: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    at: str | None = None,
    matrices: bool = False,
    textbook: bool = False,
    probes: int | None = None,
    seed: int = 0,
) -> StateTerms:
    """Split the gradient that arrives at each state into the paths along which it arrives.

    The equations are in the docstring of the module `unvanish.flow.decompose`.

    Args:
        layer: nn.RNN, nn.LSTM or nn.GRU of torch or unvanish, or `unvanish.nn.Recurrent`.
        x: its input, in its own layout.
        hx: the initial state; None: zeros.
        error: `[T, B, D·R]` ∂E_t/∂h_t at the last layer's output, samples in the user's order; None: one random unit
            vector, from `seed`, at each sample's last step read.
        lengths: `[B]` steps of each sample of a padded x.
        at: "l0", "l1.reverse", …; by default the last layer's forward direction.
        matrices: also each term's H × H matrix per step and sample; memory T·B·H² per term.
        textbook: for a cell whose output is made from its memory (LSTM), also the textbook product Π ∂c_t/∂c_{t−1}
            against the exact derivative; H³ work per step and sample.
        probes: estimate the norms of `textbook` from this many random vectors, H² work each; None: exact.
        seed: seed of the random error and probes.

    Raises:
        TypeError, ValueError: an argument does not fit.

    The layer's `clip` and `h_detach` are ignored. Norms and shares are right even where the gradient is below the
    dtype's range.
    """
    stack = run_stack(layer, x, hx, lengths)
    place = stack.index(at)
    tr = stack.traces[place]
    cell = tr.cell
    if textbook and (cell.states[0], cell.remembers) not in tr.partials.made:
        raise ValueError(
            f"textbook: expected a cell whose output is made from its memory, as the LSTM's h from c; got {cell.name}"
        )
    if probes is not None and not (textbook and probes >= 1):
        raise ValueError(f"probes: expected a count of 1 or more, together with textbook=True; got {probes}")
    deltas, exponent = flow_at(stack, place, _last_step_error(stack, seed) if error is None else error)
    parts = _terms(tr, deltas)
    exponent = _one_step_earlier(exponent, tr)
    total = torch.stack(list(parts.values())).sum(0)
    unit = Rows.of(total)
    square = unit.v.double().square().sum(-1)
    forms = _matrices(tr) if matrices else {}
    titles = _titles(cell, list(parts))
    terms = {}
    for name, part in parts.items():
        log_norm = stack.inputs.in_user_order(log_norms(part, exponent), 1).cpu()
        scaled = times_power_of_two(part, -unit.exponent.unsqueeze(-1))
        share = (scaled.double() * unit.v.double()).sum(-1) / torch.where(square > 0, square, torch.nan)
        form = forms.get(name, torch.zeros(()).to(part).expand(*part.shape, part.shape[-1])) if matrices else None
        shown = None if form is None else stack.inputs.in_user_order(form, 1).cpu()
        terms[name] = Term(name, titles[name], log_norm, stack.inputs.in_user_order(share, 1).cpu(), shown)
    log_total = stack.inputs.in_user_order(log_norms(total, exponent), 1).cpu()
    product = textbook_product(stack, tr, probes, seed) if textbook else None
    return StateTerms(cell.name, stack.layers[place].name, terms, log_total, product)


def _last_step_error(stack: Stack, seed: int) -> Tensor:
    T, B = stack.inputs.x.shape[:2]
    y = stack.traces[-1].y
    dy = y.new_zeros(T, B, stack.directions * y.shape[-1])
    lengths = stack.inputs.lengths
    last = torch.full((B,), T, device=y.device) if lengths is None else lengths
    generator = torch.Generator().manual_seed(seed)
    for d in range(stack.directions):
        unit = torch.nn.functional.normalize(torch.randn(y.shape[-1], generator=generator, dtype=torch.float64), dim=0)
        step = torch.zeros_like(last) if d else (last - 1).clamp_min(0)
        dy[step, torch.arange(B, device=y.device), d * y.shape[-1] : (d + 1) * y.shape[-1]] = unit.to(y)
    return stack.inputs.in_user_order(dy, 1)


def _terms(tr: engine.Trace, deltas: engine.Deltas) -> dict[str, Tensor]:
    """Each term at the step at which it arrives, `[T, B, H]`, by its name."""
    cell, d, w = tr.cell, tr.partials, tr.weights
    m = cell.remembers
    total = dict(zip(cell.states, deltas.dstate, strict=True))
    if w.w_hr is not None:
        total[cell.states[0]] = total[cell.states[0]] @ w.w_hr
    found: dict[str, Tensor] = {}
    for (a, b), c in d.s.items():
        arrived = _one_step_earlier(c * total[a], tr)
        in_memory, _ = calculus.completed(cell, d, {b: arrived}, w)
        if m in in_memory:
            name = _path(cell, a, b)
            found[name] = found[name] + in_memory[m] if name in found else in_memory[m]
    if deltas.da_hh is None:
        return found
    shares = zip(cell.sources.items(), deltas.da_hh.chunk(len(cell.sources), dim=-1), strict=True)
    for (gate, source), dq in shares:
        if gate in cell.same_step:
            continue
        arrived = _one_step_earlier(dq @ calculus.block(cell, w, gate), tr)
        in_memory, _ = calculus.completed(cell, d, {source: arrived}, w)
        if m in in_memory:
            found[cell.titles.get(gate, gate)] = in_memory[m]
    return found


def _one_step_earlier(v: Tensor, tr: engine.Trace) -> Tensor:
    """From the step a term comes from to the step it arrives at; 0 at the last step read, and where a sample has no
    input."""
    zero = torch.zeros_like(v[:1])
    v = _present(v, tr)
    return _present(torch.cat([zero, v[:-1]] if tr.reverse else [v[1:], zero]), tr)


def _present(v: Tensor, tr: engine.Trace) -> Tensor:
    """v `[T, B, ...]`, 0 where a sample is inactive."""
    if tr.active is None:
        return v
    return torch.where(tr.active.reshape(*tr.active.shape[:2], *(1,) * (v.dim() - 2)), v, 0.0)


def _path(cell: Cell, a: str, b: str) -> str:
    """The name of the path from state a at t back to state b at t − 1, at fixed shares."""
    if b != cell.remembers:
        return f"through_{b}"
    return "carry" if a == b else f"from_{a}"


def _matrices(tr: engine.Trace) -> dict[str, Tensor]:
    """Each term as a matrix `[T, B, H, H]` that acts on the memory at t. A term that acts on m_{t+1} only through
    another state of step t + 1, like the LSTM's O, would be a zero matrix and is left out."""
    cell, d, w = tr.cell, tr.partials, tr.weights
    m = cell.remembers
    found: dict[str, Tensor] = {}
    per_row = d.map(lambda v: v.unsqueeze(-2))
    for (a, b), c in d.s.items():
        if a == m:
            rows = _one_step_earlier(torch.diag_embed(c), tr)
            in_memory, _ = calculus.completed(cell, per_row, {b: rows}, w)
            if m in in_memory:
                found[_path(cell, a, b)] = in_memory[m]
    for gate, source in cell.sources.items():
        if (m, gate) not in d.q or gate in cell.same_step:
            continue
        rows = _one_step_earlier(d.q[m, gate].unsqueeze(-1) * calculus.block(cell, w, gate), tr)
        in_memory, _ = calculus.completed(cell, per_row, {source: rows}, w)
        if m in in_memory:
            found[cell.titles.get(gate, gate)] = in_memory[m]
    return found


def _titles(cell: Cell, terms: list[str]) -> dict[str, str]:
    """The terms' names in pictures: the carry by its diagonal, a gate's term as a path through weights."""
    gates = {cell.titles.get(gate, gate): gate for gate in cell.sources}
    lettered = set(terms) == set(LETTERS)
    return {term: (f"{LETTERS[term]} · " if lettered else "") + _in_words(cell, term, gates) for term in terms}


def _in_words(cell: Cell, term: str, gates: dict[str, str]) -> str:
    if term == "carry":
        if cell.carry_gate is None:
            return "carry"
        gate, sign = cell.carry_gate
        return f"carry, diag({gate})" if sign > 0 else f"carry, diag(1 − {gate})"
    if term not in gates:
        return f"{term.partition('_')[0]} state {term.partition('_')[2]}"
    if len(gates) == 1:
        return "through the recurrent weights"
    if term == gates[term]:
        return f"through the weights of gate {term}"
    return f"through the {term.replace('_', ' ')}'s weights"
