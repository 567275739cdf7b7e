"""Survival: how much of an error at the last step is left a lag earlier."""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.cells import GRU, LSTM, State
from unvanish.flow.stack import check_input, reading_order, saved_at
from unvanish.nn.modules import (
    LayerDirection,
    TimeMajor,
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
        """ln f_t (GRU: ln z_t) `[lag, B, H]`, in input order."""
        carry = self.trace.saved.f if isinstance(self.trace.cell, LSTM) else self.trace.saved.z
        B, H = carry.shape[1:]
        # Sample by sample the inside steps are contiguous and equally many.
        return carry.log().transpose(0, 1)[self.inside.T].reshape(B, -1, H).transpose(0, 1)


def survival(
    layer: nn.RNNBase,
    x: Tensor | PackedSequence,
    lag: int,
    hx: Any = None,
    *,
    paths: Paths = "carry",
    at: str | None = None,
) -> float:
    """S(ℓ) = ‖∂c_k/∂c_{k−ℓ}‖_F / √H, root mean square over samples: ‖∂E_k/∂c_{k−ℓ}‖ / ‖∂E_k/∂c_k‖ for errors of all
    directions.

        paths="carry"   ∂c_k/∂c_{k−ℓ} = diag(Π_t f_t): the constant error carousel alone
        paths="exact"   the whole derivative, through every gate and h, of the full state's c part

    k is the last step a sample reads. For the GRU read h for c and z for f. For an error whose direction is uniformly
    distributed, S² is the expected share of its square that is left; S = 1 means kept. Computed in float64.

    Args:
        layer: nn.LSTM or nn.GRU, of torch or unvanish. Dropout between layers is off.
        x: the input in the layer's own layout: padded, unbatched or packed.
        lag: ℓ ≥ 1, at most the steps of the shortest sample.
        hx: the initial state; None: zeros.
        paths: "carry" or "exact".
        at: "l0", "l1.reverse", …: whose; by default the last layer's, forward.

    Raises:
        TypeError: layer is no nn.LSTM or nn.GRU.
        ValueError: an argument does not fit; the message names it.

    Cost: one pass forward; "exact" also carries H errors per sample back over the lag.

    >>> lstm = nn.LSTM(2, 4).double()
    >>> _ = [nn.init.zeros_(p) for p in lstm.parameters()]          # f = σ(0) = 1/2 everywhere
    >>> round(survival(lstm, torch.zeros(8, 1, 2, dtype=torch.float64), lag=3), 12)
    0.125
    """
    if paths not in ("carry", "exact"):
        raise ValueError(f"paths: expected 'carry' or 'exact', got {paths!r}")
    found = windows(layer, x, lag, hx)
    names = [d.name for d, _ in found]
    if at is not None and at not in names:
        raise ValueError(f"at: expected one of {', '.join(names)}, got {at!r}")
    window = {d.name: w for d, w in found}[at or names[-2 if layer.bidirectional else -1]]
    return math.exp(log_survival(window, paths))


@torch.no_grad()
def log_survival(window: Window, paths: Paths) -> float:
    """ln S, right where S itself would underflow."""
    if paths == "carry":
        log_square = 2 * window.log_carry.sum(0)
        return 0.5 * float(log_square.flatten().logsumexp(0) - math.log(log_square.numel()))
    tr = window.trace
    B = window.inside.shape[1]
    sizes = [s.shape[-1] for s in tr.final]
    H, dtype = sizes[-1], tr.x.dtype
    # One error per unit of c_k, all carried back at once: rows [H, B, ·].
    start = torch.eye(H, dtype=dtype, device=tr.x.device).unsqueeze(1).expand(H, B, H)
    d = (start,) if isinstance(tr.cell, GRU) else (start.new_zeros(H, B, sizes[0]), start)
    log_scale = torch.zeros(B, dtype=dtype, device=tr.x.device)
    for t in reversed(list(reading_order(tr))):
        inside = window.inside[t].view(1, B, 1)
        if not bool(inside.any()):
            continue
        back = tr.cell.adjoint(d, saved_at(tr, t), tr.weights).previous
        d = tuple(torch.where(inside, new, old) for new, old in zip(back, d, strict=True))
        largest = torch.stack([s.abs().amax((0, 2)) for s in d]).amax(0)
        scale = torch.where(largest > 0, largest, 1.0)
        d = tuple(s / scale.view(1, B, 1) for s in d)
        log_scale += scale.log()
    log_square = d[-1].square().sum((0, 2)).log() + 2 * log_scale
    return 0.5 * float(log_square.logsumexp(0) - math.log(B * H))


@torch.no_grad()
def windows(layer: nn.RNNBase, x: Tensor | PackedSequence, lag: int, hx: Any) -> list[tuple[LayerDirection, Window]]:
    """Every layer and direction of an LSTM or GRU, run over x in float64.

    Raises:
        TypeError, ValueError: as `survival`.
    """
    inputs, states, directions = _checked(layer, x, lag, hx)
    T, B = inputs.x.shape[:2]
    lengths = torch.full((B,), T, device=inputs.x.device) if inputs.lengths is None else inputs.lengths
    steps = torch.arange(T, device=inputs.x.device)[:, None]
    first, last = (steps < lag).expand(T, B), ((steps >= lengths - lag) & (steps < lengths)).expand(T, B)

    def run(d: LayerDirection, x: Tensor, state: State) -> engine.Trace:
        return engine.trace(d.cell, x, state, d.weights, inputs.lengths, d.reverse)

    traces = run_layers(directions, inputs.x, states, run)
    return [(d, Window(tr, first if d.reverse else last)) for d, tr in zip(directions, traces, strict=True)]


def _checked(layer: nn.RNNBase, x: Any, lag: int, hx: Any) -> tuple[TimeMajor, list[Any], list[LayerDirection]]:
    if not isinstance(layer, nn.LSTM | nn.GRU):
        raise TypeError(f"layer: expected nn.LSTM or nn.GRU, whose state has a carry, got {type(layer).__name__}")
    inputs = time_major(layer, x)
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
