"""minGRU (Feng et al. 2024): a GRU whose gates see the input alone, and which could be run as a parallel scan.

z = σ(p)      h_t = (1 − z) ⊙ h_{t-1} + z ⊙ g(p_h),   g(a) = a + 1/2 for a ≥ 0, σ(a) below

There is no recurrent matrix: the Jacobian is diag(1 − z_t), the carry alone, so the gradient can vanish but never
explode, and the LSTM's terms A, C and D do not exist.
"""

from typing import Any

import torch
from torch import Tensor

from unvanish.cells.cell import Cell


class MinGRU(Cell):
    """The state stays positive, as in the paper's log-space form."""

    gates, states, recurrent = ("z", "h"), ("h",), {}

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        z = p.z.sigmoid()
        return (1 - z) * s.h + z * torch.where(p.h >= 0, p.h + 0.5, p.h.sigmoid())
