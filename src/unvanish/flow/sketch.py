"""Gradients compared by a few random combinations of their rows, at a fraction of the cost of all their entries."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from unvanish import engine
from unvanish.engine.manual import recurrent_pairs
from unvanish.engine.native import PROBES


@lru_cache(32)
def probes(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """U `[rows, PROBES]` of ±1/4 at random, the same at every call.

    For any G `[rows, m]`, ‖Gᵀ U‖_F² is ‖G‖_F² on average over U, with a standard deviation of at most √(2 / PROBES) =
    0.35 of it (Alon, Matias, Szegedy 1996); where G ≠ 0, Gᵀ U = 0 has a probability of at most 2^−PROBES (Freivalds
    1977).
    """
    signs = torch.randint(0, 2, (rows, PROBES), generator=torch.Generator().manual_seed(rows), device="cpu") * 2 - 1
    return (signs / PROBES**0.5).to(device, dtype)


Sketches = tuple[Tensor, Tensor | None]
"""of ∂E/∂W_ih and ∂E/∂W_hh"""


def sketches_of(tr: engine.Trace, flow: engine.Deltas) -> Sketches:
    """The `sketch` of ∂E/∂W_ih and of ∂E/∂W_hh without these gradients: (Σ_t δ_tᵀ s_t)ᵀ U = Σ_t s_tᵀ (δ_t U)."""
    if flow.weights is not None:
        w_ih, w_hh = flow.weights[:2]
        return sketch(w_ih), None if w_hh is None else sketch(w_hh)

    def of(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        u = probes(sum(d.shape[-1] for d, _ in pairs), tr.x.dtype, tr.x.device).split([d.shape[-1] for d, _ in pairs])
        parts = [s.flatten(0, 1).mT @ (d.flatten(0, 1) @ v) for (d, s), v in zip(pairs, u, strict=True)]
        return sum(parts[1:], parts[0])

    w_ih = of([(flow.da, tr.x)])
    return w_ih, None if flow.da_hh is None else of(recurrent_pairs(tr, flow.da_hh))


def sketch(gradient: Tensor) -> Tensor:
    """Gᵀ U `[m, PROBES]` of a gradient G `[n, m]`, in at least single precision."""
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).flatten(1)
    return g.mT @ probes(len(g), g.dtype, g.device)
