"""Coupled oscillatory network (Rusch & Mishra 2021): a damped oscillator per unit, driven by the others.

z_t = z_{t-1} + Δt (tanh(W y_{t-1} + 𝒲 z_{t-1} + V x_t + b) − γ y_{t-1} − ε z_{t-1})      y_t = y_{t-1} + Δt z_t

Position y is carried with factor 1 and velocity z nearly so: over T steps of Δt ~ T^(−1/2) the gradient neither
vanishes nor explodes exponentially (proposition 3.1), at the price of a state that oscillates at given frequencies.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class CoRNN(Cell):
    """dt: Δt; gamma: squared frequency; epsilon: damping. Gate a reads y, gate w reads z."""

    gates, states = ("a", "w"), ("y", "z")
    inputs, recurrent = ("a",), {"a": "y", "w": "z"}

    def __init__(self, dt: float = 0.042, gamma: float = 2.7, epsilon: float = 4.7) -> None:
        self.dt, self.gamma, self.epsilon = dt, gamma, epsilon

    def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, Tensor]:
        z = s.z + self.dt * ((p.a + q.a + q.w).tanh() - self.gamma * s.y - self.epsilon * s.z)
        return s.y + self.dt * z, z
