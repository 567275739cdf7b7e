"""Sparse forcing: a network that learns chaotic dynamics is reset to the data before its errors have doubled."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.cures.layer_weights import finite
from unvanish.nn.modules import SequenceModule, as_states


def forcing_interval(exponent: float) -> int:
    """Steps between two forcings: τ = ln 2 / λ, at least 1, after which an error in the state of a chaotic system has
    doubled.

    Args:
        exponent: λ > 0, the largest Lyapunov exponent of the data, in nats per step.

    Raises:
        TypeError: exponent is not a number.
        ValueError: it is not positive: data that are not chaotic need no forcing.

    Source: Mikhaeil, Monfared & Durstewitz 2022 (their predictability time).

    >>> forcing_interval(0.0139)
    49
    """
    return max(1, int(math.log(2) / finite("exponent", exponent, above=0.0)))


def forced(
    layer: nn.Module,
    x: Tensor,
    target: Tensor,
    readout: nn.Linear,
    interval: int,
    hx: Any = None,
    *,
    keep: bool = False,
) -> Tensor:
    """Predictions ŷ_t = B h_t + b of a run whose state is set from the data after every `interval` steps:

        h_t ← h_t + B⁺ (y_t − ŷ_t)      so that B h_t + b = y_t, where the readout can

    This is the smallest such change; the loss uses ŷ_t from before it. Every network that fits data from a chaotic
    system has a largest exponent λ > 0, and ∂h_t/∂h_s grows like e^{λ(t − s)}; no cell and no initialisation prevents
    this. With a forcing after every τ = ln 2/λ steps (`forcing_interval`) the gradient stays bounded, and the
    trajectory stays near the one to be learnt.

    Args:
        layer: nn.RNN, nn.LSTM, nn.GRU or `unvanish.nn.Recurrent`, of one direction; `layer(x, hx)` is what runs.
        x: `[T, B, I]` (or `[B, T, I]` with batch_first) its input, which must not contain y of later steps.
        target: `[T, B, N]` y, the target of the readout at each step, in the layout of x.
        readout: nn.Linear from h of the last layer to N values.
        interval: τ, in steps.
        hx: the initial state; None: the layer's own.
        keep: whether the part that the readout does not see, (I − B⁺B) h, and all other states keep their graph. By
            default they keep only their value, so that no gradient passes a forcing, as in the paper.

    Returns:
        ŷ, in the layout of x.

    Raises:
        TypeError: layer is of another type, or readout is not an nn.Linear.
        ValueError: it is bidirectional; x and target do not fit, or interval is below 1.

    Source: Mikhaeil, Monfared & Durstewitz 2022, "On the difficulty of learning chaotic dynamics with RNNs" (there
    B⁺ y alone takes the place of h).

    Limits: h of the last layer is forced; the LSTM's c and lower layers run on as they were. B⁺ is recomputed in
    each call and treated as a constant. The loss can't train a memory longer than τ unless `keep` is set.

    >>> rnn, readout = nn.RNN(2, 8), nn.Linear(8, 2)
    >>> series = torch.randn(21, 4, 2)
    >>> forced(rnn, series[:-1], series[1:], readout, interval=5).shape
    torch.Size([20, 4, 2])
    """
    if not isinstance(layer, SequenceModule):
        raise TypeError(f"layer: expected nn.RNN, nn.LSTM, nn.GRU or unvanish.nn.Recurrent, got {type(layer).__name__}")
    if not isinstance(readout, nn.Linear):
        raise TypeError(f"readout: expected an nn.Linear, whose inverse is known, got {type(readout).__name__}")
    if layer.bidirectional:
        raise ValueError("layer: expected one direction; a layer that reads from the end knows what it is to predict")
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval: expected a whole number of steps, at least 1, got {interval!r}")
    time = 1 if layer.batch_first else 0
    if x.dim() != 3 or target.shape != (*x.shape[:2], readout.out_features):
        raise ValueError(f"target: expected {(*x.shape[:2], readout.out_features)}, as x, got {tuple(target.shape)}")
    with torch.no_grad():
        weight = readout.weight.double()
        inverse = torch.linalg.pinv(weight)
        seen, inverse = (m.to(readout.weight) for m in (inverse @ weight, inverse))
    found, state = [], hx
    for part, y in zip(x.split(interval, time), target.split(interval, time), strict=True):
        h, state = layer(part, state)
        said = readout(h)
        found.append(said)
        error = y.select(time, -1) - said.select(time, -1).detach()
        state = _put_on_data(state, error @ inverse.mT, seen if keep else None)
    return torch.cat(found, time)


def _put_on_data(state: Any, correction: Tensor, seen: Tensor | None) -> Any:
    """The state with `correction` `[B, H]` added to the last layer's h. Its graph keeps only the part of h that the
    readout does not see: `seen` `[H, H]` projects on what it sees. None: the state is detached whole."""
    states = as_states(state)
    h, *others = states if seen is not None else tuple(s.detach() for s in states)
    last = h[-1]
    if seen is not None:
        last = last - (last - last.detach()) @ seen.mT
    h = torch.cat([h[:-1], (last + correction).unsqueeze(0)])
    return (h, *others) if others else h
