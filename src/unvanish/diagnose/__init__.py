"""What is wrong with the gradient's way through time, why, what to do, and whether it helped."""

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from unvanish.diagnose.capture import capture
from unvanish.diagnose.measure import Measured, measure
from unvanish.diagnose.prescribe import prescribe
from unvanish.diagnose.records import Diagnosis, LayerDiagnosis, Prescription, Verification
from unvanish.diagnose.verdict import Verdict, judge

__all__ = ["Diagnosis", "LayerDiagnosis", "Prescription", "Verdict", "Verification", "diagnose"]


def diagnose(
    model: nn.Module,
    *batch: Any,
    loss: Callable[..., Tensor],
    lag: int | None = None,
    samples: int = 16,
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

    Everything happens on a copy, in float64 from the layers' inputs on: the model, its gradients, its mode and the
    random numbers stay as they are.

    Args:
        model: any module with nn.RNN, nn.LSTM or nn.GRU layers, of torch or unvanish.
        batch: the model's inputs, then the target; a single item is the input, and `loss` takes the output alone.
        loss: (output, target) → scalar.
        lag: steps that the task needs; None: the longest that the batch offers.
        samples: of the batch that are followed.
        seed: of dropout, and of drawn cures.

    Raises:
        TypeError: model is no module.
        ValueError: it has no recurrent layer; a weight or the loss is not finite; the loss depends on no recurrent
            layer; lag or samples is out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not batch:
        raise ValueError("batch: expected the model's input and its target")
    if lag is not None and lag < 1:
        raise ValueError(f"lag: expected at least 1 step, got {lag}")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    inputs, target = (batch[:-1], batch[-1:]) if len(batch) > 1 else (batch, ())

    def again(changed: nn.Module) -> dict[str, LayerDiagnosis]:
        return _layers(changed)[1]

    def _layers(changed: nn.Module) -> tuple[list[Any], dict[str, LayerDiagnosis]]:
        given = capture(changed, inputs, lambda output: loss(output, *target), seed)
        found = [(g, m) for g in given for m in measure(g, lag, samples, seed)]
        records = [_record(f"{g.path}.{m.place.name}".removeprefix("."), m) for g, m in found]
        return given, {record.name: record for record in records}

    given, found = _layers(model)
    return Diagnosis(found, prescribe(model, given, found, again, seed), again)


def _record(name: str, m: Measured) -> LayerDiagnosis:
    verdict, cause = judge(m)
    finite = m.slopes[m.slopes.isfinite()]
    half = 1.96 * float(finite.std()) / math.sqrt(len(finite)) if len(finite) > 1 else math.nan
    interval = (m.decay.rate - half, m.decay.rate + half)
    curve = tuple(m.curve.tolist())
    return LayerDiagnosis(
        name, m.place.cell.name, verdict, cause, m.decay.rate, interval, m.decay.half_life, m.decay.reach, m.lag,
        m.evidence, curve,
    )  # fmt: skip


class _Package(ModuleType):
    """Importing this package puts it in the place of `uv.diagnose`, which users call: so it is callable."""

    __call__ = staticmethod(diagnose)


sys.modules[__name__].__class__ = _Package
