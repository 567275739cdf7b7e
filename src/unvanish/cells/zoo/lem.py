"""Long expressive memory (Rusch et al. 2022): two states on time scales that the input chooses.

Δ, Δ̄ = Δt σ(p + W y_{t-1} + b)
z_t = (1 − Δ) ⊙ z_{t-1} + Δ ⊙ tanh(p + W_z y_{t-1} + b)
y_t = (1 − Δ̄) ⊙ y_{t-1} + Δ̄ ⊙ tanh(p + W_y z_t + b)                         reads z of the same step

Both carries are 1 − O(Δt), so for small Δt the gradient survives about 1/Δt steps, and there are bounds on it for every
length (propositions 4.1 and 4.2).
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class LEM(Cell):
    """dt: Δt. Gates a and b are the time scales of z and y."""

    gates, states = ("a", "b", "z", "y"), ("y", "z")
    recurrent, same_step = {"a": "y", "b": "y", "z": "y", "y": "z"}, ("y",)

    def __init__(self, dt: float = 1.0) -> None:
        self.dt = dt

    def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, Tensor]:
        a, b = self.dt * (p.a + q.a).sigmoid(), self.dt * (p.b + q.b).sigmoid()
        z = (1 - a) * s.z + a * (p.z + q.z).tanh()
        return (1 - b) * s.y + b * (p.y + q.y).tanh(), z
