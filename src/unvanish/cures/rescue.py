"""Rescue: the smallest change of the forget biases with which the gradient survives a given lag.

Source: the forget-gate update of the article "Solving the vanishing gradient problem with LSTM" ("an update of the
forget gate at step k+1 so that the gradient does not vanish"), made exact.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish.cures.bias_shift import minimum_norm_shift
from unvanish.cures.layer_weights import Layer, finite, layers_of
from unvanish.flow.record import LayerFlow
from unvanish.flow.survival import log_survival, windows
from unvanish.nn.modules import SequenceModule, cell_of

TOLERANCE = 1e-3
"""|ln S − ln target| below which a solution is accepted"""
ROUNDS = 40
"""measurements of a layer until one of several solutions is kept, and as many again until its size is found"""


def rescue_(
    lstm: SequenceModule,
    x: Tensor | PackedSequence | LayerFlow | Mapping[str, LayerFlow],
    lag: int,
    target: float = 0.5,
    hx: Any = None,
) -> SequenceModule:
    """minimise ‖Δb_f‖₂  subject to  S(lag) ≥ target,  S(ℓ) = ‖∂c_k/∂c_{k−ℓ}‖_F / √H  (see `survival`).

    S² = mean_{b,u} exp 2 Σ_t ln σ(a^f_t + Δb_f) over the last `lag` steps is separable in the units, and at the optimum

        Δb_f = μ ∂S²/∂b_f       with one multiplier μ ≥ 0 for all units.

    The gradient needs only *some* units in which to survive, and the cheapest are those whose gates are already the
    most open. So the smallest change opens a share of about target² of the units and hardly changes the others: it
    divides them into long and short memory, whereas a uniform shift would make all units slow. The states react to the
    biases, so the layer is run and the problem solved again until the measured S is within 0.1 % of the target. If this
    cycles among solutions that cost nearly the same, one of them is kept and scaled until S holds. If the gate reads
    the memory itself, as with peepholes, the carry is more than f: then the change is the smallest for f alone, and
    scaled in the same way.

    Layers are rescued from the first to the last, each with the input that the rescued layers below produce. The
    change is added to `bias_ih`. For the GRU read h for c, z for f.

    Args:
        lstm: nn.LSTM or nn.GRU, of torch or unvanish, or `unvanish.nn.Recurrent` whose cell has a carry gate, with
            biases.
        x: an input in the layer's own layout, typical for the data, with at least `lag` steps; what S is measured on.
            Or a record of `uv.watch` (or one LayerFlow of it): then each unit's gate is taken as constant at its
            recorded mean `log_carry`, `lag` may exceed the recorded steps, and the result is a prediction that is not
            measured again.
        lag: ℓ, in steps.
        target: S afterwards, in (0, 1).
        hx: the initial state; None: zeros.

    Returns:
        lstm, changed in place. A layer that already reaches the target is not changed.

    Raises:
        TypeError: lstm is not a layer with a carry gate; x is neither input nor record; an argument is not a number.
        ValueError: target is not in (0, 1), as f < 1 keeps every S below 1; lag exceeds the steps of x; bias=False or
            a parametrized bias; a record does not fit.
        ArithmeticError: the states' reaction to the biases kept S from the target; the biases are as before.

    Limits: this concerns the carry alone. The whole derivative also passes through the gates and h, and can keep less
    or much more: `survival(..., paths="exact")` measures it. The change is the smallest for the trajectories of the
    gates that result from it; their dependence on the change is measured, not differentiated. S averages over gradients
    of all directions at c_k. An open unit that keeps writing drives c up until tanh c_k is flat, and then hardly any
    gradient at h_k enters it; `chrono_` also closes the input gate. A gradient that survives can still be too sharp to
    use (Zucchet & Orvieto 2024).

    >>> lstm, x = nn.LSTM(2, 8), torch.randn(60, 4, 2)
    >>> from unvanish.flow import survival
    >>> round(survival(rescue_(lstm, x, lag=50, target=0.5), x, lag=50), 2)
    0.5
    """
    if not isinstance(lstm, SequenceModule) or cell_of(lstm).carry_gate is None:
        raise TypeError(
            f"lstm: expected nn.LSTM, nn.GRU or unvanish.nn.Recurrent whose cell has a carry gate, got "
            f"{type(lstm).__name__}"
        )
    if not 0 < finite("target", target) < 1:
        raise ValueError(f"target: expected a survival in (0, 1), got {target}; f < 1 keeps less than everything")
    if isinstance(lag, bool) or not isinstance(lag, int) or lag < 1:
        raise ValueError(f"lag: expected a whole number of steps ≥ 1, got {lag!r}")
    layers = layers_of(lstm)
    gate, sign = cell_of(lstm).carry_gate or ("", 1)
    biases = [layer.biases(gate, "rescue_")[0] for layer in layers]
    before = [b.detach().clone() for b in biases]
    with torch.no_grad():
        if isinstance(x, Mapping | LayerFlow):
            records = {x.name: x} if isinstance(x, LayerFlow) else x
            changes = [_from_record(layer, records, lag, target) for layer in layers]
            for b, change in zip(biases, changes, strict=True):
                b.add_(sign * change.to(b))
        else:
            try:
                for place, b in enumerate(biases):
                    _rescue_layer(lstm, place, b, sign, x, lag, target, hx)
            except BaseException:
                for b, old in zip(biases, before, strict=True):
                    b.copy_(old)
                raise
    return lstm


def _rescue_layer(
    lstm: SequenceModule, place: int, bias: Tensor, sign: int, x: Any, lag: int, target: float, hx: Any
) -> None:
    """Solve for the measured trajectories, apply, measure again, until S meets the target and the change settles."""
    start, log_target = bias.detach().to(torch.float64, copy=True), math.log(target)

    def measure(shift: Tensor) -> tuple[Tensor, float]:
        """(ln f, ln S) with the shift applied."""
        bias.copy_(start + sign * shift)
        window = windows(lstm, x, lag, hx)[place][1]
        return window.log_gate, log_survival(window, "carry")

    shift = new = torch.zeros_like(start)
    log_gate, measured = measure(shift)
    if measured >= log_target:
        return
    for round_ in range(ROUNDS):
        new = minimum_norm_shift(_logits(log_gate) - shift, 1.0, target, shift if round_ else None)
        moved = float((new - shift).norm() / new.norm())
        if round_ and abs(measured - log_target) < TOLERANCE and moved < 10 * TOLERANCE:
            return
        # Full steps can oscillate where the states react strongly.
        shift = new if round_ < 8 else 0.5 * (shift + new)
        log_gate, measured = measure(shift)
    # Two sets of units may cost nearly the same, each looking cheaper on the trajectories that the other produces.
    # One is kept and scaled; at scale 0 S is below the target.
    size, low, high = 1.0, 0.0, math.inf
    for _ in range(ROUNDS):
        measured = measure(size * new)[1]
        if abs(measured - log_target) < TOLERANCE:
            return
        low, high = (size, high) if measured < log_target else (low, size)
        size = 0.5 * (low + high) if high < math.inf else 1.25 * size
    raise ArithmeticError(
        f"rescue_: after {2 * ROUNDS} rounds layer {place} keeps {math.exp(measured):.4g}, not {target}, because the "
        "states react to every change of the biases; try another target, or chrono_"
    )


def _logits(log_f: Tensor) -> Tensor:
    """a^f from ln f: ln f − ln(1 − f)."""
    return log_f - torch.log(-torch.expm1(log_f))


def _from_record(layer: Layer, records: Mapping[str, LayerFlow], lag: int, target: float) -> Tensor:
    """The change for gates that stay at their recorded mean."""
    name = layer.suffix.removeprefix("_").replace("_reverse", ".reverse")
    found = [r for key, r in records.items() if (key == name or key.endswith(f".{name}")) and r.cell == layer.cell.name]
    H = layer.module.hidden_size
    if len(found) != 1:
        raise ValueError(
            f"x: expected a record with one {layer.cell.name} layer {name!r}, found {len(found)} among "
            f"{', '.join(records)}; pass the record of this module alone: {{name: flow[name], …}}"
        )
    if found[0].problem is not None:
        raise ValueError(f"x: the record {found[0].name!r} is not valid: {found[0].problem}")
    log_f = found[0].log_carry
    if log_f is None or log_f.shape != (H,) or not bool((log_f.isfinite() & (log_f < 0)).all()):
        raise ValueError(
            f"x: expected log_carry [{H}], finite and negative, in the record {found[0].name!r}; got {log_f}"
        )
    log_f = log_f.double()
    if float((2 * lag * log_f).logsumexp(0)) - math.log(H) >= 2 * math.log(target):
        return torch.zeros_like(log_f)
    return minimum_norm_shift(_logits(log_f).expand(1, 1, H), float(lag), target)
