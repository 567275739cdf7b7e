"""LSTM with peepholes (Gers & Schmidhuber 2000): the gates see the cell state itself.

i, f = σ(p + q + w ⊙ c_{t-1})      g = tanh(p + q)      c_t = f ⊙ c_{t-1} + i ⊙ g
o = σ(p + q + w_o ⊙ c_t)           h_t = o ⊙ tanh(c_t)

The gradient keeps the LSTM's carousel f; the peepholes add the diagonal c_{t-1} f' w_f + g i' w_i to it, so the content
of a unit influences how long it is kept.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class Peephole(Cell):
    """w_i, w_f and w_o are the peepholes."""

    gates, states, vectors = ("i", "f", "g", "o"), ("h", "c"), ("w_i", "w_f", "w_o")
    write_gate = "i"

    def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, Tensor]:
        i, f = (p.i + q.i + v.w_i * s.c).sigmoid(), (p.f + q.f + v.w_f * s.c).sigmoid()
        c = f * s.c + i * (p.g + q.g).tanh()
        o = (p.o + q.o + v.w_o * c).sigmoid()
        return o * c.tanh(), c
