"""The gated recurrent unit (Cho et al. 2014), in torch's form: the reset gate acts after the matrix product.

r_t, z_t = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)   (their blocks; torch's order r, z, n)
q_t = W_hn h_{t-1} + b_hn
n_t = tanh(W_in x_t + b_in + r_t ⊙ q_t)
h_t = (1 − z_t) ⊙ n_t + z_t ⊙ h_{t-1}
"""

from typing import Any

import torch
from torch import Tensor

from unvanish.cells.calculus import Diagonals, Partials, Point
from unvanish.cells.cell import Cell
from unvanish.cells.torch_kernel import Shares, TorchKernel


class GRUKernel(TorchKernel):
    """torch.gru returns its one state; the reset gate stands between δp and δq of the candidate."""

    name = "gru"

    def kept(self, shares: Shares, y: Tensor) -> Tensor:
        """r, z, n and q^n"""
        (p_rz, p_n), (q_rz, q_n) = (self._split(share) for share in shares())
        rz = (p_rz + q_rz).sigmoid()
        n = (p_n + rz[..., :1, :] * q_n).tanh()
        return torch.cat([rz, n, q_n], dim=-2)

    def recurrent(self, dp: Tensor, kept: Tensor) -> Tensor:
        """δq = [δp^r, δp^z, r ⊙ δp^n]"""
        rz, n = self._split(dp)
        return torch.cat([rz, n * kept[..., :1, :]], dim=-2).flatten(-2)

    def between(self, kept: Tensor, after: tuple[Tensor, ...]) -> tuple[Diagonals, Diagonals]:
        """∂h_t/∂h_{t-1} = z_t"""
        return {}, {("h", "h"): kept[..., 1, :]}

    @staticmethod
    def _split(v: Tensor) -> tuple[Tensor, ...]:
        """r and z `[..., 2, H]`, n `[..., 1, H]`."""
        return v.unflatten(-1, (3, -1)).split([2, 1], dim=-2)


class GRU(Cell):
    """The update gate z carries h, as the forget gate carries the LSTM's c."""

    name = "gru"
    gates = ("r", "z", "n")
    states = ("h",)
    titles = {"r": "reset_gate", "z": "update_gate", "n": "candidate"}
    torch_kernel = GRUKernel()

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
