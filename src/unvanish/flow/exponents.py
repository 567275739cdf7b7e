"""Numbers far outside the range of floating point: vectors near 1 times exact powers of two."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -(2.0**40)
"""The exponent of a zero row: below that of any other row."""


def times_power_of_two(v: Tensor, exponent: Tensor) -> Tensor:
    """v · 2^exponent, exact unless the result leaves v's range; `torch.ldexp` makes its powers in float32, which ends
    at 2^127.

    The power is applied in two halves, so that it may itself lie outside the range.
    """
    one, other = _halves(exponent, v)
    return v * one * other


def scale_by_power_of_two_(v: Tensor, exponent: Tensor) -> None:
    """`times_power_of_two` in place."""
    for power in _halves(exponent, v):
        v *= power


def _halves(exponent: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    e = exponent.to(v.dtype).clamp(-2200, 2200)
    half = (e / 2).floor()
    return torch.exp2(half), torch.exp2(e - half)


@dataclass
class Rows:
    """Vectors v · 2^exponent: v `[..., n]` near 1, exponent `[...]` float64 and whole."""

    v: Tensor
    exponent: Tensor

    @classmethod
    def of(cls, v: Tensor) -> "Rows":
        """The vectors v, normalised."""
        return cls(v, torch.zeros(v.shape[:-1], dtype=torch.float64, device=v.device)).normalised()

    def normalised(self) -> "Rows":
        """The same vectors with their largest component in [1/2, 1); a zero row gets the exponent of nothing."""
        shift, exponent = renormalisation((self.v,), self.exponent)
        return Rows(times_power_of_two(self.v, -shift), exponent)

    def __add__(self, other: "Rows") -> "Rows":
        top = torch.maximum(self.exponent, other.exponent)
        return Rows(self.scaled_to(top) + other.scaled_to(top), top)

    def scaled_to(self, exponent: Tensor) -> Tensor:
        """v rescaled to another exponent."""
        return times_power_of_two(self.v, (self.exponent - exponent).unsqueeze(-1))


def renormalisation(parts: tuple[Tensor, ...], exponent: Tensor) -> tuple[Tensor, Tensor]:
    """(shift `[..., 1]`, new exponent `[...]`): parts · 2^−shift has its largest component in [1/2, 1)."""
    # Not by the norm of order infinity, which takes ten times as long.
    largest = parts[0].abs().amax(-1)
    for v in parts[1:]:
        largest = torch.maximum(largest, v.abs().amax(-1))
    shift = torch.frexp(largest).exponent
    return shift.unsqueeze(-1), torch.where(largest > 0, exponent + shift, EMPTY)


def log_norms(v: Tensor, exponent: Tensor) -> Tensor:
    """ln‖v · 2^exponent‖₂ over the last axis, −inf for a zero row; squares are added up in float64, those of float64
    itself near 1."""
    if v.dtype == torch.float64:
        shift, exponent = renormalisation((v,), exponent)
        v = times_power_of_two(v, -shift)
    return torch.linalg.vector_norm(v, dim=-1, dtype=torch.float64).log() + exponent * math.log(2)
