"""What is wrong with the gradient's way through time, why, what to do, and whether it helped."""

import copy
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.diagnosis.capture import Given, capture
from unvanish.diagnosis.measure import Measured, half_width, measure
from unvanish.diagnosis.prescribe import prescribe
from unvanish.diagnosis.records import Diagnosis, LayerDiagnosis
from unvanish.diagnosis.trial import Odds, checked_target, readable_after
from unvanish.diagnosis.verdict import judge



def diagnose(
    model: nn.Module,
    *batch: Any,
    loss: Callable[..., Tensor],
    lag: int | None = None,
    samples: int = 16,
    trial: bool = False,
    lr: float = 3e-3,
    seed: int = 0,
) -> Diagnosis:
    """Per recurrent layer: does the error reach over the lag, how fast does it fade or grow, why, and what to do.

        d = uv.diagnose(model, x, y, loss=loss_fn)
        d.layers["encoder.lstm.l0"].verdict            # "vanishes"
        d.prescriptions[0].apply(model); d.verify(model)

    The model is run once on the batch, `loss(model(*batch[:-1]), batch[-1])`, and the errors that come back to each
    layer are followed one by one:

        ‖∂E_k/∂s_{k−ℓ}‖ relative to lag 0, s = c for the LSTM and h for the others; never of the summed error.

    Verdicts: "vanishes": less than 1 % is left at the lag. "saturated", "dead": so too, since φ' is near or exactly 0.
    "explodes": more than a hundredfold. "chaotic": that, with a positive Lyapunov exponent in a bounded cell.
    "healthy": neither. "undecided": the batch does not offer the evidence. A factor on the loss changes none of them.

    With `trial=True` a copy is trained for 100 updates, which gives a chance that a short training learns (see
    `diagnose.trial`). Only where that is below one half something is prescribed, and only cures that raise it clearly.
    Where every layer is undecided no chance is given.

    The cures are tried when `prescriptions` is asked for first, on a copy of the model kept from here, on the same
    batch.

    Everything happens on a copy, in float64 from the layers' inputs on: the model, its gradients, its mode and the
    random numbers stay as they are.

    Args:
        model: any module with nn.RNN, nn.LSTM or nn.GRU layers, or their cells in a loop, of torch or unvanish. A
            cell's calls are one sequence where each is given the state that it returned last; else `notes` says so.
        batch: the model's inputs, then the target; a single item is the input, and `loss` takes the output alone.
        loss: (output, target) → scalar.
        lag: steps that the task needs; None: the longest that the batch offers.
        samples: of the batch that are followed.
        trial: whether to train a copy; takes a batch of some hundred samples, as many as 5 times the hidden size.
        lr: Adam's: in the trial, and by which a state is called too sensitive (a step changes it by more than itself:
            Zucchet & Orvieto 2024).
        seed: of dropout, of drawn cures and of the trial's order.

    Raises:
        TypeError: model is no module, loss no function, or lr no number.
        ValueError: it has no recurrent layer; the batch is empty; a weight or the loss is not finite; the loss depends
            on no recurrent layer; lag, samples or lr is out of range; a trial's target is no tensor of one row per
            sample, or the batch is too small for it.
        RuntimeError: within torch.inference_mode.
    """
    if not batch:
        raise ValueError("batch: expected the model's input and its target")
    for name, number, what in (("lag", lag, "step"), ("samples", samples, "")):
        if number is not None and (isinstance(number, bool) or not isinstance(number, Integral) or number < 1):
            raise ValueError(f"{name}: expected a whole number of at least 1{f' {what}' if what else ''}, got {number}")
    lag, samples = None if lag is None else int(lag), int(samples)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("diagnose: expected gradients to be possible, got torch.inference_mode; call it outside")
    if not callable(loss):
        raise TypeError(f"loss: expected a function (output, target) → scalar, got {type(loss).__name__}")
    for number, item in enumerate(batch):
        if isinstance(item, Tensor) and item.numel() == 0:
            raise ValueError(
                f"batch: expected at least one sample and one step, got a tensor of shape {tuple(item.shape)} as item "
                f"{number}"
            )
    if isinstance(lr, bool) or not isinstance(lr, int | float):
        raise TypeError(f"lr: expected a number, got {type(lr).__name__}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr: expected a positive number, got {lr}")
    inputs, target = (batch[:-1], batch[-1:]) if len(batch) > 1 else (batch, ())

    def again(changed: nn.Module) -> dict[str, LayerDiagnosis]:
        return _layers(changed)[1]

    def _layers(changed: nn.Module) -> tuple[list[Given], dict[str, LayerDiagnosis], tuple[str, ...]]:
        given, notes = capture(changed, inputs, lambda output: loss(output, *target), seed, target)
        records = [_record(g.name(m.place), m) for g in given for m in measure(g, lag, samples, seed, lr)]
        return given, {record.name: record for record in records}, notes

    given, found, notes = _layers(model)
    kept = copy.deepcopy(model)
    answer = checked_target(given, target[0] if target else None) if trial else None
    if answer is None or all(d.verdict == "undecided" for d in found.values()):
        return Diagnosis(found, lambda: prescribe(kept, given, found, again, seed), again, notes)

    def odds(changed: nn.Module, layers: dict[str, LayerDiagnosis]) -> Odds:
        told = [d.evidence["median_survival"] for d in layers.values() if d.verdict != "undecided"]
        return Odds(readable_after(changed, inputs, answer, loss, lr, seed), min(told, default=0.0))

    own = odds(model, found)
    attempt = (own.chance, odds)
    return Diagnosis(
        found, lambda: prescribe(kept, given, found, again, seed, attempt), again, notes, own.chance, own.readable
    )


def _record(name: str, m: Measured) -> LayerDiagnosis:
    verdict, cause = judge(m)
    curve = tuple(m.curve.tolist())
    # One step or one sample gives no rate: none is made up.
    if m.evidence["offered"] < 2 or len(m.slopes) < 2:
        return LayerDiagnosis(
            name, m.place.cell.name, verdict, cause, math.nan, (math.nan, math.nan), None, m.decay.reach, m.lag,
            m.evidence, curve,
        )  # fmt: skip
    half = half_width(m.slopes[m.slopes.isfinite()])
    interval = (m.decay.rate - half, m.decay.rate + half)
    return LayerDiagnosis(
        name, m.place.cell.name, verdict, cause, m.decay.rate, interval, m.decay.half_life, m.decay.reach, m.lag,
        m.evidence, curve,
    )  # fmt: skip
