"""Minimal gated unit (Zhou et al. 2016), with the gate after the matrix product as in torch's GRU.

f = σ(p + q)      n = tanh(p_n + f ⊙ q_n)      h_t = (1 − f) ⊙ h_{t-1} + f ⊙ n

The carry is 1 − f, and the same gate scales the recurrent product: a unit that keeps its state is hardly affected by
the other units.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class MGU(Cell):
    """One gate for forgetting, writing and resetting."""

    gates, states = ("f", "n"), ("h",)

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        f = (p.f + q.f).sigmoid()
        return (1 - f) * s.h + f * (p.n + f * q.n).tanh()
