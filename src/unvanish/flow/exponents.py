"""Exact scaling by powers of two."""

import torch
from torch import Tensor


def times_power_of_two(v: Tensor, exponent: Tensor) -> Tensor:
    """v · 2^exponent, exact unless the result leaves v's range; `torch.ldexp` makes its powers in float32, which ends
    at 2^127.

    The power is applied in two halves, so that it may itself lie outside the range.
    """
    e = exponent.to(v.dtype).clamp(-2200, 2200)
    half = (e / 2).floor()
    return v * torch.exp2(half) * torch.exp2(e - half)
