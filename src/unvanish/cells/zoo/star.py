"""Stackable recurrent cell (Turkoglu et al. 2019), made so that many layers keep the size of the gradient.

z = tanh(W_z x_t + b)      k = σ(W_k x_t + b + W h_{t-1})      h_t = tanh((1 − k) ⊙ h_{t-1} + k ⊙ z)

The carry is (1 − k) tanh': the outer tanh reduces it at every step, the more the further h is from 0.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class STAR(Cell):
    """z has no recurrent matrix."""

    gates, states, recurrent = ("z", "k"), ("h",), {"k": "h"}

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        k = (p.k + q.k).sigmoid()
        return ((1 - k) * s.h + k * p.z.tanh()).tanh()
