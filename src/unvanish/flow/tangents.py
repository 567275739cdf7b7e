"""The full-state Jacobian J_t = ∂s_t/∂s_{t−1} times vectors, without forming it for a few of them.

Either way costs G·H² per vector, and no S × S matrix per sample (`unvanish.cells.calculus`). For about as many vectors
as the state has components the matrix is formed.
"""

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import calculus
from unvanish.flow.stack import full_jacobians

FORMED_FROM = 0.25
"""The matrix is formed for more vectors than this share of the state's size."""


def forward(tr: engine.Trace, t: int, q: Tensor) -> Tensor:
    """J_t q for q `[B, S, n]`; q where a sample is inactive, whose state is held."""
    if q.shape[-1] > FORMED_FROM * q.shape[-2]:
        return full_jacobians(tr, t) @ q
    return _columns(tr, t, calculus.jvp(tr.cell, tr.partials_by_step[t], _rows(tr, q), tr.weights), q)


def transposed(tr: engine.Trace, t: int, q: Tensor) -> Tensor:
    """J_tᵀ q for q `[B, S, n]`."""
    if q.shape[-1] > FORMED_FROM * q.shape[-2]:
        return full_jacobians(tr, t).mT @ q
    return _columns(tr, t, calculus.adjoint(tr.cell, tr.partials_by_step[t], _rows(tr, q), tr.weights).previous, q)


def _rows(tr: engine.Trace, q: Tensor) -> tuple[Tensor, ...]:
    """[B, S, n] as the parts of the state, `[n, B, ·]`."""
    return q.permute(2, 0, 1).split([s.shape[-1] for s in tr.final], dim=-1)


def _columns(tr: engine.Trace, t: int, parts: tuple[Tensor, ...], held: Tensor) -> Tensor:
    """[n, B, ·] as `[B, S, n]`."""
    new = torch.cat(parts, dim=-1).permute(1, 2, 0)
    return new if tr.active is None else torch.where(tr.active[t].unsqueeze(-1), new, held)
