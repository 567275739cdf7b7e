"""The chance that a training learns within `HORIZON` updates, estimated from the training of a copy.

    chance = σ(w₀ + Σ w_k z_k),   z: the features below

The weights are fitted by benchmarks/diagnosis.py on a grid of small trainings, and are valid for trainings like these.
Kinds of task that the fit leaves out show how far the chance can be trusted.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

from unvanish.diagnosis.interventions.arm import CHUNK, Arm

EARLY = 100
"""updates of the unchanged model after which its states are read out"""
HORIZON = 400
"""updates within which a training should have learnt"""
FAINTEST = -20.0
"""ln of the survival below which smaller values make no difference"""

WEIGHTS = (-2.52, 3.56, 2.01, 2.22, 0.66, 0.12, -0.38)
"""(w₀, w₁, …) in the order of `Features`"""


@dataclass(frozen=True)
class Features:
    """Features of a training from that of a copy; each roughly between −1 and 1."""

    quick: float
    """½ log₂(`HORIZON` / updates after which the copy clearly learnt); where it did not, of twice the updates it had"""
    fallen: float
    """largest gain below the bar on unseen samples within `HORIZON` updates, as a share of the bar"""
    fitted: float
    """fall of the loss on the samples that it is trained on at the end of them, as a share of the bar"""
    readable: float
    """R of a linear read-out of the states on held-out rows after `EARLY` updates; 0 where there is none"""
    survival: float
    """ln of the worst layer's survival over the lag before training, divided by 20"""
    diverged: float
    """1 where the copy's loss stopped being finite"""

    def chance(self, weights: tuple[float, ...] = WEIGHTS) -> float:
        """σ(w₀ + Σ w_k z_k).

        Raises:
            ValueError: there is not one weight for each feature and one constant.
        """
        if len(weights) != len(fields(self)) + 1:
            raise ValueError(f"weights: expected {len(fields(self)) + 1}, got {len(weights)}")
        z = weights[0] + sum(w * value for w, value in zip(weights[1:], astuple(self), strict=True))
        return 1 / (1 + math.exp(-max(min(z, 500.0), -500.0)))


def features(arm: Arm, readable: float, layers: Mapping[str, Any]) -> Features:
    """Of a copy that was trained for some updates, judged at least once.

    Args:
        arm: the copy of the model as it is.
        readable: R of the read-out of its states after `EARLY` updates.
        layers: name → measurement of each recurrent layer before training; its `evidence["median_survival"]` is used.
    """
    size = max(abs(arm.bar.mean), 1e-12)
    within = [j for j in arm.judgements if j.updates <= HORIZON]
    recent = arm.losses[:HORIZON][-CHUNK:]
    mean = sum(recent) / len(recent) if recent else math.nan
    updates = arm.cleared or 2 * max(arm.updates, 1)
    known = (layer.evidence.get("median_survival") for layer in layers.values() if layer.verdict != "undecided")
    survival = min([s for s in known if s is not None], default=1.0)
    return Features(
        quick=_clipped(0.5 * math.log2(HORIZON / updates), 1.0),
        fallen=_clipped(max(j.score.share for j in within), 1.0),
        fitted=_clipped((arm.bar.mean - mean) / size, 1.0),
        readable=_clipped(max(readable, 0.0), 1.0),
        survival=max(math.log(max(min(survival, 1.0), math.exp(FAINTEST))), FAINTEST) / -FAINTEST,
        diverged=float(bool(arm.failed)),
    )


def _clipped(value: float, most: float) -> float:
    """The value clipped to [−most, most]; NaN counts as the worst."""
    return -most if math.isnan(value) else max(-most, min(most, value))
