"""Modules of torch and ours with the same weights, and what they are called with."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unvanish as uv

LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_module = pytest.mark.parametrize("kind", LAYERS + CELLS)


def pair(kind: str, *sizes: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torch's module and ours, with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(*sizes, **options)
    ours = getattr(uv.nn, kind)(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def given(kind: str, dtype: torch.dtype = torch.float32, T: int = 5) -> Tensor:
    shape = (2, 3) if kind in CELLS else (T, 2, 3)
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


class Reads(nn.Module):
    """A module and what reads its output."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x)[0])
