"""Long short-term memory (Hochreiter & Schmidhuber 1997), with the forget gate of Gers, Schmidhuber & Cummins 2000.

i, f, o = σ(·)   g = tanh(·)   of   a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh      (torch's order i, f, g, o)
c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t
m_t = o_t ⊙ tanh(c_t)
h_t = m_t,  or W_hr m_t with a projection (Sak, Senior & Beaufays 2014)
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from unvanish.cells.base import Adjoint, Cell, State, Weights, block_matrix, diag_matmul, matmul_diag


class LSTM(Cell):
    """The additive cell state c_t and the gates that guard it."""

    name = "lstm"
    gates = ("i", "f", "g", "o")
    states = ("h", "c")

    class Saved(NamedTuple):
        h_prev: Tensor
        c_prev: Tensor
        i: Tensor
        f: Tensor
        g: Tensor
        o: Tensor
        c: Tensor

    def step(self, p: Tensor, state: State, w: Weights) -> tuple[State, Saved]:
        """c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t,  h_t = W_hr (o_t ⊙ tanh c_t)"""
        h_prev, c_prev = state
        a_i, a_f, a_g, a_o = (p + linear(h_prev, w.w_hh, w.b_hh)).chunk(4, dim=-1)
        i, f, g, o = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh(), a_o.sigmoid()
        c = f * c_prev + i * g
        saved = self.Saved(h_prev, c_prev, i, f, g, o, c)
        m = self.output(saved)
        return (m if w.w_hr is None else linear(m, w.w_hr), c), saved

    def output(self, saved: Saved) -> Tensor:
        """m_t = o_t ⊙ tanh(c_t), `[..., H]`: h_t before any projection."""
        return saved.o * saved.c.tanh()

    def exposure(self, saved: Saved) -> Tensor:
        """u_t = ∂m_t/∂c_t = o_t ⊙ (1 − tanh² c_t), `[..., H]`."""
        return saved.o * (1 - saved.c.tanh() ** 2)

    def gate_factors(self, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """(∂c_t/∂a^i, ∂c_t/∂a^f, ∂c_t/∂a^g) = (g_t i'_t, c_{t-1} f'_t, i_t g'_t), diagonals `[..., H]`."""
        i, f, g = saved.i, saved.f, saved.g
        return g * i * (1 - i), saved.c_prev * f * (1 - f), i * (1 - g * g)

    def output_factor(self, saved: Saved) -> Tensor:
        """∂m_t/∂a^o = tanh(c_t) o'_t, diagonal `[..., H]`."""
        return saved.c.tanh() * saved.o * (1 - saved.o)

    def adjoint(self, d: State, saved: Saved, w: Weights) -> Adjoint:
        """With δm_t = W_hrᵀ δh_t:

        δc_t = δm_t ⊙ u_t + (what reaches c_t from later steps)
        δa_t = [δc_t g_t i'_t,  δc_t c_{t-1} f'_t,  δc_t i_t g'_t,  δm_t tanh(c_t) o'_t]
        W_hhᵀ δa_t goes to h_{t-1},  f_t ⊙ δc_t to c_{t-1}.
        """
        dh, dc_later = d
        dm = dh if w.w_hr is None else dh @ w.w_hr
        dc = dm * self.exposure(saved) + dc_later
        k_i, k_f, k_g = self.gate_factors(saved)
        da = torch.cat([dc * k_i, dc * k_f, dc * k_g, dm * self.output_factor(saved)], dim=-1)
        return Adjoint((dh, dc), da, da, (da @ w.w_hh, saved.f * dc))

    def jacobian(self, saved: Saved, w: Weights) -> Tensor:
        """∂(h_t, c_t)/∂(h_{t-1}, c_{t-1}), `[..., R + H, R + H]`.

        ∂c_t/∂h_{t-1} = diag(g i') W_hi + diag(c_{t-1} f') W_hf + diag(i g') W_hg      ∂c_t/∂c_{t-1} = diag(f_t)
        ∂m_t/∂·       = diag(u_t) ∂c_t/∂·  (+ diag(tanh(c_t) o') W_ho for h_{t-1})     ∂h_t = W_hr ∂m_t
        """
        w_hi, w_hf, w_hg, w_ho = w.w_hh.chunk(4, dim=0)
        k_i, k_f, k_g = self.gate_factors(saved)
        u = self.exposure(saved)
        dc_dh = diag_matmul(k_i, w_hi) + diag_matmul(k_f, w_hf) + diag_matmul(k_g, w_hg)
        dc_dc = torch.diag_embed(saved.f)
        dm_dh = diag_matmul(u, dc_dh) + diag_matmul(self.output_factor(saved), w_ho)
        dm_dc = diag_matmul(u, dc_dc)
        if w.w_hr is not None:
            dm_dh, dm_dc = w.w_hr @ dm_dh, matmul_diag(w.w_hr, u * saved.f)
        return block_matrix([[dm_dh, dm_dc], [dc_dh, dc_dc]])

    def activations(self, saved: Saved) -> Tensor:
        """i, f, g, o"""
        return torch.stack([saved.i, saved.f, saved.g, saved.o], dim=-2)

    def sensitivity(self, saved: Saved) -> Tensor:
        """4 i (1 − i), 4 f (1 − f), 1 − g², 4 o (1 − o)"""
        i, f, g, o = saved.i, saved.f, saved.g, saved.o
        return torch.stack([4 * i * (1 - i), 4 * f * (1 - f), 1 - g * g, 4 * o * (1 - o)], dim=-2)
