"""Survival: the fraction of the last step's gradient that remains a lag earlier."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.cells import State
from unvanish.engine.precision import full_precision
from unvanish.flow.exponents import Rows, log_norms
from unvanish.flow.scaled_rows import Some, backwards
from unvanish.flow.stack import check_input
from unvanish.nn.modules import (
    LayerDirection,
    SequenceModule,
    TimeMajor,
    cell_of,
    evaluating,
    initial_states,
    layer_directions,
    run_layers,
    time_major,
)

Paths = Literal["carry", "exact"]


class Window(NamedTuple):
    """The last `lag` steps that each sample of a traced layer reads, in float64."""

    trace: engine.Trace
    inside: Tensor
    """[T, B] True there"""

    @property
    def log_carry(self) -> Tensor:
        """ln|∂m_t/∂m_{t−1}| of the carry alone (LSTM: ln f_t, GRU: ln z_t) `[lag, B, H]`, in input order."""
        carry = self.trace.cell.carry(self.trace)
        assert carry is not None
        return self._within(carry.abs().log())

    @property
    def log_gate(self) -> Tensor:
        """ln of the gate that carries the memory, or of 1 − it where its complement does `[lag, B, H]`: `log_carry` but
        for cells whose gate reads the memory itself, as with peepholes."""
        cell = self.trace.cell
        assert cell.carry_gate is not None
        gate, sign = cell.carry_gate
        value = self.trace.gates[..., cell.gates.index(gate), :]
        return self._within((value if sign > 0 else 1 - value).log())

    def _within(self, v: Tensor) -> Tensor:
        B, H = v.shape[1:]
        # For each sample these steps are contiguous, and their number is the same.
        return v.transpose(0, 1)[self.inside.T].reshape(B, -1, H).transpose(0, 1)


def survival(
    layer: SequenceModule,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lag: int,
    lengths: Tensor | Sequence[int] | None = None,
    at: str | None = None,
    paths: Paths = "carry",
) -> float:
    """S(ℓ) = ‖∂m_k/∂m_{k−ℓ}‖_F / √H of the memory m (LSTM: c, GRU: h), root mean square over samples:
    ‖∂E_k/∂m_{k−ℓ}‖ / ‖∂E_k/∂m_k‖ for errors of all directions.

        paths="carry"   ∂m_k/∂m_{k−ℓ} = diag(Π_t C_t), C_t = f_t or z_t: the constant error carousel alone
        paths="exact"   the whole derivative, through every gate and every other state

    k is the last step that a sample reads. For a gradient of uniformly distributed direction, S² is the expected
    fraction of its squared norm that remains. Computed in float64.

    Args:
        layer: nn.LSTM, nn.GRU or `unvanish.nn.Recurrent` with a cell that carries its memory. Dropout between layers is
            off.
        x: the input in the layer's own layout: padded, unbatched or packed.
        hx: the initial state; None: zeros.
        lag: ℓ ≥ 1, at most the steps of the shortest sample.
        lengths: `[B]` steps of each sample of a padded x.
        at: layer and direction: "l0", "l1.reverse", …; by default the last layer, forward.
        paths: "carry" or "exact".

    Raises:
        TypeError: the layer's cell has no carry, like a plain RNN.
        ValueError: an argument does not fit; the message names it.

    Cost: one forward pass; "exact" also sends H gradients per sample back over the lag.

    >>> lstm = torch.nn.LSTM(2, 4).double()
    >>> _ = [torch.nn.init.zeros_(p) for p in lstm.parameters()]          # f = σ(0) = 1/2 everywhere
    >>> round(survival(lstm, torch.zeros(8, 1, 2, dtype=torch.float64), lag=3), 12)
    0.125
    """
    if paths not in ("carry", "exact"):
        raise ValueError(f"paths: expected 'carry' or 'exact', got {paths!r}")
    found = windows(layer, x, lag, hx, lengths)
    names = [d.name for d, _ in found]
    if at is not None and at not in names:
        raise ValueError(f"at: expected one of {', '.join(names)}, got {at!r}")
    window = {d.name: w for d, w in found}[at or names[-2 if layer.bidirectional else -1]]
    return math.exp(log_survival(window, paths))


@torch.no_grad()
@full_precision()
def log_survival(window: Window, paths: Paths) -> float:
    """ln S, right where S itself would underflow."""
    if paths == "carry":
        log_square = 2 * window.log_carry.sum(0)
        return 0.5 * float(log_square.flatten().logsumexp(0) - math.log(log_square.numel()))
    tr, inside = window.trace, window.inside
    T, B = inside.shape
    memory = tr.cell.states.index(tr.cell.remembers)
    H = tr.final[memory].shape[-1]
    # One error per unit of the memory at k, all propagated back at once.
    rows = torch.eye(H, dtype=tr.x.dtype, device=tr.x.device).expand(B, H, H)
    steps = torch.arange(T, device=inside.device)[:, None]
    first, last = torch.where(inside, steps, T).amin(0), torch.where(inside, steps, -1).amax(0)
    end, start = (first, last) if tr.reverse else (last, first)
    ends, starts = set(end.tolist()), set(start.tolist())

    def entering(t: int) -> Some | None:
        if t not in ends:
            return None
        return Some(slice(0, H), Rows.of(torch.where((end == t)[:, None, None], rows, 0.0)), memory)

    logs = torch.full((B, H), -torch.inf, dtype=torch.float64, device=tr.x.device)
    for step in backwards(tr, H, entering):
        assert step.adjoint is not None
        if step.t in starts:
            here = (start == step.t)[:, None]
            logs = torch.where(here, log_norms(step.adjoint.previous[memory], step.exponent), logs)
    log_square = (2 * logs).logsumexp(1)
    return 0.5 * float(log_square.logsumexp(0) - math.log(B * H))


@torch.no_grad()
@full_precision()
def windows(
    layer: SequenceModule,
    x: Tensor | PackedSequence,
    lag: int,
    hx: Any,
    lengths: Tensor | Sequence[int] | None = None,
) -> list[tuple[LayerDirection, Window]]:
    """Every layer and direction of a layer whose cell carries its memory, run over x in float64.

    Raises:
        TypeError, ValueError: as `survival`.
    """
    inputs, states, directions = _checked(layer, x, lag, hx, lengths)
    T, B = inputs.x.shape[:2]
    ends = torch.full((B,), T, device=inputs.x.device) if inputs.lengths is None else inputs.lengths
    steps = torch.arange(T, device=inputs.x.device)[:, None]
    first, last = (steps < lag).expand(T, B), ((steps >= ends - lag) & (steps < ends)).expand(T, B)

    def run(d: LayerDirection, x: Tensor, state: State) -> engine.Trace:
        return engine.trace(d.cell, x, state, d.weights, inputs.lengths, d.reverse)

    traces = run_layers(directions, inputs.x, states, run)
    return [(d, Window(tr, first if d.reverse else last)) for d, tr in zip(directions, traces, strict=True)]


def _checked(
    layer: SequenceModule, x: Any, lag: int, hx: Any, lengths: Any
) -> tuple[TimeMajor, list[Any], list[LayerDirection]]:
    if not isinstance(layer, SequenceModule):
        raise TypeError(f"layer: expected nn.LSTM, nn.GRU or unvanish.nn.Recurrent, got {type(layer).__name__}")
    cell = cell_of(layer)
    if not cell.carries:
        raise TypeError(f"layer: expected a cell that carries its memory, as LSTM and GRU do, got {cell.name}")
    inputs = time_major(layer, x, lengths)
    check_input(layer, inputs)
    if not bool(inputs.x.isfinite().all()):
        raise ValueError("x: expected finite numbers, got a NaN or infinity, after which no state survives")
    shortest = inputs.x.shape[0] if inputs.lengths is None else int(inputs.lengths.min())
    if isinstance(lag, bool) or not isinstance(lag, int) or not 1 <= lag <= shortest:
        raise ValueError(f"lag: expected 1 to {shortest} steps, those of the shortest sample of x, got {lag!r}")
    states = [tuple(s.detach().double() for s in state) for state in initial_states(layer, hx, inputs)]
    with evaluating(layer):
        directions = [d._replace(weights=d.weights.detach().to(torch.float64)) for d in layer_directions(layer)]
    for d in directions:
        if not all(bool(w.isfinite().all()) for w in d.weights if w is not None):
            raise ValueError(f"layer: a weight of {d.name} holds NaN or infinity")
    return inputs._replace(x=inputs.x.detach().double()), states, directions
