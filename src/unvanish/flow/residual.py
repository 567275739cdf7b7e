"""A record's own ∂E/∂W compared with autograd's."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.engine.precision import full_precision
from unvanish.flow.record import LayerFlow
from unvanish.flow.recorded_sequence import RecordedSequence
from unvanish.flow.sketch import sketch
from unvanish.flow.transfer import numbers
from unvanish.flow.watched_sequence import Measured, Sequence

LARGE = 0.3
"""A residual that no rounding explains."""


Pass = list[tuple[Sequence, list[Measured]]]
"""the sequences that a backward pass reached, and what was measured of each"""


def with_residuals(
    found: Pass, autograd: Mapping[Hashable, Tensor], weights: Mapping[Hashable, tuple[Tensor, Any]]
) -> Pass:
    """The same, with a residual in every record of a replay, and an explanation where it is more than ten times what
    rounding explains, or more than `LARGE`.

    Args:
        autograd: weight key → autograd's ∂E/∂W of the pass.
        weights: weight key → (the weight, its hook).
    """
    replayed = [part for sequence, parts in found if not isinstance(sequence, RecordedSequence) for part in parts]
    keys = {key for part in replayed for key in part.gradients if key in autograd}
    return _compared(found, {key: autograd[key] for key in keys}, weights) if keys else found


@full_precision()
def _compared(found: Pass, autograd: Mapping[Hashable, Tensor], weights: Mapping[Hashable, tuple[Tensor, Any]]) -> Pass:
    extra = {key: sketch(theirs) for key, theirs in autograd.items()}
    for sequence, parts in found:
        whole = isinstance(sequence, RecordedSequence)
        for key, gradient in (item for part in parts for item in part.gradients.items() if item[0] in extra):
            extra[key] = extra[key] - (sketch(gradient) if whole else gradient)

    def compared(record: LayerFlow, keys: list[Hashable], rounding: float) -> LayerFlow:
        norms = numbers(
            [torch.linalg.vector_norm(v, dtype=torch.float64) for key in keys for v in (extra[key], autograd[key])]
        )
        apart, size = math.hypot(*norms[::2]), math.hypot(*norms[1::2])
        residual = apart / size if size > 0 else (0.0 if apart == 0 else math.inf)
        record, allowed = replace(record, residual=residual), min(10 * rounding, LARGE)
        if residual <= allowed or record.problem is not None or not math.isfinite(residual):
            return record
        if all(_is_a_penalty(extra[key], weights.get(key)) for key in keys):
            return record
        return replace(
            record,
            problem=f"its own ∂E/∂W differs from autograd's by {residual:.1e} (rounding explains {allowed:.0e}): "
            "a weight takes part elsewhere in the loss too, part of the backward pass is hidden, or the backend's "
            "gradient is wrong; uv.audit checks it",
        )

    def of(sequence: Sequence, part: Measured) -> Measured:
        keys = [key for key in part.gradients if key in autograd]
        if isinstance(sequence, RecordedSequence) or not keys:
            return part
        return replace(part, flow=compared(part.flow, keys, sequence.rounding))

    return [(sequence, [of(sequence, part) for part in parts]) for sequence, parts in found]


def _is_a_penalty(extra: Tensor, weight: tuple[Tensor, Any] | None) -> bool:
    """Whether what autograd adds, as its `sketch`, is the gradient of a squared or absolute norm of the weight."""
    if weight is None:
        return False
    w, cosine = weight[0].detach(), nn.functional.cosine_similarity
    return any(float(cosine(extra.flatten(), sketch(v).flatten(), dim=0)) > 0.999 for v in (w, w.sign()))
