"""Long short-term memory (Hochreiter & Schmidhuber 1997), with the forget gate of Gers, Schmidhuber & Cummins 2000.

i, f, o = σ(·)   g = tanh(·)   of   a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh      (torch's order i, f, g, o)
c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t
m_t = o_t ⊙ tanh(c_t)
h_t = m_t,  or W_hr m_t with a projection (Sak, Senior & Beaufays 2014)
"""

from typing import Any

import torch
from torch import Tensor

from unvanish.cells.calculus import Diagonals, Partials, Point
from unvanish.cells.cell import Cell
from unvanish.cells.torch_kernel import Shares, TorchKernel


class LSTMKernel(TorchKernel):
    """torch.lstm returns h of every step, c of the last alone."""

    name = "lstm"

    def kept(self, shares: Shares, y: Tensor) -> Tensor:
        """i, f, g, o"""
        p, q = shares()
        gates = (p + q).unflatten(-1, (4, -1))
        gates[..., :2, :].sigmoid_()
        gates[..., 2, :].tanh_()
        gates[..., 3, :].sigmoid_()
        return gates

    def others(self, kept: Tensor) -> list[tuple[Tensor, Tensor]]:
        """c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t"""
        i, f, g, _ = kept.unbind(-2)
        return [(f, i * g)]

    def between(self, kept: Tensor, after: tuple[Tensor, ...]) -> tuple[Diagonals, Diagonals]:
        """∂m_t/∂c_t = o_t ⊙ (1 − tanh² c_t), ∂c_t/∂c_{t-1} = f_t"""
        tanh_c = after[1].tanh()
        return {("h", "c"): kept[..., 3, :] * (1 - tanh_c * tanh_c)}, {("c", "c"): kept[..., 1, :]}


class LSTM(Cell):
    """The additive cell state c_t and the gates that guard it."""

    name = "lstm"
    gates = ("i", "f", "g", "o")
    states = ("h", "c")
    titles = {"i": "input_gate", "f": "forget_gate", "g": "candidate", "o": "output_gate"}
    write_gate = "i"
    torch_kernel = LSTMKernel()

    def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, Tensor]:
        """c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t,  m_t = o_t ⊙ tanh(c_t)"""
        i, f, g, o = (p.i + q.i).sigmoid(), (p.f + q.f).sigmoid(), (p.g + q.g).tanh(), (p.o + q.o).sigmoid()
        c = f * s.c + i * g
        return o * c.tanh(), c

    def partials(self, at: Point) -> Partials:
        """∂m_t/∂c_t = u_t = o_t ⊙ (1 − tanh² c_t)        ∂m_t/∂a^o = tanh(c_t) o'_t        ∂c_t/∂c_{t-1} = f_t

        ∂c_t/∂(a^i, a^f, a^g) = (g_t i'_t, c_{t-1} f'_t, i_t g'_t)
        """
        i, f, g, o = at.gates.unbind(-2)
        tanh_c = at.after[1].tanh()
        by_gate = {
            ("c", "i"): g * i * (1 - i),
            ("c", "f"): at.before[1] * f * (1 - f),
            ("c", "g"): i * (1 - g * g),
            ("h", "o"): tanh_c * o * (1 - o),
        }
        return Partials({("h", "c"): o * (1 - tanh_c**2)}, by_gate, by_gate, {("c", "c"): f}, {})

    def output(self, at: Point) -> Tensor:
        """m_t = o_t ⊙ tanh(c_t)"""
        return at.gates[..., 3, :] * at.after[1].tanh()

    def carry(self, at: Point) -> Tensor:
        """f_t"""
        return at.gates[..., 1, :]

    def activations(self, at: Point) -> Tensor:
        """i, f, g, o"""
        assert at.q is not None
        i, f, g, o = (at.p + at.q).chunk(4, dim=-1)
        return torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=-2)

    def sensitivity(self, at: Point) -> Tensor:
        """4 i (1 − i), 4 f (1 − f), 1 − g², 4 o (1 − o)"""
        i, f, g, o = at.gates.unbind(-2)
        return torch.stack([4 * i * (1 - i), 4 * f * (1 - f), 1 - g * g, 4 * o * (1 - o)], dim=-2)

    @property
    def carries(self) -> bool:
        """Yes."""
        return True

    @property
    def carry_gate(self) -> tuple[str, int]:
        """The forget gate."""
        return "f", 1
