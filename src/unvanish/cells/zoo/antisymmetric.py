"""AntisymmetricRNN (Chang et al. 2019): Euler's method on a stable differential equation.

h_t = h_{t-1} + ε tanh(W_x x_t + b + (W − Wᵀ − γ I) h_{t-1})

The eigenvalues of W − Wᵀ are imaginary: in continuous time the gradient rotates and keeps its length. Each Euler step
lets it grow by |1 + iελ|, which the diffusion γ compensates.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell, Weights


class AntisymmetricRNN(Cell):
    """epsilon: the step size ε; gamma: the diffusion γ."""

    name = "antisymmetric"
    gates, states = ("h",), ("h",)

    def __init__(self, epsilon: float = 0.1, gamma: float = 0.1) -> None:
        self.epsilon, self.gamma = epsilon, gamma

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        return s.h + self.epsilon * (p.h + q.h - self.gamma * s.h).tanh()

    def effective(self, w: Weights) -> Weights:
        """W − Wᵀ in the place of W."""
        assert w.w_hh is not None
        return w._replace(w_hh=w.w_hh - w.w_hh.mT)
