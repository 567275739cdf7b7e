"""Light GRU (Ravanelli et al. 2018), without its batch normalisation: no reset gate, and relu for the candidate.

z = σ(p + q)      n = relu(p + q)      h_t = z ⊙ h_{t-1} + (1 − z) ⊙ n

The carry is z. relu does not saturate, so only the gate bounds the state: with a large W_hn, state and gradient can
grow.
"""

from typing import Any

from torch import Tensor

from unvanish.cells.cell import Cell


class LiGRU(Cell):
    """A GRU for speech: one gate and relu."""

    gates, states = ("z", "n"), ("h",)

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        z = (p.z + q.z).sigmoid()
        return z * s.h + (1 - z) * (p.n + q.n).relu()
