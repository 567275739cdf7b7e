"""The gated recurrent unit (Cho et al. 2014), in torch's form: the reset gate acts after the matrix product.

r_t, z_t = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)   (their blocks; torch's order r, z, n)
q_t = W_hn h_{t-1} + b_hn
n_t = tanh(W_in x_t + b_in + r_t ⊙ q_t)
h_t = (1 − z_t) ⊙ n_t + z_t ⊙ h_{t-1}
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from unvanish.cells.base import Adjoint, Cell, State, Weights, diag_matmul


class GRU(Cell):
    """The update gate z carries h, as the forget gate carries the LSTM's c."""

    name = "gru"
    gates = ("r", "z", "n")
    states = ("h",)

    class Saved(NamedTuple):
        h_prev: Tensor
        r: Tensor
        z: Tensor
        n: Tensor
        q: Tensor

    def step(self, p: Tensor, state: State, w: Weights) -> tuple[State, Saved]:
        """h_t = (1 − z_t) ⊙ n_t + z_t ⊙ h_{t-1}"""
        (h_prev,) = state
        p_r, p_z, p_n = p.chunk(3, dim=-1)
        q_r, q_z, q = linear(h_prev, w.w_hh, w.b_hh).chunk(3, dim=-1)
        r, z = (p_r + q_r).sigmoid(), (p_z + q_z).sigmoid()
        n = (p_n + r * q).tanh()
        return ((1 - z) * n + z * h_prev,), self.Saved(h_prev, r, z, n, q)

    def gate_factors(self, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """(∂h_t/∂a^r, ∂h_t/∂a^z, ∂h_t/∂a^n), diagonals `[..., H]`.

        ∂h_t/∂a^n = (1 − z)(1 − n²)    ∂h_t/∂a^r = ∂h_t/∂a^n ⊙ q r'    ∂h_t/∂a^z = (h_{t-1} − n) z'
        """
        r, z, n = saved.r, saved.z, saved.n
        k_n = (1 - z) * (1 - n * n)
        return k_n * saved.q * r * (1 - r), (saved.h_prev - n) * z * (1 - z), k_n

    def adjoint(self, d: State, saved: Saved, w: Weights) -> Adjoint:
        """δa_t = δh_t ⊙ ∂h_t/∂a_t; the candidate's share reaches W_hn h_{t-1} + b_hn through r_t.

        W_hhᵀ [δa^r, δa^z, r ⊙ δa^n] + z_t ⊙ δh_t goes to h_{t-1}.
        """
        (dh,) = d
        k_r, k_z, k_n = self.gate_factors(saved)
        da_r, da_z, da_n = dh * k_r, dh * k_z, dh * k_n
        da = torch.cat([da_r, da_z, da_n], dim=-1)
        da_hh = torch.cat([da_r, da_z, saved.r * da_n], dim=-1)
        return Adjoint((dh,), da, da_hh, (da_hh @ w.w_hh + saved.z * dh,))

    def jacobian(self, saved: Saved, w: Weights) -> Tensor:
        """∂h_t/∂h_{t-1} = diag(z) + diag(k_r) W_hr + diag(k_z) W_hz + diag(k_n r) W_hn"""
        w_hr, w_hz, w_hn = w.w_hh.chunk(3, dim=0)
        k_r, k_z, k_n = self.gate_factors(saved)
        recurrent = diag_matmul(k_r, w_hr) + diag_matmul(k_z, w_hz) + diag_matmul(k_n * saved.r, w_hn)
        return torch.diag_embed(saved.z) + recurrent

    def activations(self, saved: Saved) -> Tensor:
        """r, z, n"""
        return torch.stack([saved.r, saved.z, saved.n], dim=-2)

    def sensitivity(self, saved: Saved) -> Tensor:
        """4 r (1 − r), 4 z (1 − z), 1 − n²"""
        r, z, n = saved.r, saved.z, saved.n
        return torch.stack([4 * r * (1 - r), 4 * z * (1 - z), 1 - n * n], dim=-2)
