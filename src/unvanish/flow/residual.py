"""A record's own ∂E/∂W compared with autograd's."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.flow.record import LayerFlow
from unvanish.flow.transfer import numbers

LARGE = 0.3
"""A residual that no rounding explains."""


def with_residual(
    record: LayerFlow,
    ours: dict[Hashable, Tensor],
    autograd: dict[Hashable, Tensor],
    weights: Mapping[Hashable, tuple[Tensor, Any]],
    rounding: float,
) -> LayerFlow:
    """The record with its residual, and an explanation where it is more than ten times what `rounding` explains, or
    more than `LARGE`."""
    pairs = {key: (mine, autograd[key]) for key, mine in ours.items() if key in autograd}
    if not pairs:
        return record
    norms = numbers(
        [
            torch.linalg.vector_norm(v, dtype=torch.float64)
            for mine, theirs in pairs.values()
            for v in (mine - theirs, theirs)
        ]
    )
    apart, size = math.hypot(*norms[::2]), math.hypot(*norms[1::2])
    residual = apart / size if size > 0 else (0.0 if apart == 0 else math.inf)
    record, allowed = replace(record, residual=residual), min(10 * rounding, LARGE)
    if residual <= allowed or record.problem is not None or not math.isfinite(residual):
        return record
    if all(_is_a_penalty(theirs - mine, weights.get(key)) for key, (mine, theirs) in pairs.items()):
        return record
    return replace(
        record,
        problem=f"its own ∂E/∂W differs from autograd's by {residual:.1e} (rounding explains {allowed:.0e}): "
        "a weight takes part elsewhere in the loss too, part of the backward pass is hidden, or the backend's gradient "
        "is wrong; uv.audit checks it",
    )


def _is_a_penalty(extra: Tensor, weight: tuple[Tensor, Any] | None) -> bool:
    """Whether what autograd adds is the gradient of a squared or absolute norm of the weight."""
    if weight is None:
        return False
    w, cosine = weight[0].detach(), nn.functional.cosine_similarity
    return any(float(cosine(extra.flatten(), v.flatten(), dim=0)) > 0.999 for v in (w, w.sign()))
