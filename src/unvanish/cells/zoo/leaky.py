"""Leaky integrator, or continuous-time RNN (Funahashi & Nakamura 1993; Jaeger et al. 2007), with one rate for all
units.

h_t = (1 − α) h_{t-1} + α tanh(W_x x_t + b + W h_{t-1}),   α = Δt/τ

The carry is the constant 1 − α: alone it keeps e^(−α ℓ) of the gradient over a lag ℓ. A unit that is slow enough for
the lag is also slow to react.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class Leaky(Cell):
    """alpha: α, the step over the time constant."""

    gates, states = ("h",), ("h",)

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = alpha

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        return (1 - self.alpha) * s.h + self.alpha * (p.h + q.h).tanh()
