"""The full-state Jacobian J_t = ∂s_t/∂s_{t−1}, s = h or (h, c), times vectors, without forming it for a few of them.

Forward, with a' = W_hh δh for the gates' pre-activations and k_γ the gates' factors:

RNN   δh' = φ'(a) ⊙ a'
GRU   δh' = k_r ⊙ a'_r + k_z ⊙ a'_z + k_n ⊙ r ⊙ a'_n + z ⊙ δh
LSTM  δc' = k_i ⊙ a'_i + k_f ⊙ a'_f + k_g ⊙ a'_g + f ⊙ δc,    δh' = W_hr (u ⊙ δc' + k_o ⊙ a'_o)

Transposed it is the cell's adjoint. Either costs G·H² per vector, and no S × S matrix per sample. For about as many
vectors as the state has components the matrix is formed.
"""

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import GRU, LSTM, RNN
from unvanish.flow.stack import full_jacobians, saved_at

FORMED_FROM = 0.25
"""The matrix is formed for more vectors than this share of the state's size."""


def forward(tr: engine.Trace, t: int, q: Tensor) -> Tensor:
    """J_t q for q `[B, S, n]`; q where a sample is inactive, whose state is held."""
    if q.shape[-1] > FORMED_FROM * q.shape[-2]:
        return full_jacobians(tr, t) @ q
    saved, w = saved_at(tr, t), tr.weights
    h, *rest = _rows(tr, q)
    a = (h @ w.w_hh.mT).chunk(len(tr.cell.gates), dim=-1)
    if isinstance(tr.cell, LSTM):
        k_i, k_f, k_g = tr.cell.gate_factors(saved)
        c = k_i * a[0] + k_f * a[1] + k_g * a[2] + saved.f * rest[0]
        m = tr.cell.exposure(saved) * c + tr.cell.output_factor(saved) * a[3]
        new = (m if w.w_hr is None else m @ w.w_hr.mT, c)
    elif isinstance(tr.cell, GRU):
        k_r, k_z, k_n = tr.cell.gate_factors(saved)
        new = (k_r * a[0] + k_z * a[1] + k_n * saved.r * a[2] + saved.z * h,)
    else:
        assert isinstance(tr.cell, RNN)
        new = (tr.cell.derivative(saved.h) * a[0],)
    return _columns(tr, t, new, q)


def transposed(tr: engine.Trace, t: int, q: Tensor) -> Tensor:
    """J_tᵀ q for q `[B, S, n]`."""
    if q.shape[-1] > FORMED_FROM * q.shape[-2]:
        return full_jacobians(tr, t).mT @ q
    return _columns(tr, t, tr.cell.adjoint(_rows(tr, q), saved_at(tr, t), tr.weights).previous, q)


def _rows(tr: engine.Trace, q: Tensor) -> tuple[Tensor, ...]:
    """[B, S, n] as the parts of the state, `[n, B, ·]`."""
    return q.permute(2, 0, 1).split([s.shape[-1] for s in tr.final], dim=-1)


def _columns(tr: engine.Trace, t: int, parts: tuple[Tensor, ...], held: Tensor) -> Tensor:
    """[n, B, ·] as `[B, S, n]`."""
    new = torch.cat(parts, dim=-1).permute(1, 2, 0)
    return new if tr.active is None else torch.where(tr.active[t].unsqueeze(-1), new, held)
