"""Gradients that grow on their way back: from the measurement of each layer, or by ∂answer/∂x_t along all paths."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from unvanish.diagnosis.exact.testbench import RECURRENT, Bench
from unvanish.diagnosis.finding import Finding

ERROR, LEAST = 1e6, 1e2
"""growth over the lag: from the first value on, no learning rate fits all steps; below the second it does not count"""


def growth(layers: Mapping[str, Any]) -> list[Finding]:
    """One finding for the layer whose gradient grows the most; below a hundredfold there is none."""
    grown = {
        name: d
        for name, d in layers.items()
        if d.verdict in ("explodes", "chaotic") and len(d.curve) and max(d.curve) > math.log(LEAST)
    }
    if not grown:
        return []
    name, d = max(grown.items(), key=lambda item: max(item[1].curve))
    most = max(d.curve)
    factor = f"{math.exp(most):.2g}" if most < 700 else f"10^{most / math.log(10):.0f}"
    if d.verdict == "chaotic":
        return [
            Finding(
                "chaotic", "warning", name,
                f"`{name}` is chaotic: small differences in its state grow at every step, and so does the gradient.",
                f"Lyapunov exponent {d.evidence['lyapunov']:+.3g} nats per step; the gradient grows {factor}-fold "
                f"within {d.lag} steps.",
                "Scale the recurrent matrices down, `uv.cures.spectral_radius_(layer, 1.0)`, and clip the gradient.",
            )
        ]  # fmt: skip
    return [
        Finding(
            "explodes", "error" if most > math.log(ERROR) else "warning", name,
            f"The gradient explodes in `{name}` on its way back through time.",
            f"It grows {factor}-fold within {d.lag} steps ({d.rate_in_words}).",
            "Scale the recurrent matrices down, `uv.cures.spectral_radius_(layer, 1.0)`, and clip: "
            "`torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)`.",
        )
    ]  # fmt: skip


STEADY = 0.9
"""R² of a line through ln ‖∂answer/∂x_t‖ over t, from which growth is attributed to every step, not to a few"""


def explosion(bench: Bench) -> list[Finding]:
    """‖∂answer/∂x_t‖ that grows by a factor per step on the way back, in a model whose recurrence is a loop of its own:
    no layer is measured there."""
    if any(isinstance(m, RECURRENT) for m in bench.model.modules()) or bench.reach is None:
        return []
    norms = bench.reach[0].median(0).values
    T = len(norms)
    if T < 5 or not bool((norms > 0).all()) or not bool(norms.isfinite().all()):
        return []
    back, lag = norms.log().flip(0), torch.arange(T, dtype=torch.float64)
    lag = lag - lag.mean()
    rate = float(lag @ back / (lag @ lag))
    left = back - back.mean() - rate * lag
    steady = 1 - float(left.square().sum() / (back - back.mean()).square().sum().clamp_min(1e-300))
    grown = rate * (T - 1)
    if grown < math.log(LEAST) or steady < STEADY:
        return []
    factor = f"{math.exp(grown):.2g}" if grown < 700 else f"10^{grown / math.log(10):.0f}"
    return [
        Finding(
            "explodes", "error" if grown > math.log(ERROR) else "warning", "",
            "The gradient explodes on its way back through time.",
            f"∂answer/∂x_t grows {math.exp(rate):.3g}-fold with every step back, {factor}-fold over {T} steps.",
            "Scale the recurrent matrices down to a spectral radius of at most 1, and clip: "
            "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).",
        )
    ]  # fmt: skip
