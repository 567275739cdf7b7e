"""What the tests of test_audit*.py share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class _Scale(torch.autograd.Function):
    """The identity, with a wrong backward."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.05


def wrong(v: Tensor) -> Tensor:
    return _Scale.apply(v)  # type: ignore[return-value]


class Last(nn.Module):
    """A layer that reads, and a readout of its last output."""

    def __init__(self, layer: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.rnn, self.head = layer, nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.rnn(x)
        y = out if isinstance(out, Tensor) else out[0]
        return self.head(y[:, -1])


X, Y = torch.randn(4, 12, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 1)
mse = nn.functional.mse_loss


def lstm(kind: type[nn.LSTM] = nn.LSTM, **options: Any) -> nn.LSTM:
    return kind(5, 8, batch_first=True, **options)


def flat(out: Any) -> Tensor:
    """A loss that depends on every output."""
    y, state = out
    parts = [y.data if isinstance(y, PackedSequence) else y, *(state if isinstance(state, tuple) else (state,))]
    return sum((v.square().sum() for v in parts), torch.zeros((), dtype=parts[0].dtype))


class Loop(nn.Module):
    def __init__(self, cell: nn.Module, change: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.cell, self.change, self.head = cell, change, nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            state = tuple(map(self.change, state)) if isinstance(state, tuple) else self.change(state)
        return self.head(state[0] if isinstance(state, tuple) else state)
