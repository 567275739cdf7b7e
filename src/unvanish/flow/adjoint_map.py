"""The adjoint map: how each error source alone travels back, ‖∂E_k/∂s_t‖ for every source k and step t.

Only separate sources tell how far an error reaches: in the summed flow new error enters at every step and hides that
each one dies.

All sources are rows of one matrix product per step. Each row is kept near 1 by exact powers of two, whose exponents
are carried along, so that `log_norms` stays right where the norm itself has left the range of floating point numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.flow.exponents import times_power_of_two
from unvanish.flow.stack import Stack, reading_order, run_stack, saved_at

EMPTY = -(2.0**40)
"""The exponent of a row that is zero: below that of any row that is not."""


@dataclass(frozen=True, repr=False)
class AdjointMap:
    """‖∂E_k/∂s_t‖₂ of each source, step and sample."""

    log_norms: Tensor
    """[K, T, B] float64, natural logarithm; −inf where no error arrives (t > k)"""
    sources: tuple[int, ...]
    """k of each row: the step at whose output the error is made"""
    state: str
    """"h" or "c" """
    at: str
    """the layer and direction whose state it is: "l0", "l1.reverse" """

    @property
    def norms(self) -> Tensor:
        """[K, T, B] float64; 0 where the norm is below float64's range."""
        return self.log_norms.exp()

    def over_lag(self, source: int) -> Tensor:
        """ln‖∂E_k/∂s_{k−ℓ}‖ over ℓ = 0 … k, `[k + 1, B]`, of the source with index `source` in `sources`."""
        return self.log_norms[source, : self.sources[source] + 1].flip(0)

    def __repr__(self) -> str:
        K, T, B = self.log_norms.shape
        return f"AdjointMap of {self.state} at {self.at}: {K} sources, {T} steps, {B} samples"


@dataclass
class _Rows:
    """Vectors v · 2^exponent, v `[K, B, n]` near 1, exponent `[K, B]` float64."""

    v: Tensor
    exponent: Tensor

    def __add__(self, other: "_Rows") -> "_Rows":
        top = torch.maximum(self.exponent, other.exponent)
        return _Rows(self._scaled_to(top) + other._scaled_to(top), top)

    def _scaled_to(self, exponent: Tensor) -> Tensor:
        return times_power_of_two(self.v, (self.exponent - exponent).unsqueeze(-1))


def adjoint_map(
    layer: nn.RNNBase,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    sources: Literal["all"] | int | Sequence[int] = "all",
    state: Literal["h", "c"] | None = None,
    cotangent: Tensor | None = None,
    at: str | None = None,
    seed: int = 0,
) -> AdjointMap:
    """‖∂E_k/∂s_t‖₂, t ≤ k: the error made at the output h_k of the last layer, measured at state s of one layer.

        ∂E_k/∂s_t = (∂s_{t+1}/∂s_t)ᵀ ∂E_k/∂s_{t+1},  starting from the cotangent ∂E_k/∂h_k

    Args:
        layer: nn.RNN, nn.LSTM or nn.GRU of torch or unvanish. Dropout between layers is off.
        x: the input in the layer's own layout: padded, unbatched or packed.
        hx: the initial state; None: zeros.
        sources: steps k; a count, spread evenly with the last step among them; or "all".
        state: "c" or "h"; by default c for the LSTM and h for the others.
        cotangent: `[K, B, D·R]` ∂E_k/∂h_k, samples in the user's order; `[K, B, R]` with D = 2 is the error of `at`'s
        direction. None:
            one random unit vector per direction, from `seed`, the same for all sources and samples.
        at: "l0", "l1.reverse", …: whose state is measured; by default the last layer's, forward.
        seed: of the random cotangents.

    Returns:
        The map; `norms` and `log_norms` are `[K, T, B]`. A reversed layer reads from the end, so its error travels to
        t ≥ k. A source at a step where a sample has no input makes no error.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Cost: one pass over the steps with K·B rows; memory for one step's rows, and for `[T, K, B, D·R]` when `at` is
    below the last layer.
    """
    stack = run_stack(layer, x, hx)
    place = stack.index(at)
    chosen = _state(state, stack.traces[place])
    T, B = stack.inputs.x.shape[:2]
    steps = _sources(sources, T)
    error = _cotangents(stack, cotangent, len(steps), B, place, seed)
    D, top = stack.directions, len(stack.layers) - stack.directions
    arriving: list[_Rows | None] | None = None
    for first in range(top, -1, -D):
        inside = [place] if first <= place < first + D else range(first, first + D)
        below: list[_Rows | None] = [None] * T
        for p in inside:
            tr = stack.traces[p]
            width = tr.y.shape[-1]
            part = slice((p - first) * width, (p - first + 1) * width)
            measured = _scan(
                tr, steps, error[..., part] if first == top else None, arriving, part, p == place, chosen, below
            )
            if p == place:
                log_norms = stack.in_user_order(measured, 2)
                return AdjointMap(log_norms.cpu(), tuple(steps), chosen, stack.layers[place].name)
        arriving = below
    raise AssertionError("the measured layer is one of the layers")


