"""Which axis of a batch is time: along it neighbours depend on each other, along the samples they do not."""

from collections.abc import Iterable

import torch
from torch import Tensor

LAGS = (1, 2, 3, 4)
CERTAIN, APART = 6.0, 2.0
"""standard errors from which a correlation with neighbours is no accident; how many times that of the other axis"""


def axis_of_time(main: Tensor, others: Iterable[Tensor]) -> int | None:
    """0 or 1, from correlations with neighbours along each axis; None where neither axis, or both, show any.

    z = √N min(|ρ_ℓ|, |mean(p)| / std(p)),    p: the N products of neighbours, summed over features

    the largest over lags ℓ = 1 … 4 of the input with itself, of a target of the same two axes with itself, and of the
    input with the target. The second term matters where few products make up the sum, as in a copy task, where all but
    a few steps are blank. The means over both axes are subtracted first: otherwise a value that all samples share at
    one step would look like dependence among samples. Ids are replaced by random codes.
    """
    series = [_series(t) for t in (main, *others) if t.dim() >= 2 and t.shape[:2] == main.shape[:2]]
    strength = [max((_dependence(a, b, axis) for a in series for b in series), default=0.0) for axis in (0, 1)]
    time = 0 if strength[0] > strength[1] else 1
    return time if strength[time] > CERTAIN and strength[time] > APART * strength[1 - time] else None


def _series(tensor: Tensor) -> Tensor:
    """[n, m, features] of zero mean over both axes."""
    x = tensor.detach().cpu().reshape(*tensor.shape[:2], -1)[..., :16].double()
    if not tensor.is_floating_point():
        x = (12.9898 * x + 1.0).sin() * 43758.5453
        x = x - x.floor()
    x = torch.nan_to_num(x)
    return x - x.mean(0, keepdim=True) - x.mean(1, keepdim=True) + x.mean((0, 1), keepdim=True)


def _dependence(a: Tensor, b: Tensor, axis: int) -> float:
    most, length = 0.0, a.shape[axis]
    for lag in LAGS:
        if length - lag < 2:
            break
        early, late = a.narrow(axis, 0, length - lag), b.narrow(axis, lag, length - lag)
        if early.shape[2] != late.shape[2]:
            early, late = early.mean(2, keepdim=True), late.mean(2, keepdim=True)
        size = (early.square().sum() * late.square().sum()).sqrt()
        if float(size) > 0:
            rho = float((early * late).sum() / size)
            # Subtracting the means alone gives neighbours a correlation of -1/length.
            products = (early * late).sum(2)
            root = products.numel() ** 0.5
            student = float(products.mean().abs() / products.std().clamp_min(1e-300)) * root
            most = max(most, min((abs(rho) - 1.5 / length) * root, student))
    return most
