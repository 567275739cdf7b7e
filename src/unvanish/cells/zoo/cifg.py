"""LSTM with coupled input and forget gates (Greff et al. 2017): what is forgotten makes room for what is written.

f, o = σ(p + q)      g = tanh(p + q)      c_t = f ⊙ c_{t-1} + (1 − f) ⊙ g      h_t = o ⊙ tanh(c_t)

The carry is f as in the LSTM; c is a running mean of g and stays in (−1, 1), so tanh'(c_t) never blocks the gradient
from h_t to c_t.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class CIFG(Cell):
    """i = 1 − f."""

    gates, states = ("f", "g", "o"), ("h", "c")

    def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, Tensor]:
        f, o = (p.f + q.f).sigmoid(), (p.o + q.o).sigmoid()
        c = f * s.c + (1 - f) * (p.g + q.g).tanh()
        return o * c.tanh(), c
