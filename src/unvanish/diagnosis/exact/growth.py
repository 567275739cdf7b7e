"""Gradients that grow on their way back, from the measurement of each layer."""

import math
from collections.abc import Mapping
from typing import Any

from unvanish.diagnosis.finding import Finding

ERROR, LEAST = 1e6, 1e2
"""growth over the lag: from the first on no learning rate fits all steps; below the second it is none"""


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
