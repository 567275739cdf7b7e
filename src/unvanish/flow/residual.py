"""A record's own ∂E/∂W compared with autograd's."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.engine.precision import full_precision
from unvanish.flow.recorded_sequence import RecordedSequence
from unvanish.flow.sketch import sketch
from unvanish.flow.transfer import numbers
from unvanish.flow.watched_sequence import Measured, Sequence

LARGE = 0.3
"""A residual that no rounding explains."""


Reached = list[tuple[Sequence, list[Measured]]]
"""the sequences that a backward pass reached, and what was measured of each"""


def with_residuals(
    reached: Reached, autograd: Mapping[Hashable, Tensor], weights: Mapping[Hashable, tuple[Tensor, Any]]
) -> Reached:
    """The same, with a residual in every record of a replay, and an explanation where it is more than ten times what
    rounding explains, or more than `LARGE`.

    Args:
        reached: the sequences of a pass.
        autograd: weight key → autograd's ∂E/∂W of the pass.
        weights: weight key → (the weight, its hook).
    """
    replayed = [part for sequence, parts in reached if not isinstance(sequence, RecordedSequence) for part in parts]
    theirs = {key: autograd[key] for part in replayed for key in part.gradients if key in autograd}
    if not theirs:
        return reached
    with full_precision():
        extra = _extra(reached, theirs)
        return [
            (
                sequence,
                parts
                if isinstance(sequence, RecordedSequence)
                else [_compared(part, extra, theirs, weights, sequence.rounding) for part in parts],
            )
            for sequence, parts in reached
        ]


def _extra(reached: Reached, theirs: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
    """Weight key → `sketch` of autograd's ∂E/∂W − Σ_t g_t, the sum over all sequences that use the weight."""
    extra = {key: sketch(gradient) for key, gradient in theirs.items()}
    for sequence, parts in reached:
        whole = isinstance(sequence, RecordedSequence)
        for key, gradient in (item for part in parts for item in part.gradients.items() if item[0] in extra):
            extra[key] = extra[key] - (sketch(gradient) if whole else gradient)
    return extra


def _compared(
    part: Measured,
    extra: Mapping[Hashable, Tensor],
    theirs: Mapping[Hashable, Tensor],
    weights: Mapping[Hashable, tuple[Tensor, Any]],
    rounding: float,
) -> Measured:
    keys = [key for key in part.gradients if key in theirs]
    if not keys:
        return part
    norms = numbers([torch.linalg.vector_norm(v, dtype=torch.float64) for k in keys for v in (extra[k], theirs[k])])
    apart, size = math.hypot(*norms[::2]), math.hypot(*norms[1::2])
    residual = apart / size if size > 0 else (0.0 if apart == 0 else math.inf)
    record, allowed = replace(part.flow, residual=residual), min(10 * rounding, LARGE)
    explained = residual <= allowed or record.problem is not None or not math.isfinite(residual)
    if not explained and not all(_is_a_penalty(extra[key], weights.get(key)) for key in keys):
        record = replace(
            record,
            problem=f"its own ∂E/∂W differs from autograd's by {residual:.1e} (rounding explains {allowed:.0e}): "
            "a weight takes part elsewhere in the loss too, part of the backward pass is hidden, or the backend's "
            "gradient is wrong; uv.audit checks it",
        )
    return replace(part, flow=record)


def _is_a_penalty(extra: Tensor, weight: tuple[Tensor, Any] | None) -> bool:
    """Whether what autograd adds, as its `sketch`, is the gradient of a squared or absolute norm of the weight."""
    if weight is None:
        return False
    w, cosine = weight[0].detach(), nn.functional.cosine_similarity
    return any(float(cosine(extra.flatten(), sketch(v).flatten(), dim=0)) > 0.999 for v in (w, w.sign()))
