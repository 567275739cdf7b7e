"""Just another network (van der Westhuizen & Lasenby 2018): an LSTM with a forget gate only.

f = σ(p + q)      g = tanh(p + q)      h_t = f ⊙ h_{t-1} + (1 − σ(a_f − β)) ⊙ g,  a_f = p_f + q_f

The carry is f; β > 0 lets a unit write while it hardly forgets. Without an output gate and tanh between memory and
output, the gradient enters the memory undamped.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class JANET(Cell):
    """beta: how much the write gate lags behind the forget gate; 1 in the paper."""

    gates, states = ("f", "g"), ("h",)

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        a = p.f + q.f
        return a.sigmoid() * s.h + (1 - (a - self.beta).sigmoid()) * (p.g + q.g).tanh()
