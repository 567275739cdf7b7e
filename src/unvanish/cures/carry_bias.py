"""The bias of the gate that carries the state: how long a unit remembers before it has learnt anything.

With no input a carry gate (the LSTM's f, the GRU's z) is σ(b): over a lag ℓ a unit keeps σ(b)^ℓ of its error, and
forgets by 1/e in about τ = 1 / (1 − σ(b)) = 1 + eᵇ steps.
"""

import torch
from torch import Tensor, nn

from unvanish.cells import CARRY
from unvanish.cures.layers import Layer, M, draws_on, finite, recurrent_layers


def forget_bias_(module: M, value: float = 1.0) -> M:
    """Set the forget bias: b_f = value, so that f = σ(value) where nothing else speaks.

    The GRU's update gate z carries its state and is set likewise. torch adds two biases; their sum becomes `value`
    (all of it in `bias_ih`, the gate's block of `bias_hh` is zeroed). Other gates keep theirs.

    Args:
        module: nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, or any module whose recurrent layers are all of these.
        value: the bias, in pre-activation units. σ(0) = 0.5, σ(1) = 0.73, σ(2) = 0.88, σ(4) = 0.98.

    Returns:
        module, changed in place.

    Raises:
        TypeError: module is no module, or contains a plain RNN, which has no gate; value is no number.
        ValueError: there is no recurrent layer, a layer has bias=False or a parametrized bias, or value is not finite.

    Source: Gers, Schmidhuber & Cummins 2000; Jozefowicz, Zaremba & Sutskever 2015, section 2.2.

    Limits: one time constant for all units, 1 + eᵛᵃˡᵘᵉ steps (3.7 for 1): a start for lags of tens of steps, not of
    hundreds; `chrono_` spreads the time constants.

    >>> lstm = forget_bias_(torch.nn.LSTM(3, 2), 2.0)
    >>> (lstm.bias_ih_l0 + lstm.bias_hh_l0)[2:4].tolist()
    [2.0, 2.0]
    """
    value = finite("value", value)
    layers = _carriers(module, "forget_bias_")
    with torch.no_grad():
        for layer, b_ih, b_hh in layers:
            gate = CARRY[layer.cell.name]
            layer.blocks(b_ih)[gate].fill_(value)
            layer.blocks(b_hh)[gate].zero_()
    return module


def chrono_(module: M, max_lag: float, generator: torch.Generator | None = None) -> M:
    """Spread the units' time constants over the lags of the data: b_f ~ ln U[1, T_max − 1], b_i = −b_f.

    With u ~ U[1, T_max − 1]: f = σ(ln u) = 1 − 1/τ and i = σ(−ln u) = 1/τ, τ = 1 + u uniform in [2, T_max] steps. A
    leaky unit of time constant τ is c_t = (1 − 1/τ) c_{t-1} + (1/τ) g_t, which explains b_i.

    In the GRU the coefficients of h_{t-1} and of the candidate are z and 1 − z = σ(−b_z), so that b_z = ln u alone
    gives both. torch adds two biases; their sum is set (in `bias_ih`, the gates' blocks of `bias_hh` are zeroed).
    Other gates keep theirs.

    Args:
        module: nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, or any module whose recurrent layers are all of these.
        max_lag: T_max, the longest dependency, in steps; at least 2.
        generator: the source of u, drawn in float64 on its device; None: torch's default on the CPU.

    Returns:
        module, changed in place.

    Raises:
        TypeError: module is no module, or contains a plain RNN, which has no gate; max_lag is no number.
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
    layers = _carriers(module, "chrono_")
    with torch.no_grad():
        for layer, b_ih, b_hh in layers:
            u = torch.empty(layer.module.hidden_size, dtype=torch.float64, device=draws_on(generator))
            log_u = u.uniform_(1.0, max_lag - 1.0, generator=generator).log()
            signs = {CARRY[layer.cell.name]: 1} | ({"i": -1} if layer.cell.name == "lstm" else {})
            for gate, sign in signs.items():
                layer.blocks(b_ih)[gate].copy_(sign * log_u)
                layer.blocks(b_hh)[gate].zero_()
    return module


def _carriers(module: nn.Module, cure: str) -> list[tuple[Layer, Tensor, Tensor]]:
    """Every layer with its two biases, all checked before the first is written."""
    layers = recurrent_layers(module, cure, CARRY, "it has no gate that carries its state")
    for layer in layers:
        if not layer.has("bias_ih"):
            raise ValueError(
                f"module: {cure} sets a gate's bias, but {layer.label!r} has bias=False; make it with bias=True"
            )
    return [(layer, layer.parameter("bias_ih", cure), layer.parameter("bias_hh", cure)) for layer in layers]
