"""The plain recurrent network (Elman 1990).

a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh        h_t = φ(a_t),  φ ∈ {tanh, relu, σ}
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from unvanish.cells.base import Adjoint, Cell, State, Weights, diag_matmul


class RNN(Cell):
    """h_t = φ(a_t). φ' is written in terms of h_t, which every φ here allows."""

    gates = ("h",)
    states = ("h",)
    phi: ClassVar[Callable[[Tensor], Tensor]]
    max_derivative: ClassVar[float] = 1.0
    """γ = max φ': ‖∂h_t/∂h_{t-1}‖ ≤ γ σ_max(W_hh)"""

    class Saved(NamedTuple):
        h_prev: Tensor
        h: Tensor

    @abstractmethod
    def derivative(self, h: Tensor) -> Tensor:
        """φ'(a), given h = φ(a)."""

    def step(self, p: Tensor, state: State, w: Weights) -> tuple[State, Saved]:
        """h_t = φ(p_t + W_hh h_{t-1} + b_hh)"""
        (h_prev,) = state
        h = type(self).phi(p + linear(h_prev, w.w_hh, w.b_hh))
        return (h,), self.Saved(h_prev, h)

    def adjoint(self, d: State, saved: Saved, w: Weights) -> Adjoint:
        """δa_t = φ'(a_t) ⊙ δh_t;  W_hhᵀ δa_t goes to h_{t-1}."""
        (dh,) = d
        da = dh * self.derivative(saved.h)
        return Adjoint((dh,), da, da, (da @ w.w_hh,))

    def jacobian(self, saved: Saved, w: Weights) -> Tensor:
        """∂h_t/∂h_{t-1} = diag(φ'(a_t)) W_hh"""
        return diag_matmul(self.derivative(saved.h), w.w_hh)

    def activations(self, saved: Saved) -> Tensor:
        """h_t: the only "gate"."""
        return saved.h.unsqueeze(-2)

    def sensitivity(self, saved: Saved) -> Tensor:
        """φ'(a_t) / max φ'"""
        return (self.derivative(saved.h) / self.max_derivative).unsqueeze(-2)


class TanhRNN(RNN):
    """φ = tanh, φ' = 1 − h²"""

    name = "rnn_tanh"
    phi = staticmethod(torch.tanh)

    def derivative(self, h: Tensor) -> Tensor:
        return 1 - h * h


class ReluRNN(RNN):
    """φ = relu, φ' = [h > 0]"""

    name = "rnn_relu"
    phi = staticmethod(torch.relu)

    def derivative(self, h: Tensor) -> Tensor:
        return (h > 0).to(h.dtype)


class SigmoidRNN(RNN):
    """φ = σ, φ' = h (1 − h) ≤ 1/4"""

    name = "rnn_sigmoid"
    phi = staticmethod(torch.sigmoid)
    max_derivative = 0.25

    def derivative(self, h: Tensor) -> Tensor:
        return h * (1 - h)
