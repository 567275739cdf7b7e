"""sLSTM (Beck et al. 2024): exponential gates, a normaliser n and a stabiliser m; one head, without its block around
it.

ĩ, f̃, z̃, õ = p + q      m_t = max(ln σ(f̃) + m_{t-1}, ĩ)      i = e^(ĩ − m_t)      f = e^(ln σ(f̃) + m_{t-1} − m_t)
c_t = f ⊙ c_{t-1} + i ⊙ tanh(z̃)      n_t = f ⊙ n_{t-1} + i      h_t = σ(õ) ⊙ c_t / n_t

h is a weighted mean of what was written, with weights that only later gates decide. It does not change with m, which
keeps numbers in range: c and n are scaled by e^(−m), and so are their gradients. No gradient flows through m itself.
"""

from typing import Any

import torch
from torch import Tensor

from unvanish.cells.cell import Cell


class SLSTM(Cell):
    """n starts at 1, so that c/n is defined where a first input gate underflows."""

    gates, states = ("i", "f", "z", "o"), ("h", "c", "n", "m")
    initial = {"n": 1.0}

    def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, ...]:
        i, kept = p.i + q.i, torch.nn.functional.logsigmoid(p.f + q.f) + s.m
        m = torch.maximum(kept, i).detach()
        f, i = (kept - m).exp(), (i - m).exp()
        c, n = f * s.c + i * (p.z + q.z).tanh(), f * s.n + i
        return (p.o + q.o).sigmoid() * c / n, c, n, m
