"""The T subgradients of ∂E/∂W = Σ_t g_t, g_t = δa_tᵀ [h_{t-1}, x_t], W = [W_hh, W_ih]: their norms, and their partial
sums'."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.flow.exponents import times_power_of_two
from unvanish.flow.stack import flow_at, run_stack

CHUNK_ELEMENTS = 2**22
"""Float64 copies are made of so many elements at a time."""


def dweight(da: Tensor, da_hh: Tensor, x: Tensor, h_prev: Tensor) -> Tensor:
    """‖g_t‖_F, `[T]` float64, from δa and δa_hh `[T, B, G·H]`, x `[T, B, I]`, h_{t-1} `[T, B, R]`.

    By the Gram identity ‖Σ_b u_bᵀ v_b‖_F² = Σ_{b,b'} (u_b · u_b')(v_b · v_b'), without forming g_t. δ is scaled to
    about 1 by a power of two first, so that its squares neither underflow nor overflow.
    """
    T, B, width = da.shape
    step = max(1, CHUNK_ELEMENTS // (B * max(width, B)))
    pieces = []
    for t in range(0, T, step):
        part = slice(t, t + step)
        pairs = ((da[part].double(), x[part].double()), (da_hh[part].double(), h_prev[part].double()))
        exponent = torch.frexp(torch.stack([u.abs().amax((1, 2)) for u, _ in pairs]).amax(0)).exponent
        total = da.new_zeros(len(exponent), dtype=torch.float64)
        for u, v in pairs:
            u = times_power_of_two(u, -exponent[:, None, None])
            total += ((u @ u.mT) * (v @ v.mT)).sum((1, 2))
        pieces.append(times_power_of_two(total.clamp_min(0).sqrt(), exponent))
    return torch.cat(pieces)


def partial(da: Tensor, da_hh: Tensor, x: Tensor, h_prev: Tensor) -> Tensor:
    """‖Σ_{s≥t} g_s‖_F, `[T]` float64: the partial sums of ∂E/∂W from the last step backwards. Forms one g_t at a
    time."""
    T = len(da)
    norms = da.new_zeros(T, dtype=torch.float64)
    sums = [d.new_zeros(d.shape[-1], v.shape[-1], dtype=torch.float64) for d, v in ((da, x), (da_hh, h_prev))]
    for t in reversed(range(T)):
        for total, d, v in zip(sums, (da, da_hh), (x, h_prev), strict=True):
            total.addmm_(d[t].double().mT, v[t].double())
        norms[t] = torch.hypot(*(torch.linalg.vector_norm(total) for total in sums))
    return norms


@dataclass(frozen=True)
class SourceGradients:
    """How much each error source contributes to ∂E/∂W, W = [W_hh, W_ih], of one layer and direction."""

    norms: Tensor
    """[K] float64 ‖∂E_k/∂W‖_F"""
    partial_sums: Tensor
    """[K] float64 ‖S_n‖_F, S_n = Σ_{k ≤ n} ∂E_k/∂W: it vanishes only if every source's share does"""
    longest_path: Tensor
    """[K] float64 ‖the term of the first step alone‖_F, the one the textbook derivation keeps"""
    sources: tuple[int, ...]


@torch.no_grad()
def source_gradients(
    layer: nn.RNNBase,
    x: Tensor | PackedSequence,
    error: Tensor,
    hx: Any = None,
    *,
    at: str | None = None,
) -> SourceGradients:
    """∂E_k/∂W = Σ_{t ≤ k} δa_{k,t}ᵀ [h_{t−1}, x_t] for every step k at which there is an error.

    Args:
        layer, x, hx, at: as in `adjoint_map`.
        error: `[T, B, D·R]` ∂E_k/∂h_k, samples in the user's order. Steps where it is zero are no sources.

    Raises:
        TypeError, ValueError: an argument does not fit, or there is no error.

    Cost: one pass of the adjoint per source.
    """
    stack = run_stack(layer, x, hx)
    place = stack.index(at)
    sources = error.flatten(1).any(1).nonzero().flatten().tolist()
    if not sources:
        raise ValueError("error: expected a non-zero error at one step at least, got zeros")
    norms, sums, longest = [], [], []
    total: list[Tensor] | None = None
    for k in sources:
        alone = torch.zeros_like(error)
        alone[k] = error[k]
        tr, flow = flow_at(stack, layer, place, alone)
        grads = engine.weight_gradients(tr, flow)
        pair = [grads.w_hh.double(), grads.w_ih.double()]
        total = pair if total is None else [a + b for a, b in zip(total, pair, strict=True)]
        norms.append(_joint_norm(pair))
        sums.append(_joint_norm(total))
        first = -1 if tr.reverse else 0
        outer = [
            flow.da_hh[first].double().mT @ tr.saved.h_prev[first].double(),
            flow.da[first].double().mT @ tr.x[first].double(),
        ]
        longest.append(_joint_norm(outer))
    found = [torch.stack(v).cpu() for v in (norms, sums, longest)]
    return SourceGradients(found[0], found[1], found[2], tuple(sources))


def _joint_norm(parts: list[Tensor]) -> Tensor:
    return torch.hypot(*(torch.linalg.matrix_norm(v) for v in parts))