@torch.no_grad()
def _scan(
    tr: engine.Trace,
    sources: list[int],
    error: Tensor | None,
    arriving: list["_Rows | None"] | None,
    part: slice,
    measure: bool,
    state: str,
    below: list["_Rows | None"],
) -> Tensor:
    """Carry all sources back through one layer and direction.

    Error enters from `error` `[K, B, R]` at each source's step, or from `arriving`, the rows that the layer above
    sent to each step. Returns the
    log norms of the state if `measure`, else adds the rows that go on to the layer below to `below`.
    """
    T, B = tr.x.shape[:2]
    K, R = len(sources), tr.y.shape[-1]
    log_norms = torch.full((K if measure else 0, T, B), -math.inf, dtype=torch.float64, device=tr.x.device)
    sizes = [s.shape[-1] for s in tr.final]
    v = tr.x.new_zeros(K, B, sum(sizes))
    exponent = torch.full((K, B), EMPTY, dtype=torch.float64, device=tr.x.device)
    position = {k: i for i, k in enumerate(sources)}
    seen = torch.zeros(K, dtype=torch.bool)
    for t in reversed(list(reading_order(tr))):
        on = None if tr.active is None else tr.active[t]
        if error is not None:
            if t in position:
                i = position[t]
                seen[i] = True
                start = error[i] if on is None else torch.where(on, error[i], 0.0)
                made = _normalised(_Rows(start, torch.zeros_like(exponent[i])))
                v[i, :, :R], exponent[i] = made.v, made.exponent
            if not bool(seen.any()):
                continue
            rows = slice(int(seen.nonzero()[0]), int(seen.nonzero()[-1]) + 1)
        else:
            assert arriving is not None
            rows = slice(0, K)
            incoming = arriving[t]
            if incoming is not None:
                wide = torch.zeros_like(v)
                wide[..., :R] = incoming.v[..., part] if on is None else torch.where(on, incoming.v[..., part], 0.0)
                total = _Rows(v, exponent) + _Rows(wide, incoming.exponent)
                v, exponent = total.v, total.exponent
        step = tr.cell.adjoint(tuple(v[rows].split(sizes, dim=-1)), saved_at(tr, t), tr.weights)
        if measure:
            d = step.state[tr.cell.states.index(state)]
            norm = torch.linalg.vector_norm(d, dim=-1, dtype=torch.float64)
            log = norm.log() + exponent[rows] * math.log(2)
            log_norms[rows, t] = log if on is None else torch.where(on.squeeze(-1), log, -math.inf)
        else:
            dx = step.da @ tr.weights.w_ih
            dx = dx if on is None else torch.where(on, dx, 0.0)
            new = _Rows(tr.x.new_zeros(K, B, dx.shape[-1]), torch.full_like(exponent, EMPTY))
            new.v[rows], new.exponent[rows] = dx, exponent[rows]
            older = below[t]
            below[t] = _normalised(new if older is None else older + new)
        back = torch.cat(step.previous, dim=-1)
        v[rows] = back if on is None else torch.where(on, back, v[rows])
        scaled = _normalised(_Rows(v[rows], exponent[rows]))
        v[rows], exponent[rows] = scaled.v, scaled.exponent
    return log_norms


def _normalised(rows: _Rows) -> _Rows:
    """The same vectors with their largest component in [1/2, 1); a zero row gets the exponent of nothing."""
    largest = rows.v.abs().amax(-1)
    shift = torch.frexp(largest).exponent
    exponent = torch.where(largest > 0, rows.exponent + shift, EMPTY)
    return _Rows(times_power_of_two(rows.v, -shift.unsqueeze(-1)), exponent)


def _state(state: str | None, tr: engine.Trace) -> str:
    states = tr.cell.states
    if state is None:
        return states[-1]
    if state not in states:
        raise ValueError(f"state: expected {' or '.join(states)} for {tr.cell.name}, got {state!r}")
    return state


def _sources(sources: Literal["all"] | int | Sequence[int], T: int) -> list[int]:
    if sources == "all":
        return list(range(T))
    if isinstance(sources, int):
        if not 1 <= sources <= T:
            raise ValueError(f"sources: expected a count from 1 to {T}, the steps, got {sources}")
        return sorted({round(T - 1 - i * T / sources) for i in range(sources)})
    if isinstance(sources, str):
        raise ValueError(f"sources: expected 'all', a count or a list of steps, got {sources!r}")
    steps = [int(k) for k in sources]
    if not steps or len(set(steps)) < len(steps) or not all(-T <= k < T for k in steps):
        raise ValueError(f"sources: expected different steps from 0 to {T - 1}, got {list(sources)}")
    steps = [k % T for k in steps]
    if steps != sorted(steps):
        raise ValueError(f"sources: expected steps in increasing order, got {list(sources)}")
    return steps


def _cotangents(stack: Stack, given: Tensor | None, K: int, B: int, place: int, seed: int) -> Tensor:
    """[K, B, D·R] in internal order."""
    tr, D = stack.traces[-1], stack.directions
    R = tr.y.shape[-1]
    if given is None:
        random = torch.randn(D, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.nn.functional.normalize(random, dim=-1).flatten().to(tr.y).expand(K, B, -1)
    if given.dtype != tr.y.dtype:
        raise ValueError(f"cotangent: expected the layer's dtype {tr.y.dtype}, got {given.dtype}")
    if D == 2 and given.shape == (K, B, R):
        direction = stack.layers[place].reverse
        zero = torch.zeros_like(given)
        given = torch.cat([zero, given] if direction else [given, zero], dim=-1)
    if given.shape != (K, B, D * R):
        raise ValueError(f"cotangent: expected [K, B, D·R] = {(K, B, D * R)}, got {tuple(given.shape)}")
    return stack.in_internal_order(given.detach(), 1)
