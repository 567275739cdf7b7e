"""Which path carries the error one step back: the exact terms of δc_{t−1} (LSTM) or δh_{t−1} (GRU, RNN).

LSTM, with u_t = ∂h_t/∂c_t, through W_hr where there is a projection:

    δc_{t−1} = u_{t−1} ⊙ ∂E_{t−1}/∂h_{t−1} + A + B + C + D + O
    A = u_{t−1} ⊙ W_hfᵀ δa^f_t      B = f_t ⊙ δc_t      C = u_{t−1} ⊙ W_hiᵀ δa^i_t
    D = u_{t−1} ⊙ W_hgᵀ δa^g_t      O = u_{t−1} ⊙ W_hoᵀ δa^o_t

GRU:  δh_{t−1} = ∂E_{t−1}/∂h_{t−1} + z_t ⊙ δh_t + W_hrᵀ δa^r_t + W_hzᵀ δa^z_t + W_hnᵀ (r_t ⊙ δa^n_t)
RNN:  δh_{t−1} = ∂E_{t−1}/∂h_{t−1} + W_hhᵀ δa_t
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.cells import LSTM
from unvanish.flow.article import Article, article_product
from unvanish.flow.backwards import flow_at
from unvanish.flow.exponents import Rows, log_norms, times_power_of_two
from unvanish.flow.files import Record
from unvanish.flow.stack import Stack, run_stack
from unvanish.nn.modules import full_precision

if TYPE_CHECKING:
    import pandas as pd

NAMES = {
    "lstm": ("forget_gate", "carry", "input_gate", "candidate", "output_gate"),
    "gru": ("carry", "reset_gate", "update_gate", "candidate"),
    "rnn": ("recurrent",),
}


@dataclass(frozen=True, repr=False)
class Term(Record):
    """One path of the error from step t + 1 (as the layer reads) back to the state at t."""

    name: str
    log_norm: Tensor
    """[T, B] float64 ln‖term‖₂; −inf where it is zero, as at the last step, to which nothing comes back"""
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
        import pandas as pd

        t, b = torch.meshgrid(*map(torch.arange, self.log_norm.shape), indexing="ij")
        columns = {"t": t, "sample": b, "term": self.name}
        columns |= {"log_norm": self.log_norm, "norm": self.norm, "share": self.share}
        return pd.DataFrame({k: v.flatten().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()})

    def __repr__(self) -> str:
        return f"Term {self.name}: median norm {self.norm.median():.2e}, median share {self.share.nanmedian():.3f}"


@dataclass(frozen=True, repr=False)
class StateTerms(Record):
    """The terms of one layer and direction by name, also as attributes: `terms.carry`, `terms.forget_gate`, …"""

    _picture = "terms"

    cell: str
    at: str
    """the layer and direction: "l0", "l1.reverse" """
    terms: dict[str, Term]
    log_total: Tensor
    """[T, B] float64 ln‖Σ terms‖₂: the error that came back from later steps"""
    article: Article | None = None

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
        import pandas as pd

        return pd.concat([term.to_dataframe() for term in self.terms.values()], ignore_index=True)

    def __repr__(self) -> str:
        return "\n".join([f"StateTerms of {self.cell} {self.at}", *(f"  {term!r}" for term in self.terms.values())])


@torch.no_grad()
@full_precision()
def decompose(
    layer: nn.RNNBase,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    error: Tensor | None = None,
    at: str | None = None,
    matrices: bool = False,
    article: bool = False,
    probes: int | None = None,
    seed: int = 0,
) -> StateTerms:
    """Split the error that reaches each state into the paths it came by (the equations stand in this module's
    docstring).

    Args:
        layer: nn.RNN, nn.LSTM or nn.GRU of torch or unvanish.
        x: its input, in its own layout.
        hx: the initial state; None: zeros.
        error: `[T, B, D·R]` ∂E_t/∂h_t at the last layer's output, samples in the user's order; None: one random unit
            vector, from `seed`, at each sample's last step read.
        at: "l0", "l1.reverse", …; by default the last layer's forward direction.
        matrices: also each term's H × H matrix per step and sample; memory T·B·H² per term.
        article: for the LSTM, also the textbook product against the exact derivative; H³ work per step and sample.
        probes: estimate the article's norms from so many random vectors, H² work each; None: exact.
        seed: of the random error and probes.

    Raises:
        TypeError, ValueError: an argument does not fit.

    The layer's `clip` plays no part. Norms and shares are right also where the error itself is below the dtype's range.
    """
    stack = run_stack(layer, x, hx)
    place = stack.index(at)
    tr = stack.traces[place]
    if article and tr.cell.name != "lstm":
        raise ValueError(f"article: its product is of the LSTM's cell state, the layer is a {tr.cell.name}")
    if probes is not None and not (article and probes >= 1):
        raise ValueError(f"probes: expected a count of 1 or more, together with article=True; got {probes}")
    flow, exponent = flow_at(stack, place, _last_step_error(stack, seed) if error is None else error)
    names = NAMES["rnn" if tr.cell.name.startswith("rnn") else tr.cell.name]
    parts = [_one_step_earlier(v, tr) for v in _terms(tr, flow)]
    exponent = _one_step_earlier(exponent, tr)
    total = torch.stack(parts).sum(0)
    unit = Rows.of(total)
    square = unit.v.double().square().sum(-1)
    forms = _matrices(tr) if matrices else [None] * len(parts)
    terms = {}
    for name, part, form in zip(names, parts, forms, strict=True):
        log_norm = stack.inputs.in_user_order(log_norms(part, exponent), 1).cpu()
        scaled = times_power_of_two(part, -unit.exponent.unsqueeze(-1))
        share = (scaled.double() * unit.v.double()).sum(-1) / torch.where(square > 0, square, torch.nan)
        shown = None if form is None else stack.inputs.in_user_order(_one_step_earlier(form, tr), 1).cpu()
        terms[name] = Term(name, log_norm, stack.inputs.in_user_order(share, 1).cpu(), shown)
    log_total = stack.inputs.in_user_order(log_norms(total, exponent), 1).cpu()
    product = article_product(stack, tr, probes, seed) if article else None
    return StateTerms(tr.cell.name, stack.layers[place].name, terms, log_total, product)


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


def _terms(tr: engine.Trace, flow: engine.Flow) -> list[Tensor]:
    """Each term at the step it comes from, before u of the step it goes to; [T, B, H]."""
    w_hh, saved = tr.weights.w_hh, tr.saved
    G = len(tr.cell.gates)
    through = [d @ w for d, w in zip(flow.da_hh.chunk(G, dim=-1), w_hh.chunk(G, dim=0), strict=True)]
    if isinstance(tr.cell, LSTM):
        u = _exposure_before(tr)
        if tr.weights.w_hr is not None:
            through = [v @ tr.weights.w_hr for v in through]
        i, f, g, o = (u * v for v in through)
        return [f, saved.f * flow.dstate[1], i, g, o]
    if tr.cell.name == "gru":
        return [saved.z * flow.dstate[0], *through]
    return through


def _exposure_before(tr: engine.Trace) -> Tensor:
    """u of the step read before, [T, B, H]; 0 before the first, whose h is given and does not depend on c."""
    assert isinstance(tr.cell, LSTM)
    u = tr.cell.exposure(tr.saved)
    zero = torch.zeros_like(u[:1])
    return torch.cat([u[1:], zero] if tr.reverse else [zero, u[:-1]])


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


def _matrices(tr: engine.Trace) -> list[Tensor]:
    """Each term as a matrix `[T, B, H, H]`, in the order of NAMES."""
    saved, w_hh = tr.saved, tr.weights.w_hh
    blocks = w_hh.chunk(len(tr.cell.gates), dim=0)
    if isinstance(tr.cell, LSTM):
        u = _exposure_before(tr).unsqueeze(-2)
        if tr.weights.w_hr is not None:
            blocks = tuple(w @ tr.weights.w_hr for w in blocks)
        w_i, w_f, w_g, _ = blocks
        k_i, k_f, k_g = tr.cell.gate_factors(saved)
        # O acts on c_{t+1} through h_{t+1}, not directly: as a matrix of the cell state it is zero.
        forms = [k.unsqueeze(-1) * w * u for k, w in ((k_f, w_f), (k_i, w_i), (k_g, w_g))]
        return [forms[0], torch.diag_embed(saved.f), forms[1], forms[2], torch.zeros_like(forms[0])]
    if tr.cell.name == "gru":
        k_r, k_z, k_n = tr.cell.gate_factors(saved)  # type: ignore[attr-defined]
        w_r, w_z, w_n = blocks
        pairs = ((k_r, w_r), (k_z, w_z), (k_n * saved.r, w_n))
        return [torch.diag_embed(saved.z), *(k.unsqueeze(-1) * w for k, w in pairs)]
    return [tr.cell.jacobian(saved, tr.weights)]
