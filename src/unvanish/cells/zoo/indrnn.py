"""Independently recurrent network (Li et al. 2018): every unit reads its own state alone.

h_t = relu(W x_t + b + u ⊙ h_{t-1})

There is no recurrent matrix: the Jacobian is diag(u φ'), so over a lag ℓ the gradient of a unit whose relu stays on is
multiplied by exactly u^ℓ. Reach is bounded by |u|, which starts in [0, 1]. Units are mixed by the next layer.
"""

from typing import Any

import torch
from torch import Tensor

from unvanish.cells.cell import Cell


class IndRNN(Cell):
    """u is the recurrent weight of each unit."""

    gates, states, vectors, recurrent = ("h",), ("h",), ("u",), {}

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        return (p.h + v.u * s.h).relu()

    def initialise_(self, w: Any, generator: torch.Generator | None = None) -> None:
        """u ~ U[0, 1], as for tasks in which only the last output counts (section 4 of the paper)."""
        w.v[0].uniform_(0, 1, generator=generator)
