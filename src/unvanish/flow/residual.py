"""A record's own ∂E/∂W compared with autograd's."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.flow.record import LayerFlow
from unvanish.flow.recorded_sequence import RecordedSequence
from unvanish.flow.sketch import sketch
from unvanish.flow.transfer import numbers
from unvanish.flow.watched_sequence import Measured, Sequence

LARGE = 0.3
"""A residual that no rounding explains."""


def sketches_to_compare(measured: list[tuple[Sequence, list[Measured]]]) -> dict[Hashable, Tensor]:
    """Weight key → `sketch` of the ∂E/∂W of all sequences that use the weight, where one of them was replayed."""
    replayed = [part for sequence, found in measured if not isinstance(sequence, RecordedSequence) for part in found]
    keys, total = {key for part in replayed for key in part.gradients}, dict[Hashable, Tensor]()
    for sequence, found in measured:
        for key, gradient in (item for part in found for item in part.gradients.items() if item[0] in keys):
            made = sketch(gradient) if isinstance(sequence, RecordedSequence) else gradient
            total[key] = total[key] + made if key in total else made
    return total


def with_residual(
    record: LayerFlow,
    ours: dict[Hashable, Tensor],
    autograd: dict[Hashable, Tensor],
    weights: Mapping[Hashable, tuple[Tensor, Any]],
    rounding: float,
) -> LayerFlow:
    """The record with its residual, and an explanation where it is more than ten times what `rounding` explains, or
    more than `LARGE`.

    Args:
        ours: weight key → `sketch` of the record's ∂E/∂W.
        autograd: weight key → autograd's ∂E/∂W.
    """
    shared = {key: theirs for key, theirs in autograd.items() if key in ours}
    if not shared:
        return record
    more = {key: sketch(theirs) - ours[key] for key, theirs in shared.items()}
    compared = [v for key, theirs in shared.items() for v in (more[key], theirs)]
    norms = numbers([torch.linalg.vector_norm(v, dtype=torch.float64) for v in compared])
    apart, size = math.hypot(*norms[::2]), math.hypot(*norms[1::2])
    residual = apart / size if size > 0 else (0.0 if apart == 0 else math.inf)
    record, allowed = replace(record, residual=residual), min(10 * rounding, LARGE)
    if residual <= allowed or record.problem is not None or not math.isfinite(residual):
        return record
    if all(_is_a_penalty(v, weights.get(key)) for key, v in more.items()):
        return record
    return replace(
        record,
        problem=f"its own ∂E/∂W differs from autograd's by {residual:.1e} (rounding explains {allowed:.0e}): "
        "a weight takes part elsewhere in the loss too, part of the backward pass is hidden, or the backend's gradient "
        "is wrong; uv.audit checks it",
    )


def _is_a_penalty(extra: Tensor, weight: tuple[Tensor, Any] | None) -> bool:
    """Whether what autograd adds, as its `sketch`, is the gradient of a squared or absolute norm of the weight."""
    if weight is None:
        return False
    w, cosine = weight[0].detach(), nn.functional.cosine_similarity
    return any(float(cosine(extra.flatten(), sketch(v).flatten(), dim=0)) > 0.999 for v in (w, w.sign()))
