"""Gradients compared by a few random combinations of their rows, at a fraction of the cost of all their entries."""

from functools import lru_cache

import torch
from torch import Tensor

from unvanish.engine.native import PROBES


@lru_cache(32)
def probes(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """U `[rows, PROBES]` of ±1/4 at random, the same whenever it is asked for.

    For any G `[rows, m]`, ‖Gᵀ U‖_F² is ‖G‖_F² on average over U, with a standard deviation of at most √(2 / PROBES) =
    0.35 of it (Alon, Matias, Szegedy 1996); where G ≠ 0, Gᵀ U = 0 has a probability of at most 2^−PROBES (Freivalds
    1977).
    """
    signs = torch.randint(0, 2, (rows, PROBES), generator=torch.Generator().manual_seed(rows), device="cpu") * 2 - 1
    return (signs / PROBES**0.5).to(device, dtype)


def sketch(gradient: Tensor) -> Tensor:
    """Gᵀ U `[m, PROBES]` of a gradient G `[n, m]`, in at least single precision."""
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).flatten(1)
    return g.mT @ probes(len(g), g.dtype, g.device)
