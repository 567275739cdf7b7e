"""Leaky integrate-and-fire neurons with a surrogate gradient (Neftci, Mostafa & Zenke 2019).

u_t = β u_{t-1} (1 − s_{t-1}) + W_x x_t + b + W s_{t-1}      s_t = [u_t > 1]

A spike resets the membrane. s_t has no useful derivative; the backward pass uses 1 / (1 + k |u_t − 1|)² instead (the
fast sigmoid of Zenke & Ganguli 2018). The membrane carries β: without a spike, β^ℓ of it remains after ℓ steps.
"""

from typing import Any

import torch
from torch import Tensor

from unvanish.cells.cell import Cell


class _Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, slope: float) -> Tensor:
        return (u > 0).to(u.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.slope = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grads[0] / (1 + ctx.slope * u.abs()) ** 2, None


class LIF(Cell):
    """beta: what the membrane keeps per step; slope: k, the steepness of the surrogate. Output are the spikes s."""

    gates, states, memory = ("i",), ("s", "u"), "u"

    def __init__(self, beta: float = 0.9, slope: float = 10.0) -> None:
        self.beta, self.slope = beta, slope

    def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, Tensor]:
        u = self.beta * s.u * (1 - s.s) + p.i + q.i
        return _Spike.apply(u - 1, self.slope), u
