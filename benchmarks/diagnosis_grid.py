"""The grid of `diagnosis.py`: kinds of task, recurrent layers, and the runs that combine them."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import unvanish as uv
from unvanish import cures

RATES = (3e-4, 3e-3, 3e-2)

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of task: samples, read-out, loss."""

    inputs: int
    outputs: int
    lags: tuple[int, int]
    read: str
    """ "last", "each" step, or "mean" and "max" over steps"""
    loss: Loss
    make: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    """(samples, lag, generator) → (x, y)"""


def _recall(n: int, lag: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = 0.3 * torch.randn(n, lag + 1, 4, generator=g), torch.randint(4, (n,), generator=g)
    x[torch.arange(n), 0, y] += 2
    return x, y


def _adding(n: int, lag: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    T = lag + 1
    value, mark = torch.rand(n, T, generator=g), torch.zeros(n, T)
    first, second = torch.randint(T // 2, (n,), generator=g), torch.randint(T // 2, T, (n,), generator=g)
    mark[torch.arange(n), first] = mark[torch.arange(n), second] = 1
    return torch.stack([value, mark], -1), (value * mark).sum(1, keepdim=True)


def _order(n: int, lag: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    first, second = torch.randint(2, (2, n), generator=g)
    x = torch.zeros(n, lag + 1, 4)
    x[torch.arange(n), 0, first] = x[torch.arange(n), lag // 2, second] = 1
    x[..., 2:] = 0.3 * torch.randn(n, lag + 1, 2, generator=g)
    return x, 2 * first + second


def _echo(n: int, lag: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each step's answer is the input of lag/10 steps before."""
    back = max(lag // 10, 1)
    x = torch.randn(n, lag + 1, 1, generator=g)
    return x, torch.cat([torch.zeros(n, back, 1), x[:, :-back]], 1)


def _tokens(n: int, lag: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The next token of sequences that repeat a random motif of lag/10 tokens."""
    period = max(lag // 10, 2)
    motif = torch.randint(6, (n, period), generator=g)
    ids = motif.repeat(1, lag // period + 2)[:, : lag + 1]
    return torch.nn.functional.one_hot(ids[:, :-1], 6).float(), ids[:, 1:]


def _copy(n: int, lag: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two symbols, blanks, then both again; only the last two steps count."""
    words = torch.randint(4, (n, 2), generator=g)
    ids = torch.full((n, lag + 2), 4)
    ids[:, :2], ids[:, -2] = words, 5
    y = torch.full((n, lag + 2), -100)
    y[:, -2:] = words
    return torch.nn.functional.one_hot(ids, 6).float(), y


def _keyword(n: int, lag: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = 0.3 * torch.randn(n, lag + 1, 4, generator=g), torch.randint(4, (n,), generator=g)
    x[torch.arange(n), torch.randint(lag + 1, (n,), generator=g), y] += 3
    return x, y


def _tone(n: int, lag: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """How fast a noisy sine oscillates, from the mean over all states."""
    rate, phase = torch.rand(n, 1, generator=g), 2 * math.pi * torch.rand(n, 1, generator=g)
    wave = (phase + (0.1 + 0.9 * rate) * torch.arange(lag + 1)).sin()
    return (wave + 0.3 * torch.randn(n, lag + 1, generator=g))[..., None], rate


def _coin(n: int, lag: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hopeless: the answer has nothing to do with the input."""
    return torch.randn(n, lag + 1, 2, generator=g), torch.randint(2, (n,), generator=g)


def _each(answers: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(answers.flatten(0, 1), y.flatten())


KINDS = {
    "recall": Kind(4, 4, (20, 60), "last", cross_entropy, _recall),
    "adding": Kind(2, 1, (20, 50), "last", mse_loss, _adding),
    "order": Kind(4, 4, (20, 60), "last", cross_entropy, _order),
    "echo": Kind(1, 1, (20, 80), "each", mse_loss, _echo),
    "tokens": Kind(6, 6, (30, 80), "each", _each, _tokens),
    "copy": Kind(6, 4, (10, 40), "each", _each, _copy),
    "keyword": Kind(4, 4, (20, 100), "max", cross_entropy, _keyword),
    "tone": Kind(1, 1, (20, 60), "mean", mse_loss, _tone),
    "coin": Kind(2, 2, (20, 60), "last", cross_entropy, _coin),
}

Build = Callable[[int, int, int, int], nn.Module]
"""(inputs, width, depth, lag) → a recurrent module"""


def _torch(
    layer: Callable[..., nn.RNNBase], prepare: Callable[[nn.Module, int], object] | None = None, **options: Any
) -> Build:
    def build(inputs: int, width: int, depth: int, lag: int) -> nn.Module:
        module = layer(inputs, width, num_layers=depth, batch_first=True, **options)
        if prepare is not None:
            prepare(module, lag)
        return module

    return build


def _zoo(name: str) -> Build:
    def build(inputs: int, width: int, depth: int, lag: int) -> nn.Module:
        return uv.nn.Recurrent(uv.cells.ZOO[name](), inputs, width, num_layers=depth, batch_first=True)

    return build


CELLS: dict[str, Build] = {
    "rnn": _torch(nn.RNN),
    "rnn-orthogonal": _torch(nn.RNN, lambda m, lag: cures.orthogonal_(m)),
    "janet": _zoo("janet"),
    "mgu": _zoo("mgu"),
    "irnn": _torch(nn.RNN, lambda m, lag: cures.identity_(m), nonlinearity="relu"),
    "gru": _torch(nn.GRU),
    "minlstm": _zoo("minlstm"),
    "indrnn": _zoo("indrnn"),
    "gru-chrono": _torch(nn.GRU, lambda m, lag: cures.chrono_(m, lag + 1)),
    "lstm": _torch(nn.LSTM),
    "ligru": _zoo("ligru"),
    "lem": _zoo("lem"),
    "lstm-forget1": _torch(nn.LSTM, lambda m, lag: cures.forget_bias_(m, 1.0)),
    "lstm-chrono": _torch(nn.LSTM, lambda m, lag: cures.chrono_(m, lag + 1)),
    "peephole": _zoo("peephole"),
    "ur_lstm": _zoo("ur_lstm"),
}


class Reader(nn.Module):
    """A recurrent module and a linear head on its last state, each state, or their mean or maximum."""

    def __init__(self, rnn: nn.Module, width: int, outputs: int, read: str) -> None:
        super().__init__()
        self.rnn, self.head, self.read = rnn, nn.Linear(width, outputs), read

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        read = {"last": lambda: y[:, -1], "each": lambda: y, "mean": lambda: y.mean(1), "max": lambda: y.amax(1)}
        return self.head(read[self.read]())


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    kind: str
    cell: str
    lag: int
    lr: float
    width: int
    depth: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.lag}-{self.cell}-{self.depth}x{self.width}-{self.lr:g}"

    def build(self) -> Reader:
        torch.manual_seed(self.seed)
        kind = KINDS[self.kind]
        rnn = CELLS[self.cell](kind.inputs, self.width, self.depth, self.lag)
        return Reader(rnn, self.width, kind.outputs, kind.read)

    def samples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Every run of a task and lag sees the same."""
        return KINDS[self.kind].make(count, self.lag, torch.Generator().manual_seed(seed))


def grid() -> Iterator[Run]:
    points = list(itertools.product(KINDS, (0, 1), RATES))
    halves = [(point, number + number // 6) for number, point in enumerate(points)]
    runs = [(*point, cell) for point, half in halves for cell in list(CELLS)[half % 2 :: 2]]
    for number, (kind, which, lr, cell) in enumerate(runs):
        width, depth = ((16, 1), (32, 1), (16, 2), (32, 2))[(number + number // 8) % 4]
        yield Run(kind, cell, KINDS[kind].lags[which], lr, width, depth, 3000 + number)
