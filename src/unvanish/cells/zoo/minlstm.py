"""minLSTM (Feng et al. 2024): an LSTM whose gates see the input alone, with forget and input gate scaled to sum to 1.

f, i = σ(p)      f' = f / (f + i)      h_t = f' ⊙ h_{t-1} + (1 − f') ⊙ p_h

There is no recurrent matrix: the Jacobian is diag(f'_t). The gradient can vanish but never explode.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class MinLSTM(Cell):
    """The length-independent scaling of section 3.2.3; the candidate is linear."""

    gates, states, recurrent = ("f", "i", "h"), ("h",), {}

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        f, i = p.f.sigmoid(), p.i.sigmoid()
        keep = f / (f + i)
        return keep * s.h + (1 - keep) * p.h
