"""The T subgradients of ∂E/∂W = Σ_t g_t, g_t = δa_tᵀ [h_{t-1}, x_t], W = [W_hh, W_ih]: their norms, and their partial
sums'; and the same for the sources of ∂E/∂W = Σ_k ∂E_k/∂W."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.cells import Point
from unvanish.engine.manual import recurrent_pairs
from unvanish.engine.precision import full_precision
from unvanish.extras import extra
from unvanish.flow.descent import HELD_ELEMENTS, arriving_at, checked_error
from unvanish.flow.exponents import EMPTY, log_norms, times_power_of_two
from unvanish.flow.files import Record
from unvanish.flow.scaled_rows import Step, backwards, made_at
from unvanish.flow.stack import run_stack
from unvanish.nn.modules import SequenceModule

if TYPE_CHECKING:
    import pandas as pd

BLOCK = 32
"""Steps whose subgradients are added in one matrix product."""

SUM_ELEMENTS = 2**24
"""The most numbers of ∂E_k/∂W kept at a time; more sources take several rounds."""


Pairs = list[tuple[Tensor, tuple[Tensor, ...]]]
"""δ `[T, B, n]` and the inputs of the weights behind it, each `[T, B, m]`: g_t = Σ_b δ_tbᵀ [s_tb, …]"""


def weight_pairs(at: Point, da: Tensor, da_hh: Tensor | None) -> Pairs:
    """The factors of g_t for W = [W_hh, W_ih] of steps whose states are known."""
    if da_hh is None:
        return [(da, (at.x,))]
    recurrent = recurrent_pairs(at, da_hh)
    if da_hh is da and len(recurrent) == 1:
        return [(da, (at.x, recurrent[0][1]))]
    return [(da, (at.x,)), *((d, (s,)) for d, s in recurrent)]


def dweight(pairs: Pairs) -> Tensor:
    """‖g_t‖_F, `[T]` float64.

    By the Gram identity ‖Σ_b u_bᵀ v_b‖_F² = Σ_{b,b'} (u_b · u_b')(v_b · v_b'), without forming g_t. δ is scaled to
    about 1 by a power of two first, so that its squares neither underflow nor overflow.
    """
    doubled = [(d.double(), tuple(s.double() for s in factors)) for d, factors in pairs]
    first = doubled[0][0]
    if first.shape[1] == 0:
        return first.new_zeros(len(first))
    exponent = torch.frexp(torch.stack([d.abs().amax((1, 2)) for d, _ in doubled]).amax(0)).exponent
    total = first.new_zeros(len(exponent))
    for d, factors in doubled:
        scaled = times_power_of_two(d, -exponent[:, None, None])
        gram = sum(s @ s.mT for s in factors)
        total += ((scaled @ scaled.mT) * gram).sum((1, 2))
    return times_power_of_two(total.clamp_min(0).sqrt(), exponent)


def partial_sums(pairs: Pairs) -> Tensor:
    """‖Σ_{s≥t} g_s‖_F, `[T]` float64: the partial sums of ∂E/∂W from the last step backwards. Forms one g_t at a
    time."""
    flat = [(d, s) for d, factors in pairs for s in factors]
    T = len(flat[0][0])
    norms = flat[0][0].new_zeros(T, dtype=torch.float64)
    sums = [d.new_zeros(d.shape[-1], s.shape[-1], dtype=torch.float64) for d, s in flat]
    for t in reversed(range(T)):
        for total, (d, s) in zip(sums, flat, strict=True):
            total.addmm_(d[t].double().mT, s[t].double())
        norms[t] = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(total) for total in sums]))
    return norms


@dataclass(frozen=True, repr=False)
class SourceGradients(Record):
    """How much each error source contributes to ∂E/∂W, W = [W_hh, W_ih], of one layer and direction."""

    log_norms: Tensor
    """[K] float64 ln‖∂E_k/∂W‖_F"""
    log_partial_sums: Tensor
    """[K] float64 ln‖S_n‖_F, S_n = Σ_{k ≤ n} ∂E_k/∂W; S_n vanishes only if every ∂E_k/∂W does"""
    log_longest_path: Tensor
    """[K] float64 ln‖δa_{k,1}ᵀ [h_0, x_1]‖_F: the first step's term alone, the one the textbook derivation keeps"""
    sources: tuple[int, ...]
    """k: the steps at which there is an error"""
    at: str
    """the layer and direction: "l0", "l1.reverse" """

    @property
    def norms(self) -> Tensor:
        """[K] ‖∂E_k/∂W‖_F"""
        return self.log_norms.exp()

    @property
    def partial_sums(self) -> Tensor:
        """[K] ‖S_n‖_F"""
        return self.log_partial_sums.exp()

    @property
    def longest_path(self) -> Tensor:
        """[K] the norm of the first step's term; 0 also where it is below float64's range."""
        return self.log_longest_path.exp()

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per source: source, log_norm, log_partial_sum, log_longest_path."""
        with extra("report"):
            import pandas as pd

        columns = {
            "log_norm": self.log_norms,
            "log_partial_sum": self.log_partial_sums,
            "log_longest_path": self.log_longest_path,
        }
        return pd.DataFrame({"source": list(self.sources), **{name: v.numpy() for name, v in columns.items()}})

    def _draw(self, ax: Any) -> Any:
        from unvanish import draw

        curves = {
            r"$\|\partial E_k/\partial W\|$": self.log_norms,
            r"$\|S_k\|$": self.log_partial_sums,
            "the first step's term alone": self.log_longest_path,
        }
        powers = {name: draw.decades(v.tolist()) for name, v in curves.items()}
        return draw.per_step(powers, self.sources, "error source k", "norm of the weight's gradient", ax)

    def __repr__(self) -> str:
        low, high = self.norms.min(), self.norms.max()
        return f"SourceGradients at {self.at}: {len(self.sources)} sources, ‖∂E_k/∂W‖ {low:.2e} to {high:.2e}"


@torch.no_grad()
@full_precision()
def source_gradients(
    layer: SequenceModule,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    error: Tensor,
    lengths: Tensor | Sequence[int] | None = None,
    at: str | None = None,
) -> SourceGradients:
    """∂E_k/∂W = Σ_{t ≤ k} δa_{k,t}ᵀ [h_{t−1}, x_t] for every step k at which there is an error.

    Args:
        layer, x, hx, lengths, at: as in `adjoint_map`.
        error: `[T, B, D·R]` ∂E_k/∂h_k, samples in the user's order. Steps where it is zero are no sources.

    Raises:
        TypeError, ValueError: an argument does not fit, or there is no error.

    Cost: one pass over the steps for some dozens of sources at a time, and the arithmetic of K full ∂E_k/∂W.
    """
    stack = run_stack(layer, x, hx, lengths)
    place = stack.index(at)
    dy, tr = checked_error(stack, error), stack.traces[place]
    sources = [k for k, there in enumerate(dy.flatten(1).any(1).tolist()) if there]
    if not sources:
        raise ValueError("error: expected a non-zero error at one step at least, got zeros")
    T, B = tr.x.shape[:2]
    at_once = SUM_ELEMENTS // sum(w.numel() for w in tr.weights[:2] if w is not None)
    if place < len(stack.layers) - stack.directions:
        at_once = min(at_once, HELD_ELEMENTS // (T * B * dy.shape[-1]))
    found: list[Tensor] = []
    total: _Sum | None = None
    for first in range(0, len(sources), max(1, at_once)):
        here = sources[first : first + max(1, at_once)]
        entering = arriving_at(stack, place, len(here), made_at(here, dy[here]))
        gradients, longest = _sums(tr, len(here), backwards(tr, len(here), entering))
        partial_sums = []
        for k in range(len(here)):
            total = gradients.row(k) if total is None else total + gradients.row(k)
            partial_sums.append(total.log_norms())
        found.append(torch.stack([gradients.log_norms(), torch.cat(partial_sums), longest.log_norms()]))
    norms, sums, longest_path = torch.cat(found, dim=1).cpu().unbind()
    return SourceGradients(norms, sums, longest_path, tuple(sources), stack.layers[place].name)


@dataclass
class _Sum:
    """One ∂E_k/∂W per source, W = [W_hh, W_ih] by its blocks: Σ of parts, each times 2^exponent."""

    parts: list[Tensor]
    """[K, n, m] each"""
    exponent: Tensor
    """[K] float64"""

    @classmethod
    def zero(cls, tr: engine.Trace, K: int) -> "_Sum":
        parts = [d.new_zeros(K, d.shape[-1], s.shape[-1]) for d, s in _factors(tr, _empty(tr), slice(0, 1))]
        return cls(parts, torch.full((K,), EMPTY, dtype=torch.float64, device=tr.x.device))

    def add(self, tr: engine.Trace, steps: list[Step], samples: Tensor | None = None) -> None:
        """+= Σ_t δa_tᵀ [h_{t−1}, x_t] over these steps, of all samples or those in `samples` `[B]`."""
        place = steps[-1].place
        k, B = place.stop - place.start, tr.x.shape[1]
        exponents = self.exponent.new_full((len(steps), B, k), EMPTY)
        for i, step in enumerate(steps):
            exponents[i, :, step.place.start - place.start : step.place.stop - place.start] = step.exponent
        if samples is not None:
            exponents = torch.where(samples[:, None], exponents, EMPTY)
        top = torch.maximum(self.exponent[place], exponents.amax((0, 1)))
        shrink, lower = self.exponent[place] - top, (exponents - top).unsqueeze(-1)
        shrinks, order = bool((shrink < 0).any()), [step.t for step in steps]
        # δ of all sources at these steps, with the axis of the sources after that of the samples.
        gathered = [self._gather(tr, steps, which) for which in (0, 1)]
        for whole, (d, s) in zip(self.parts, _factors(tr, tuple(gathered), order), strict=True):
            here, scaled = whole[place], times_power_of_two(d, lower)
            if shrinks:
                here.copy_(times_power_of_two(here, shrink[:, None, None]))
            left = scaled.permute(2, 3, 0, 1).reshape(-1, len(steps) * B)
            here.flatten(0, 1).addmm_(left, s.flatten(0, 1))
        self.exponent[place] = top

    @staticmethod
    def _gather(tr: engine.Trace, steps: list[Step], which: int) -> Tensor | None:
        """δp (0) or δq (1) of these steps, `[τ, B, k, G·H]`; None where the cell has none."""
        place = steps[-1].place
        first = steps[0].adjoint
        assert first is not None
        if which == 1 and (first.da_hh is None or first.da_hh is first.da):
            return None
        width = (first.da if which == 0 else first.da_hh).shape[-1]  # type: ignore[union-attr]
        out = tr.x.new_zeros(len(steps), tr.x.shape[1], place.stop - place.start, width)
        for i, step in enumerate(steps):
            assert step.adjoint is not None
            made = step.adjoint.da if which == 0 else step.adjoint.da_hh
            assert made is not None
            out[i, :, step.place.start - place.start : step.place.stop - place.start] = made
        return out

    def row(self, k: int) -> "_Sum":
        part = slice(k, k + 1)
        return _Sum([v[part].double() for v in self.parts], self.exponent[part])

    def __add__(self, other: "_Sum") -> "_Sum":
        top = torch.maximum(self.exponent, other.exponent)
        own, others = ((s.exponent - top)[:, None, None] for s in (self, other))
        both = zip(self.parts, other.parts, strict=True)
        return _Sum([times_power_of_two(a, own) + times_power_of_two(b, others) for a, b in both], top)

    def log_norms(self) -> Tensor:
        parts = torch.stack([log_norms(v.flatten(1), self.exponent) for v in self.parts])
        return torch.logsumexp(2 * parts, dim=0) / 2


def _factors(
    tr: engine.Trace, deltas: tuple[Tensor | None, ...], steps: list[int] | slice
) -> list[tuple[Tensor, Tensor]]:
    """(δ `[τ, B, k, n]`, what it is multiplied with `[τ, B, m]`) of every block of W = [W_hh, W_ih]."""
    da, da_hh = deltas
    assert da is not None
    before, after = (tuple(s[steps] for s in kind) for kind in (tr.before, tr.after))
    part = Point(tr.cell, tr.weights, tr.x[steps], before, after)
    if tr.weights.w_hh is None:
        return [(da, part.x)]
    return [*recurrent_pairs(part, da if da_hh is None else da_hh), (da, part.x)]


def _empty(tr: engine.Trace) -> tuple[Tensor, Tensor | None]:
    w_ih, w_hh, *_ = tr.weights
    da = tr.x.new_zeros(1, 1, 1, w_ih.shape[0])
    return da, None if w_hh is None else tr.x.new_zeros(1, 1, 1, w_hh.shape[0])


def _sums(tr: engine.Trace, K: int, steps: Iterator[Step]) -> tuple[_Sum, _Sum]:
    """(∂E_k/∂W, its term of the first step read)."""
    first = _first_read(tr)
    gradients, longest = _Sum.zero(tr, K), _Sum.zero(tr, K)
    block: list[Step] = []
    for step in steps:
        block.append(step)
        if len(block) == BLOCK:
            gradients.add(tr, block)
            block = []
        if bool((first == step.t).any()):
            longest.add(tr, [step], (first == step.t).to(tr.x.device))
    if block:
        gradients.add(tr, block)
    return gradients, longest


def _first_read(tr: engine.Trace) -> Tensor:
    """[B] the step that each sample's direction reads first; on the CPU."""
    T, B = tr.x.shape[:2]
    if not tr.reverse:
        return torch.zeros(B, dtype=torch.int64)
    return torch.full((B,), T - 1) if tr.active is None else tr.active.squeeze(-1).sum(0).cpu() - 1
