"""The T subgradients of ∂E/∂W = Σ_t g_t, g_t = δa_tᵀ [h_{t-1}, x_t], W = [W_hh, W_ih]: their norms, and their partial
sums'."""

import torch
from torch import Tensor

from unvanish.flow.exponents import times_power_of_two

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
