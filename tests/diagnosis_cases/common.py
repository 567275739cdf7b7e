"""What the diagnosis' cases share: data, a recurrent model with exchangeable parts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

B, T, H, C = 40, 18, 16, 3


Case = tuple[nn.Module, tuple[Any, ...], Callable[..., Tensor]]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, of: int = C, seed: int = 1) -> Tensor:
    return torch.randint(of, shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A recurrent layer, a read-out and an end, each exchangeable."""

    def __init__(
        self,
        rnn: Any = None,
        out: int = C,
        read: Callable[[Tensor], Tensor] = lambda y: y[:, -1],
        end: Callable[[Tensor], Tensor] = lambda z: z,
        start: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.rnn = rnn or nn.GRU(4, H, batch_first=True)
        width = self.rnn.hidden_size * (2 if getattr(self.rnn, "bidirectional", False) else 1)
        self.head = nn.Linear(width, out)
        self.read, self.end, self.start = read, end, start

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(self.read(self.rnn(self.start(x))[0])))


class Module(nn.Module):
    """Named parts, and a function for forward."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


X = noise(B, T, 4)


Y = classes(B)


V = noise(B, 1, seed=2)


IDS = classes(B, T, of=30, seed=3)
