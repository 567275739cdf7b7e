"""One recurrent step: its weights and the interface every cell implements.

Shapes carry any leading dimensions `...`: `[B]` for one step, `[T, B]` for a whole sequence whose states are known, so
the same equation serves the loop and the vectorised measurement. Row vectors are per sample.

Symbols: `I` input size, `H` hidden size, `G` gates, `R` size of h (`P` with a projection, else `H`).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

State = tuple[Tensor, ...]
"""(h,) or, for the LSTM, (h, c)."""


class Weights(NamedTuple):
    """The weights of one layer and direction, in torch's layout; gates are stacked along the first axis."""

    w_ih: Tensor
    """[G·H, I]"""
    w_hh: Tensor
    """[G·H, R]"""
    b_ih: Tensor | None = None
    """[G·H]"""
    b_hh: Tensor | None = None
    """[G·H]"""
    w_hr: Tensor | None = None
    """[P, H]: the LSTM's projection of h"""

    def detach(self) -> "Weights":
        """The same numbers, outside any graph."""
        return Weights(*(None if v is None else v.detach() for v in self))  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> "Weights":
        """In another dtype, as parts of the same graph."""
        return Weights(*(None if v is None else v.to(dtype) for v in self))  # type: ignore[arg-type]


class Adjoint(NamedTuple):
    """What one step of backpropagation through time yields."""

    state: State
    """(δh_t,) or (δh_t, δc_t): total derivatives of the error with respect to the state at t"""
    da: Tensor
    """[..., G·H] δa_t, with respect to the gate pre-activations; also the derivative of W_ih x_t + b_ih"""
    da_hh: Tensor
    """[..., G·H] derivative of W_hh h_{t-1} + b_hh; differs from δa_t for the GRU, whose reset gate stands between"""
    previous: State
    """what the error of step t and later contributes to (δh_{t-1},) or (δh_{t-1}, δc_{t-1})"""


class Cell(ABC):
    """The mathematics of one step: equations, adjoint and Jacobian, each written once.

    `Saved` is the cell's own NamedTuple of what the adjoint needs, all `[..., H]` (`h_prev` is `[..., R]`).
    """

    name: ClassVar[str]
    gates: ClassVar[tuple[str, ...]]
    states: ClassVar[tuple[str, ...]]

    @staticmethod
    def project(x: Tensor, w: Weights) -> Tensor:
        """p = W_ih x + b_ih, `[..., G·H]`: the input's share of the pre-activations, for every step at once."""
        return linear(x, w.w_ih, w.b_ih)

    @abstractmethod
    def step(self, p: Tensor, state: State, w: Weights) -> tuple[State, Any]:
        """(state_t, saved_t) from the input's share p_t and state_{t-1}."""

    @abstractmethod
    def adjoint(self, d: State, saved: Any, w: Weights) -> Adjoint:
        """One step back. d = (δh_t,) or (δh_t, the part of δc_t that does not pass through h_t)."""

    @abstractmethod
    def jacobian(self, saved: Any, w: Weights) -> Tensor:
        """∂s_t/∂s_{t-1}, `[..., S, S]`, of the full state s = h or (h, c)."""

    @abstractmethod
    def activations(self, saved: Any) -> Tensor:
        """`[..., G, H]`: the gates' values, in torch's order."""

    @abstractmethod
    def sensitivity(self, saved: Any) -> Tensor:
        """`[..., G, H]`: φ'(a) / max φ', in [0, 1], of each gate; near 0 where the gate is saturated."""


def diag_matmul(v: Tensor, m: Tensor) -> Tensor:
    """diag(v) M for v `[..., n]`, M `[n, k]` or `[..., n, k]`."""
    return v.unsqueeze(-1) * m


def matmul_diag(m: Tensor, v: Tensor) -> Tensor:
    """M diag(v) for M `[n, k]` or `[..., n, k]`, v `[..., k]`."""
    return m * v.unsqueeze(-2)


def block_matrix(rows: list[list[Tensor]]) -> Tensor:
    """A matrix from its blocks, `[..., n_i, k_j]`."""
    return torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)
