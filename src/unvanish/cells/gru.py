"""The gated recurrent unit (Cho et al. 2014), in torch's form: the reset gate acts after the matrix product.

r_t, z_t = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)   (their blocks; torch's order r, z, n)
q_t = W_hn h_{t-1} + b_hn
n_t = tanh(W_in x_t + b_in + r_t ⊙ q_t)
h_t = (1 − z_t) ⊙ n_t + z_t ⊙ h_{t-1}
"""

from typing import Any

import torch
from torch import Tensor

from unvanish.cells.base import Cell
from unvanish.cells.calculus import Partials, Point


class GRU(Cell):
    """The update gate z carries h, as the forget gate carries the LSTM's c."""

    name = "gru"
    gates = ("r", "z", "n")
    states = ("h",)
    titles = {"r": "reset_gate", "z": "update_gate", "n": "candidate"}

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        """h_t = (1 − z_t) ⊙ n_t + z_t ⊙ h_{t-1}"""
        r, z = (p.r + q.r).sigmoid(), (p.z + q.z).sigmoid()
        return (1 - z) * (p.n + r * q.n).tanh() + z * s.h

    def partials(self, at: Point) -> Partials:
        """∂h_t/∂h_{t-1} = z at fixed shares, and with k_n = (1 − z)(1 − n²)

        ∂h_t/∂p^n = k_n    ∂h_t/∂q^n = r k_n    ∂h_t/∂a^r = k_n q r'    ∂h_t/∂a^z = (h_{t-1} − n) z'
        """
        r, z, n = at.gates.unbind(-2)
        q_n = self.candidate_share(at)
        k_n = (1 - z) * (1 - n * n)
        k_r, k_z = k_n * q_n * r * (1 - r), (at.before[0] - n) * z * (1 - z)
        by_q = {("h", "r"): k_r, ("h", "z"): k_z, ("h", "n"): k_n * r}
        return Partials({}, by_q, {**by_q, ("h", "n"): k_n}, {("h", "h"): z}, {})

    def candidate_share(self, at: Point) -> Tensor:
        """q^n_t = W_hn h_{t-1} + b_hn, `[..., H]`."""
        if at.kept is not None:
            return at.kept[..., 3, :]
        assert at.q is not None
        return at.q.chunk(3, dim=-1)[2]

    def carry(self, at: Point) -> Tensor:
        """z_t"""
        return at.gates[..., 1, :]

    def activations(self, at: Point) -> Tensor:
        """r, z, n"""
        assert at.q is not None
        (p_r, p_z, p_n), (q_r, q_z, q_n) = at.p.chunk(3, dim=-1), at.q.chunk(3, dim=-1)
        r, z = (p_r + q_r).sigmoid(), (p_z + q_z).sigmoid()
        return torch.stack([r, z, (p_n + r * q_n).tanh()], dim=-2)

    def sensitivity(self, at: Point) -> Tensor:
        """4 r (1 − r), 4 z (1 − z), 1 − n²"""
        r, z, n = at.gates.unbind(-2)
        return torch.stack([4 * r * (1 - r), 4 * z * (1 - z), 1 - n * n], dim=-2)

    @property
    def carries(self) -> bool:
        """Yes."""
        return True

    @property
    def carry_gate(self) -> tuple[str, int]:
        """The update gate."""
        return "z", 1
