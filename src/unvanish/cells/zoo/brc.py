"""Bistable recurrent cell (Vecoven, Ernst & Drion 2021): memory within each unit, as in IndRNN.

a = 1 + tanh(p + w_a ⊙ h_{t-1})      c = σ(p + w_c ⊙ h_{t-1})      h_t = c ⊙ h_{t-1} + (1 − c) ⊙ tanh(p_h + a ⊙ h_{t-1})

If a > 1, a unit has two stable states and keeps either of them for ever, but at both ∂h_t/∂h_{t-1} < 1: it remembers a
bit for any time, although the gradient vanishes.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class BRC(Cell):
    """w_a and w_c are the recurrent weights of each unit."""

    gates, states, vectors, recurrent = ("a", "c", "h"), ("h",), ("w_a", "w_c"), {}

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        a, c = 1 + (p.a + v.w_a * s.h).tanh(), (p.c + v.w_c * s.h).sigmoid()
        return c * s.h + (1 - c) * (p.h + a * s.h).tanh()
