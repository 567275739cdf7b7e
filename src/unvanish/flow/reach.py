"""How fast a gradient fades through time: rate, half-life and reach of a curve of norms over the lag."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Decay(NamedTuple):
    """Rate, half-life and reach of ‖∂E_k/∂s_{k−ℓ}‖ over the lag ℓ. None changes if the error is multiplied by a
    constant."""

    rate: float
    """nats per step: least-squares slope of the log norm over ℓ; < 0 vanishes, > 0 explodes; −inf where it is exactly
    0 at once"""
    half_life: float | None
    """steps: ln 2 / −rate; None where the norm does not fade"""
    reach: int
    """steps: the largest lag at which the norm is above `fraction` of its value at lag 0"""


def decay(log_norm: Tensor, fraction: float = 0.01) -> Decay:
    """Rate, half-life and reach of `log_norm` `[T]` = ln‖∂E_k/∂s_{k−ℓ}‖, ℓ = 0 … T−1.

    Lags at which the gradient is exactly zero (−inf: a unit is off, or there is no path) bound the reach and are left
    out of the slope.

    Raises:
        ValueError: log_norm is not a vector of at least one lag, its lag 0 is not finite, a value is NaN or +inf, or
            fraction is not in (0, 1).
    """
    if log_norm.dim() != 1 or len(log_norm) == 0:
        raise ValueError(f"log_norm: expected [T] with T ≥ 1, got {tuple(log_norm.shape)}")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction}")
    y = log_norm.double()
    if not bool(y[0].isfinite()) or bool((y.isnan() | (y == math.inf)).any()):
        raise ValueError(
            "log_norm: expected a finite value at lag 0 and none that is NaN or +inf; no error at the source?"
        )
    lag = torch.arange(len(y), dtype=torch.float64, device="cpu")
    above = (y - y[0] > math.log(fraction)).nonzero().flatten()
    present = y.isfinite()
    rate = _slope(lag[present], y[present])
    if rate is None:
        rate = -math.inf if len(y) > 1 else 0.0
    half_life = math.log(2) / -rate if rate < 0 else None
    return Decay(rate, half_life, int(above[-1]))


def _slope(x: Tensor, y: Tensor) -> float | None:
    if len(x) < 2:
        return None
    x = x - x.mean()
    return float((x @ (y - y.mean())) / (x @ x))
