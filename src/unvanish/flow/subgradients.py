"""The T subgradients of ∂E/∂W = Σ_t g_t, g_t = δa_tᵀ [h_{t-1}, x_t], W = [W_hh, W_ih]: their norms, and their partial
sums'; and the same for the sources of ∂E/∂W = Σ_k ∂E_k/∂W."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.flow.backwards import HELD_ELEMENTS, Step, arriving_at, backwards, checked_error, made_at
from unvanish.flow.exponents import EMPTY, log_norms, times_power_of_two
from unvanish.flow.files import Record
from unvanish.flow.stack import run_stack
from unvanish.nn.modules import full_precision

if TYPE_CHECKING:
    import pandas as pd

BLOCK = 32
"""Steps whose subgradients are added in one matrix product."""

SUM_ELEMENTS = 2**24
"""Of the ∂E_k/∂W held at a time; more sources are taken in several rounds."""


def dweight(da: Tensor, da_hh: Tensor, x: Tensor, h_prev: Tensor) -> Tensor:
    """‖g_t‖_F, `[T]` float64, from δa and δa_hh `[T, B, G·H]`, x `[T, B, I]`, h_{t-1} `[T, B, R]`.

    By the Gram identity ‖Σ_b u_bᵀ v_b‖_F² = Σ_{b,b'} (u_b · u_b')(v_b · v_b'), without forming g_t. δ is scaled to
    about 1 by a power of two first, so that its squares neither underflow nor overflow.
    """
    da, x, h_prev = da.double(), x.double(), h_prev.double()
    if da.shape[1] == 0:
        return da.new_zeros(len(da))
    pairs = [(da, x @ x.mT + h_prev @ h_prev.mT)]
    if da_hh is not da:
        pairs = [(da, x @ x.mT), (da_hh.double(), h_prev @ h_prev.mT)]
    exponent = torch.frexp(torch.stack([u.abs().amax((1, 2)) for u, _ in pairs]).amax(0)).exponent
    total = da.new_zeros(len(exponent))
    for u, gram in pairs:
        scaled = times_power_of_two(u, -exponent[:, None, None])
        total += ((scaled @ scaled.mT) * gram).sum((1, 2))
    return times_power_of_two(total.clamp_min(0).sqrt(), exponent)


def partial(da: Tensor, da_hh: Tensor, x: Tensor, h_prev: Tensor) -> Tensor:
    """‖Σ_{s≥t} g_s‖_F, `[T]` float64: the partial sums of ∂E/∂W from the last step backwards. Forms one g_t at a
    time."""
    T = len(da)
    norms = da.new_zeros(T, dtype=torch.float64)
    sums = [d.new_zeros(d.shape[-1], v.shape[-1], dtype=torch.float64) for d, v in ((da, x), (da_hh, h_prev))]
    for t in reversed(range(T)):
        for total, d, v in zip(sums, (da, da_hh), (x, h_prev), strict=True):
            total.addmm_(d[t].double().mT, v[t].double())
        norms[t] = torch.hypot(*(torch.linalg.vector_norm(total) for total in sums))
    return norms


@dataclass(frozen=True, repr=False)
class SourceGradients(Record):
    """How much each error source contributes to ∂E/∂W, W = [W_hh, W_ih], of one layer and direction."""

    _picture = "sources"

    log_norms: Tensor
    """[K] float64 ln‖∂E_k/∂W‖_F"""
    log_partial_sums: Tensor
    """[K] float64 ln‖S_n‖_F, S_n = Σ_{k ≤ n} ∂E_k/∂W: it vanishes only if every source's share does"""
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
        import pandas as pd

        columns = {
            "log_norm": self.log_norms,
            "log_partial_sum": self.log_partial_sums,
            "log_longest_path": self.log_longest_path,
        }
        return pd.DataFrame({"source": list(self.sources), **{name: v.numpy() for name, v in columns.items()}})

    def __repr__(self) -> str:
        low, high = self.norms.min(), self.norms.max()
        return f"SourceGradients at {self.at}: {len(self.sources)} sources, ‖∂E_k/∂W‖ {low:.2e} to {high:.2e}"


@torch.no_grad()
@full_precision()
def source_gradients(
    layer: nn.RNNBase,
    x: Tensor | PackedSequence,
    error: Tensor,
    hx: Any = None,
    *,
    at: str | None = None,
) -> SourceGradients:
    """∂E_k/∂W = Σ_{t ≤ k} δa_{k,t}ᵀ [h_{t−1}, x_t] for every step k at which there is an error.

    Args:
        layer, x, hx, at: as in `adjoint_map`.
        error: `[T, B, D·R]` ∂E_k/∂h_k, samples in the user's order. Steps where it is zero are no sources.

    Raises:
        TypeError, ValueError: an argument does not fit, or there is no error.

    Cost: one pass over the steps for some dozens of sources at a time, and the arithmetic of K full ∂E_k/∂W.
    """
    stack = run_stack(layer, x, hx)
    place = stack.index(at)
    dy, tr = checked_error(stack, error), stack.traces[place]
    sources = [k for k, there in enumerate(dy.flatten(1).any(1).tolist()) if there]
    if not sources:
        raise ValueError("error: expected a non-zero error at one step at least, got zeros")
    T, B = tr.x.shape[:2]
    at_once = SUM_ELEMENTS // (tr.weights.w_hh.numel() + tr.weights.w_ih.numel())
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
    """One ∂E_k/∂W per source: [hh | ih] · 2^exponent."""

    hh: Tensor
    """[K, G·H, R]"""
    ih: Tensor
    """[K, G·H, I]"""
    exponent: Tensor
    """[K] float64"""

    @classmethod
    def zero(cls, tr: engine.Trace, K: int) -> "_Sum":
        w_ih, w_hh, *_ = tr.weights
        hh, ih = w_hh.new_zeros(K, *w_hh.shape), w_ih.new_zeros(K, *w_ih.shape)
        return cls(hh, ih, torch.full((K,), EMPTY, dtype=torch.float64, device=tr.x.device))

    def add(self, tr: engine.Trace, steps: list[Step], samples: Tensor | None = None) -> None:
        """+= Σ_t δa_tᵀ [h_{t−1}, x_t] over these steps, of all samples or those in `samples` `[B]`."""
        place = steps[-1].place
        k, B = place.stop - place.start, tr.x.shape[1]
        exponents = self.exponent.new_full((len(steps), k, B), EMPTY)
        da, da_hh = tr.x.new_zeros(2, len(steps), k, B, tr.weights.w_hh.shape[0]).unbind()
        for i, step in enumerate(steps):
            inside = slice(step.place.start - place.start, step.place.stop - place.start)
            exponents[i, inside] = step.exponent
            da[i, inside], da_hh[i, inside] = step.adjoint.da, step.adjoint.da_hh
        if samples is not None:
            exponents = torch.where(samples, exponents, EMPTY)
        top = torch.maximum(self.exponent[place], exponents.amax((0, 2)))
        shrink, lower = self.exponent[place] - top, (exponents - top[:, None]).unsqueeze(-1)
        order = [step.t for step in steps]
        for whole, d, v in ((self.hh, da_hh, tr.saved.h_prev[order]), (self.ih, da, tr.x[order])):
            here, scaled = whole[place], times_power_of_two(d, lower)
            if bool((shrink < 0).any()):
                here.copy_(times_power_of_two(here, shrink[:, None, None]))
            left = scaled.permute(1, 3, 0, 2).reshape(-1, len(steps) * B)
            here.flatten(0, 1).addmm_(left, v.flatten(0, 1))
        self.exponent[place] = top

    def row(self, k: int) -> "_Sum":
        part = slice(k, k + 1)
        return _Sum(self.hh[part].double(), self.ih[part].double(), self.exponent[part])

    def __add__(self, other: "_Sum") -> "_Sum":
        top = torch.maximum(self.exponent, other.exponent)
        own, others = ((s.exponent - top)[:, None, None] for s in (self, other))
        hh = times_power_of_two(self.hh, own) + times_power_of_two(other.hh, others)
        return _Sum(hh, times_power_of_two(self.ih, own) + times_power_of_two(other.ih, others), top)

    def log_norms(self) -> Tensor:
        parts = torch.stack([log_norms(v.flatten(1), self.exponent) for v in (self.hh, self.ih)])
        return torch.logsumexp(2 * parts, dim=0) / 2


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
