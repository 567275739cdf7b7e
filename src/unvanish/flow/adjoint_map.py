"""The adjoint map: the gradient of each error source alone, ‖∂E_k/∂s_t‖ for every source k and step t.

Only separate sources show how far a gradient reaches: in the sum over all sources, new error enters at every step and
hides that the gradient of each one vanishes.

All sources are rows of one matrix product per step. Each row has its own exponent, so that `log_norms` stays right
where the norm itself has left the range of floating point numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.engine.precision import full_precision
from unvanish.extras import extra
from unvanish.flow import kernel_rows
from unvanish.flow.descent import HELD_ELEMENTS, arriving_at
from unvanish.flow.files import Record
from unvanish.flow.scaled_rows import log_norms_of, made_at
from unvanish.flow.stack import Stack, run_stack
from unvanish.nn.modules import SequenceModule

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class AdjointMap(Record):
    """‖∂E_k/∂s_t‖₂ of each source, step and sample."""

    log_norms: Tensor
    """[K, T, B] float64, natural logarithm; −inf where no gradient arrives (t > k)"""
    sources: tuple[int, ...]
    """k of each row: the step at whose output the error is made"""
    state: str
    """its name: "h", "c", … """
    at: str
    """the layer and direction whose state it is: "l0", "l1.reverse" """

    @property
    def norms(self) -> Tensor:
        """[K, T, B] float64; 0 where the norm is below float64's range."""
        return self.log_norms.exp()

    def over_lag(self, source: int) -> Tensor:
        """ln‖∂E_k/∂s_{k−ℓ}‖ over the lag ℓ = 0, 1, …, `[k + 1, B]`, of the source with index `source` in `sources`;
        ln‖∂E_k/∂s_{k+ℓ}‖, `[T − k, B]`, for a reversed layer, which reads k + ℓ before k."""
        k = self.sources[source]
        return self.log_norms[source, k:] if self.at.endswith(".reverse") else self.log_norms[source, : k + 1].flip(0)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per source, step that its gradient reaches, and sample: source, t, lag, sample, log_norm, norm."""
        with extra("report"):
            import pandas as pd

        k, t, b = torch.meshgrid(
            torch.tensor(self.sources, device="cpu"),
            *(torch.arange(n, device="cpu") for n in self.log_norms.shape[1:]),
            indexing="ij",
        )
        lag = t - k if self.at.endswith(".reverse") else k - t
        columns = {"source": k, "t": t, "lag": lag, "sample": b, "log_norm": self.log_norms, "norm": self.norms}
        return pd.DataFrame({name: v[lag >= 0].numpy() for name, v in columns.items()})

    def plot(self, ax: Any = None, sample: int | None = None) -> Any:
        """‖∂E_k/∂s_t‖ of every source k over the step t: a heat map, or up to eight sources as curves.

        Args:
            ax: matplotlib Axes; None: new ones.
            sample: which one to show; None: the median over samples.

        Raises:
            IndexError: there is no such sample.
        """
        from unvanish import draw

        values = self.log_norms.median(2).values if sample is None else self.log_norms[:, :, sample]
        text = rf"$\|\partial E_k/\partial {self.state}_t\|$"
        if len(self.sources) > len(draw.LINES):
            return draw.heat_map(range(values.shape[1]), self.sources, values.numpy(), text, ax)
        curves = {f"k = {k}": draw.decades(row.tolist()) for k, row in zip(self.sources, values, strict=True)}
        return draw.per_step(curves, range(values.shape[1]), "step t", text, ax)

    def _draw(self, ax: Any) -> Any:
        return self.plot(ax)

    def __repr__(self) -> str:
        K, T, B = self.log_norms.shape
        return f"AdjointMap of {self.state} at {self.at}: {K} sources, {T} steps, {B} samples"


@torch.no_grad()
@full_precision()
def adjoint_map(
    layer: SequenceModule,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    error: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    at: str | None = None,
    sources: Literal["all"] | int | Sequence[int] = "all",
    state: str | None = None,
    seed: int = 0,
) -> AdjointMap:
    """‖∂E_k/∂s_t‖₂, t ≤ k: the gradient of an error at the output h_k of the last layer, at state s of one layer.

        ∂E_k/∂s_t = (∂s_{t+1}/∂s_t)ᵀ ∂E_k/∂s_{t+1},  starting from ∂E_k/∂h_k

    Args:
        layer: nn.RNN, nn.LSTM or nn.GRU of torch or unvanish, or `unvanish.nn.Recurrent`. Dropout between layers is
            off.
        x: the input in the layer's own layout: padded, unbatched or packed.
        hx: the initial state; None: zeros.
        error: `[K, B, D·R]` ∂E_k/∂h_k of each source, samples in the user's order; `[K, B, R]` with D = 2 is the error
            of `at`'s direction. None: one random unit vector per direction, from `seed`, the same for all sources and
            samples.
        lengths: `[B]` steps of each sample of a padded x.
        at: layer and direction whose state is measured: "l0", "l1.reverse", …; by default the last layer, forward.
        sources: steps k, negative ones from the end; a count, spread evenly and including the last step; or "all".
        state: its name; by default the one that carries the gradient over time (`Cell.memory`: c of the LSTM, h of the
            RNN and the GRU).
        seed: seed of the random errors.

    Returns:
        The map; `norms` and `log_norms` are `[K, T, B]`. A reversed layer reads from the end, so its gradient travels
        to t ≥ k. A source beyond the end of a sample has no error. The layer's `clip` and `h_detach` are ignored.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Cost: one pass over the steps with the rows of all sources k ≥ t; memory for one step's rows, and a bounded amount
    more when `at` is below the last layer.
    """
    return map_of(run_stack(layer, x, hx, lengths), error, at, sources, state, seed)


@torch.no_grad()
@full_precision()
def map_of(
    stack: Stack,
    error: Tensor | None,
    at: str | None = None,
    sources: Literal["all"] | int | Sequence[int] = "all",
    state: str | None = None,
    seed: int = 0,
) -> AdjointMap:
    """`adjoint_map` of a module that has been run."""
    place = stack.index(at)
    tr = stack.traces[place]
    chosen = _state(state, tr)
    T, B = stack.inputs.x.shape[:2]
    steps = _sources(sources, T)
    given = _errors(stack, error, len(steps), B, place, seed)
    below = place < len(stack.layers) - stack.directions
    at_once = max(1, HELD_ELEMENTS // (T * B * given.shape[-1])) if below else len(steps)
    parts = []
    number = tr.cell.states.index(chosen)
    for first in range(0, len(steps), at_once):
        here, errors = steps[first : first + at_once], given[first : first + at_once]
        K = len(here)
        if not below and kernel_rows.many(tr, K):
            own = errors.unflatten(-1, (stack.directions, -1))[:, :, place % stack.directions]
            parts.append(kernel_rows.log_norms_of_many(tr, here, own, number))
            continue
        entering = arriving_at(stack, place, K, made_at(here, errors))
        if not below and kernel_rows.few(tr, K):
            parts.append(torch.stack([kernel_rows.log_norms_of_one(tr, t, entering(t), number) for t in here]))
        else:
            parts.append(log_norms_of(tr, K, entering, number, K >= kernel_rows.MANY and tr.weights.w_hr is None))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    log_norms = stack.inputs.in_user_order(whole, 2)
    return AdjointMap(log_norms.cpu(), tuple(steps), chosen, stack.layers[place].name)


def _state(state: str | None, tr: engine.Trace) -> str:
    states = tr.cell.states
    if state is None:
        return tr.cell.remembers
    if state not in states:
        raise ValueError(f"state: expected {' or '.join(states)} for {tr.cell.name}, got {state!r}")
    return state


def _sources(sources: Literal["all"] | int | Sequence[int], T: int) -> list[int]:
    if isinstance(sources, str) and sources == "all":
        return list(range(T))
    if isinstance(sources, SupportsIndex) and not isinstance(sources, Iterable):
        count = index(sources)
        if not 1 <= count <= T:
            raise ValueError(f"sources: expected a count from 1 to {T}, the steps, got {count}")
        return sorted({round(T - 1 - i * T / count) for i in range(count)})
    if isinstance(sources, str) or not isinstance(sources, Iterable):
        raise ValueError(f"sources: expected 'all', a count or a list of steps, got {sources!r}")
    if not all(isinstance(k, SupportsIndex) for k in sources):
        raise ValueError(f"sources: expected whole numbers, got {list(sources)}")
    given = [index(k) for k in sources]
    steps = [k % T for k in given]
    if not steps or len(set(steps)) < len(steps) or not all(-T <= k < T for k in given):
        raise ValueError(
            f"sources: expected different steps from 0 to {T - 1} (or −1 to −{T} from the end), got {list(sources)}"
        )
    if steps != sorted(steps):
        raise ValueError(f"sources: expected steps in increasing order, got {list(sources)}")
    return steps


def _errors(stack: Stack, given: Tensor | None, K: int, B: int, place: int, seed: int) -> Tensor:
    """[K, B, D·R] in internal order."""
    tr, D = stack.traces[-1], stack.directions
    R = tr.y.shape[-1]
    if given is None:
        random = torch.randn(D, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.nn.functional.normalize(random, dim=-1).flatten().to(tr.y).expand(K, B, -1)
    if given.dtype != tr.y.dtype:
        raise ValueError(f"error: expected the layer's dtype {tr.y.dtype}, got {given.dtype}")
    if D == 2 and given.shape == (K, B, R):
        direction = stack.layers[place].reverse
        zero = torch.zeros_like(given)
        given = torch.cat([zero, given] if direction else [given, zero], dim=-1)
    if given.shape != (K, B, D * R):
        raise ValueError(f"error: expected [K, B, D·R] = {(K, B, D * R)}, got {tuple(given.shape)}")
    return stack.inputs.in_internal_order(given.detach(), 1)
