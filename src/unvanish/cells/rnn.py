"""The plain recurrent network (Elman 1990).

a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh        h_t = φ(a_t),  φ ∈ {tanh, relu, σ}
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from unvanish.cells.calculus import Partials, Point
from unvanish.cells.cell import Cell
from unvanish.cells.torch_kernel import Shares, TorchKernel


class RNNKernel(TorchKernel):
    """torch.rnn_tanh and rnn_relu return all there is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def kept(self, shares: Shares, y: Tensor) -> Tensor:
        """h_t, the only "gate"."""
        return y.unsqueeze(-2)


class RNN(Cell):
    """h_t = φ(a_t). φ' is written in terms of h_t, which every φ here allows."""

    gates = ("h",)
    states = ("h",)
    titles = {"h": "recurrent"}
    phi: ClassVar[Callable[[Tensor], Tensor]]
    max_derivative: ClassVar[float] = 1.0
    """γ = max φ': ‖∂h_t/∂h_{t-1}‖ ≤ γ σ_max(W_hh)"""

    @abstractmethod
    def derivative(self, h: Tensor) -> Tensor:
        """φ'(a), given h = φ(a)."""

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        """h_t = φ(p_t + W_hh h_{t-1} + b_hh)"""
        return type(self).phi(p.h + q.h)

    def partials(self, at: Point) -> Partials:
        """∂h_t/∂a_t = φ'(a_t)"""
        by_gate = {("h", "h"): self.derivative(at.after[0])}
        return Partials({}, by_gate, by_gate, {}, {})

    def carry(self, at: Point) -> None:
        """Nothing."""

    def activations(self, at: Point) -> Tensor:
        """h_t: the only "gate"."""
        return at.after[0].unsqueeze(-2)

    def sensitivity(self, at: Point) -> Tensor:
        """φ'(a_t) / max φ'"""
        return (self.derivative(at.after[0]) / self.max_derivative).unsqueeze(-2)

    @property
    def carries(self) -> bool:
        """No."""
        return False

    @property
    def carry_gate(self) -> None:
        """Nothing carries h."""


class TanhRNN(RNN):
    """φ = tanh, φ' = 1 − h²"""

    name = "rnn_tanh"
    torch_kernel = RNNKernel("rnn_tanh")
    phi = staticmethod(torch.tanh)

    def derivative(self, h: Tensor) -> Tensor:
        return 1 - h * h


class ReluRNN(RNN):
    """φ = relu, φ' = [h > 0]"""

    name = "rnn_relu"
    torch_kernel = RNNKernel("rnn_relu")
    rectifies = True
    phi = staticmethod(torch.relu)

    def derivative(self, h: Tensor) -> Tensor:
        return (~(h <= 0)).to(h.dtype)  # of NaN 1, as in torch


class SigmoidRNN(RNN):
    """φ = σ, φ' = h (1 − h) ≤ 1/4"""

    name = "rnn_sigmoid"
    phi = staticmethod(torch.sigmoid)
    max_derivative = 0.25

    def derivative(self, h: Tensor) -> Tensor:
        return h * (1 - h)
