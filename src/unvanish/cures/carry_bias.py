"""The bias of the gate that carries the state: how long a unit remembers before it has learnt anything.

With no input a carry gate (the LSTM's f, the GRU's z) is σ(b): over a lag ℓ a unit's gradient is multiplied by σ(b)^ℓ,
and the unit forgets by 1/e in about τ = 1 / (1 − σ(b)) = 1 + eᵇ steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from unvanish.cells import Cell
from unvanish.cures.layer_weights import Layer, M, draws_on, finite, recurrent_layers


def forget_bias_(module: M, value: float = 1.0) -> M:
    """Set the forget bias: b_f = value, so that f = σ(value) without input.

    For other cells it is the bias of the gate that carries the memory (`Cell.carry_gate`): z of the GRU; −value for a
    gate whose complement carries, like f of the minimal gated unit. torch adds two biases; their sum becomes the value
    (all of it in `bias_ih`, the gate's block of `bias_hh` is set to 0). The other gates are not changed.

    Args:
        module: nn.LSTM, nn.GRU, their cells, `unvanish.nn.Recurrent` with a carry gate, or any module whose recurrent
            layers are all of these.
        value: the bias, in pre-activation units. σ(0) = 0.5, σ(1) = 0.73, σ(2) = 0.88, σ(4) = 0.98.

    Returns:
        module, changed in place.

    Raises:
        TypeError: module is not a module, value not a number, or a cell has no carry gate, like the plain RNN.
        ValueError: there is no recurrent layer, a layer has bias=False or a parametrized bias, or value is not finite.

    Source: Gers, Schmidhuber & Cummins 2000; Jozefowicz, Zaremba & Sutskever 2015, section 2.2.

    Limits: one time constant for all units, 1 + eᵛᵃˡᵘᵉ steps (3.7 for 1): a start for lags of tens of steps, not of
    hundreds; `chrono_` spreads the time constants.

    >>> lstm = forget_bias_(torch.nn.LSTM(3, 2), 2.0)
    >>> (lstm.bias_ih_l0 + lstm.bias_hh_l0)[2:4].tolist()
    [2.0, 2.0]
    """
    value = finite("value", value)
    found = [_biases(layer, "forget_bias_") for layer in _carriers(module, "forget_bias_")]
    with torch.no_grad():
        for carry, sign, _ in found:
            _set(carry, sign * value)
    return module


def chrono_(module: M, max_lag: float, generator: torch.Generator | None = None) -> M:
    """Spread the units' time constants over the lags of the data: b_f ~ ln U[1, T_max − 1], b_i = −b_f.

    With u ~ U[1, T_max − 1]: f = σ(ln u) = 1 − 1/τ and i = σ(−ln u) = 1/τ, τ = 1 + u uniform in [2, T_max] steps. A
    leaky unit of time constant τ is c_t = (1 − 1/τ) c_{t-1} + (1/τ) g_t, which explains b_i.

    In the GRU the coefficients of h_{t-1} and of the candidate are z and 1 − z = σ(−b_z), so that b_z = ln u alone
    gives both; likewise for every cell without a `write_gate`. torch adds two biases; their sum is set (in `bias_ih`,
    the gates' blocks of `bias_hh` are zeroed). Other gates keep theirs.

    Args:
        module: nn.LSTM, nn.GRU, their cells, `unvanish.nn.Recurrent` with a carry gate, or any module whose recurrent
            layers are all of these.
        max_lag: T_max, the longest dependency, in steps; at least 2.
        generator: the source of u, drawn in float64 on its device; None: torch's default on the CPU.

    Returns:
        module, changed in place.

    Raises:
        TypeError: module is not a module, max_lag not a number, or a cell has no carry gate, like the plain RNN.
        ValueError: there is no recurrent layer, a layer has bias=False or a parametrized bias, or max_lag is below 2.

    Source: Tallec & Ollivier 2018, "Can recurrent neural networks warp time?", equation 16.

    Limits: the time constants hold where W_ih x + W_hh h is small beside the bias; i ≈ 1/τ makes slow units slow to
    write as well.

    >>> lstm = chrono_(torch.nn.LSTM(3, 4), max_lag=784)
    >>> b_i, b_f, _, _ = (lstm.bias_ih_l0 + lstm.bias_hh_l0).chunk(4)
    >>> bool((b_i == -b_f).all()), bool((b_f.sigmoid() <= 1 - 1 / 784).all())
    (True, True)
    """
    if finite("max_lag", max_lag) < 2:
        raise ValueError(f"max_lag: expected at least 2 steps, got {max_lag}; no unit forgets faster than f = 1/2 here")
    return _spread(module, "chrono_", lambda u: u.uniform_(1.0, max_lag - 1.0, generator=generator).log(), generator)


def uniform_gate_(module: M, generator: torch.Generator | None = None) -> M:
    """Spread the carries uniformly: b_f = logit u, u ~ U[1/H, 1 − 1/H], b_i = −b_f.

    Without input f = u and i = 1 − f, so that the time constants 1/(1 − f) have the density 1/τ² from 1 to H steps: no
    lag has to be named, and every scale up to H has its units. For a cell without a `write_gate` b_f alone gives both
    coefficients, as in the GRU. torch adds two biases; their sum is set (in `bias_ih`, the gates' blocks of `bias_hh`
    are zeroed). Other gates keep theirs.

    Args:
        module: nn.LSTM, nn.GRU, their cells, `unvanish.nn.Recurrent` with a carry gate, or any module whose recurrent
            layers are all of these; H at least 2.
        generator: the source of u, drawn in float64 on its device; None: torch's default on the CPU.

    Returns:
        module, changed in place.

    Raises:
        TypeError: module is not a module, or a cell in it has no carry gate, like the plain RNN.
        ValueError: there is no recurrent layer, a layer has bias=False, a parametrized bias, or a single unit.

    Source: Gu, Gülçehre, Paine, Hoffman & Pascanu 2020, "Improving the gating mechanism of recurrent neural networks",
    equation 13 (UGI). Their refine gate is a cell of its own, `unvanish.cells.ZOO["ur_lstm"]`, which starts like this.

    Limits: half of the units forget within two steps and only about H/ℓ of them last for ℓ steps: for lags beyond H, or
    all near one length, use `chrono_`. Like `chrono_` and `forget_bias_` it sets the carry's bias: the last one counts.

    >>> lstm = uniform_gate_(torch.nn.LSTM(3, 4))
    >>> b_i, b_f, _, _ = (lstm.bias_ih_l0 + lstm.bias_hh_l0).chunk(4)
    >>> bool((b_i == -b_f).all()), bool(((b_f.sigmoid() - 0.5).abs() <= 0.25).all())
    (True, True)
    """

    def draw(u: Tensor) -> Tensor:
        H = len(u)
        if H < 2:
            raise ValueError("module: uniform_gate_ spreads the carries over at least 2 units, and a layer has only 1")
        return u.uniform_(1 / H, 1 - 1 / H, generator=generator).logit()

    return _spread(module, "uniform_gate_", draw, generator)


def _spread(module: M, cure: str, draw: Callable[[Tensor], Tensor], generator: torch.Generator | None) -> M:
    """Give each layer's carry gate the biases with which `draw` fills an empty `[H]`, and its write gate their
    negatives."""
    layers = _carriers(module, cure)
    found = [_biases(layer, cure) for layer in layers]
    drawn = [
        draw(torch.empty(layer.module.hidden_size, dtype=torch.float64, device=draws_on(generator))) for layer in layers
    ]
    with torch.no_grad():
        for value, (carry, sign, write) in zip(drawn, found, strict=True):
            _set(carry, sign * value)
            if write:
                _set(write, -value)
    return module


def carry_biases(module: nn.Module, cure: str) -> list[list[Tensor]]:
    """The carry gate's rows of each existing bias, for each layer and direction: views, to be written in place.

    Raises:
        TypeError, ValueError: as `forget_bias_`.
    """
    return [_biases(layer, cure)[0] for layer in _carriers(module, cure)]


def _carriers(module: nn.Module, cure: str) -> list[Layer]:
    """Every layer and direction; all of cells whose memory is carried by one gate."""

    def fits(cell: Cell) -> bool:
        return cell.carry_gate is not None

    return recurrent_layers(module, cure, fits, "it has no gate that alone carries its state")


def _biases(layer: Layer, cure: str) -> tuple[list[Tensor], int, list[Tensor]]:
    """(the carry gate's biases, the sign with which they open it, the write gate's biases), checked before any is
    written; a cell that writes one minus its carry has no write gate."""
    assert layer.cell.carry_gate is not None
    gate, sign = layer.cell.carry_gate
    write = layer.cell.write_gate
    return layer.biases(gate, cure), sign, [] if write is None else layer.biases(write, cure)


def _set(biases: list[Tensor], value: Tensor | float) -> None:
    """Set the sum of the biases to `value`, all of it in the first one."""
    first, *others = biases
    first.copy_(torch.as_tensor(value, dtype=torch.float64).to(first))
    for other in others:
        other.zero_()
