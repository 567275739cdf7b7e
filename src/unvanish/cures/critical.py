"""Critical initialisation: the size at which W_hh lets a gradient neither die out nor grow, in the mean."""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.cells import Cell
from unvanish.cures.layer_weights import finite, layers_of
from unvanish.cures.mean_square import mean_square_gain
from unvanish.flow.stack import run_stack
from unvanish.nn.modules import SequenceModule, cell_of

M = TypeVar("M", bound=SequenceModule)

STEPS, SAMPLES = 32, 8
"""at which χ is measured"""
TOLERANCE = 1e-3
"""of ln χ"""


def critical_(layer: M, x: Tensor | PackedSequence, hx: Any = None, *, target: float = 1.0) -> M:
    """Scale all blocks of W_hh by the one factor for which a step keeps a gradient's mean square:

        χ = 1/H E‖∂h_t/∂h_{t-1}‖_F² = mean squared singular value of the step's Jacobian = 1

    For a cell of several states χ is the spectral radius of the matrix of such mean squares, A_ab = 1/H
    E‖∂s^a_t/∂s^b_{t-1}‖_F². In mean-field theory (H → ∞, independent random weights) a gradient's square is multiplied
    by χ in every step, so that the lag that can be trained grows as 1/|ln χ|. χ is measured on x, with the actual
    biases and inputs: set the biases first (`forget_bias_`, `chrono_`, …), and draw the blocks as you like
    (`orthogonal_`); their directions stay.

    Layers are scaled from the first to the last, each with the input that the critical layers below produce.

    Args:
        layer: nn.RNN, nn.LSTM, nn.GRU or `unvanish.nn.Recurrent` of a cell with a recurrent matrix.
        x: an input in the layer's own layout, typical for the data; the second half of its steps is measured, for at
            most 8 samples and 32 steps.
        hx: the initial state; None: the cell's own.
        target: the χ to reach; 1 is critical.

    Returns:
        layer, changed in place.

    Raises:
        TypeError: layer is of another type, or its cell has no recurrent matrix.
        ValueError: x does not fit, W_hh is parametrized, or target is not positive.
        ArithmeticError: no factor reaches the target: the carry alone keeps more than that, or all gates are saturated.
            The matrices are as before.

    Source: Chen, Pennington & Schoenholz 2018, "Dynamical isometry and a mean field theory of RNNs", section 3; Gilboa
    et al. 2019, "Dynamical isometry and a mean field theory of LSTMs and GRUs". They solve for the variances of all
    weights and biases; here the biases are kept, one factor is left, and the expectation is a measurement.

    Limits: the theory's steps are independent. Where gates persist, as in an LSTM or GRU, directions that grow go on
    growing: at χ = 1 their leading Lyapunov exponent is above 0 (GRUs and LSTMs of 32 to 256 units under white noise:
    0.05 to 0.17 per step), and a `target` below 1 is better; `uv.flow.lyapunov` measures the exponent. The singular
    values of products over many steps spread more, the further J is from orthogonal.

    >>> rnn, x = critical_(torch.nn.RNN(2, 64), torch.randn(50, 8, 2)), torch.randn(50, 8, 2)
    >>> 0.9 < chi(rnn, x)[0] < 1.1
    True
    """
    _fits(layer)
    log_target = math.log(finite("target", target, above=0.0))
    matrices = [one.parameter("weight_hh", "critical_") for one in layers_of(layer)]
    before = [w.detach().clone() for w in matrices]
    try:
        with torch.no_grad():
            for place, (w, drawn) in enumerate(zip(matrices, before, strict=True)):
                _scale(layer, place, w, drawn, x, hx, log_target)
    except BaseException:
        with torch.no_grad():
            for w, drawn in zip(matrices, before, strict=True):
                w.copy_(drawn)
        raise
    return layer


def chi(layer: SequenceModule, x: Tensor | PackedSequence, hx: Any = None) -> list[float]:
    """The mean squared singular value of a step's Jacobian, for each layer and direction in torch's order; arguments
    and errors as in `critical_`."""
    _fits(layer)
    return [_chi(tr) for tr in run_stack(layer, x, hx).traces]


def _fits(layer: Any) -> Cell:
    if not isinstance(layer, SequenceModule):
        raise TypeError(
            f"layer: expected nn.RNN, nn.LSTM, nn.GRU or unvanish.nn.Recurrent, got {type(layer).__name__}; pass the "
            "layer that runs sequences whole"
        )
    cell = cell_of(layer)
    if not cell.sources:
        raise TypeError(f"layer: a {cell.name} has no recurrent matrix to be scaled")
    return cell


@torch.no_grad()
def _chi(tr: engine.Trace) -> float:
    return float(mean_square_gain(tr, STEPS, SAMPLES))


def _scale(layer: SequenceModule, place: int, w: Tensor, drawn: Tensor, x: Any, hx: Any, log_target: float) -> None:
    def excess(log_g: float) -> float:
        w.copy_(math.exp(log_g) * drawn)
        found = _chi(run_stack(layer, x, hx).traces[place])
        return math.log(found) - log_target if found > 0 else -math.inf

    low = high = 0.0
    below = excess(0.0) < 0
    for _ in range(12):
        if below:
            low, high = high, high + 1.0
            if excess(high) >= 0:
                break
        else:
            low, high = low - 1.0, low
            if excess(low) < 0:
                break
    else:
        now = math.exp(excess(high if below else low) + log_target)
        raise ArithmeticError(
            f"critical_: no factor on W_hh makes χ = {math.exp(log_target):.3g} in layer {place} (it is "
            f"{now:.3g} at a factor of {math.exp(high if below else low):.3g}); "
            + ("its gates are saturated" if below else "its carry alone keeps more")
        )
    for _ in range(60):
        middle = 0.5 * (low + high)
        found = excess(middle)
        if abs(found) < TOLERANCE:
            return
        low, high = (middle, high) if found < 0 else (low, middle)
    excess(0.5 * (low + high))
