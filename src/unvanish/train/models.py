"""The models: a recurrent network and a linear read-out of its states."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unvanish import cures
from unvanish import nn as layers
from unvanish.cells import CELLS, ZOO
from unvanish.nn.modules import SequenceModule
from unvanish.train.tasks import Task

Read = Literal["last", "mean", "all"]
READS: tuple[Read, ...] = ("last", "mean", "all")


class SequenceModel(nn.Module):
    """answer = W r + b, r from the states h_t of `recurrent`: the last `answers` of them, their mean, or every one.

    Args:
        recurrent: RNN, LSTM, GRU or `unvanish.nn.Recurrent`, batch_first.
        outputs: O.
        answers: how many of the last states are read, for "last".
        read: "last" (each sample's own last state; of a bidirectional network each direction's own), "mean" or "all".
        embedding: of symbols, where x holds their numbers.
        dropout: on the recurrent network's input, if embedded, and on the states that are read.
        tbptt: truncated backpropagation: no gradient passes from step n·tbptt to the step before; None: no truncation.
    """

    def __init__(
        self,
        recurrent: SequenceModule,
        outputs: int,
        answers: int = 1,
        *,
        read: Read = "last",
        embedding: nn.Embedding | None = None,
        dropout: float = 0.0,
        tbptt: int | None = None,
    ) -> None:
        super().__init__()
        if tbptt is not None and (tbptt < 1 or recurrent.bidirectional):
            raise ValueError(
                f"tbptt: expected at least 1 and a network that runs forward only, got {tbptt} and "
                f"bidirectional={recurrent.bidirectional}"
            )
        self.embedding = embedding
        self.recurrent = recurrent
        self.answers, self.read, self.tbptt = answers, read, tbptt
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(recurrent.hidden_size * (2 if recurrent.bidirectional else 1), outputs)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`[B, T, I]`, or symbols `[B, T]` → `[B, O]`, `[B, answers, O]`, or `[B, T, O]` where all are read."""
        return self.step(x, lengths)[0]

    def step(self, x: Tensor, lengths: Tensor | None = None, hx: Any = None) -> tuple[Tensor, Any]:
        """(answer, final state), from the state `hx`."""
        if self.embedding is not None:
            x = self.dropout(self.embedding(x))
        states, final = self._run(x, lengths, hx)
        return self.head(self.dropout(self._read(states, final, lengths))), final

    def _run(self, x: Tensor, lengths: Tensor | None, hx: Any) -> tuple[Tensor, Any]:
        if self.tbptt is None:
            # torch's own layers take no lengths, so none are passed where there are none.
            return self.recurrent(x, hx) if lengths is None else self.recurrent(x, hx, lengths=lengths)
        pieces = []
        # Where only the last steps are read, no gradient reaches the pieces before them, which then need no memory.
        read_from = x.shape[1] - self.answers if self.read == "last" and lengths is None else 0
        for start in range(0, x.shape[1], self.tbptt):
            piece = x[:, start : start + self.tbptt]
            hx = tuple(s.detach() for s in hx) if isinstance(hx, tuple) else None if hx is None else hx.detach()
            with torch.set_grad_enabled(torch.is_grad_enabled() and start + self.tbptt > read_from):
                if lengths is None:
                    states, hx = self.recurrent(piece, hx)
                else:
                    states, hx = self.recurrent(piece, hx, lengths=(lengths - start).clamp(0, piece.shape[1]))
            pieces.append(states)
        return torch.cat(pieces, 1), hx

    def _read(self, states: Tensor, final: Any, lengths: Tensor | None) -> Tensor:
        if self.read == "all":
            return states
        if self.read == "mean":
            if lengths is None:
                return states.mean(1)
            return states.sum(1) / lengths.to(states.device, states.dtype).unsqueeze(1)
        if self.recurrent.bidirectional:
            h = final[0] if isinstance(final, tuple) else final
            return torch.cat([h[-2], h[-1]], dim=-1)
        if lengths is not None:
            return states[torch.arange(len(states), device=states.device), lengths.to(states.device) - 1]
        return states[:, -1] if self.answers == 1 else states[:, -self.answers :]


@dataclass(frozen=True)
class Recipe:
    """A cell, and its preparation before training."""

    title: str
    layer: Callable[..., SequenceModule]
    prepare: Callable[[SequenceModule, int], object] | None = None
    """in place, given the layer and the sequence length"""
    nonlinearity: str | None = None

    def recurrent(self, inputs: int, hidden: int, length: int, **options: Any) -> SequenceModule:
        """The prepared layer, batch_first; weights come from torch's global generator."""
        if self.nonlinearity is not None:
            options["nonlinearity"] = self.nonlinearity
        layer = self.layer(inputs, hidden, batch_first=True, **options)
        if self.prepare is not None:
            self.prepare(layer, max(length, 2))  # no lag is shorter than that
        return layer

    def build(self, task: Task, hidden: int) -> SequenceModel:
        """The model for a task."""
        return SequenceModel(self.recurrent(task.inputs, hidden, task.length), task.outputs, task.answers)


RECIPES: dict[str, Recipe] = {
    "rnn": Recipe("tanh-RNN", layers.RNN),
    "irnn": Recipe("IRNN", layers.RNN, lambda layer, length: cures.identity_(layer), "relu"),
    "rnn-orthogonal": Recipe("orthogonal tanh-RNN", layers.RNN, lambda layer, length: cures.orthogonal_(layer)),
    "gru": Recipe("GRU", layers.GRU),
    "gru-chrono": Recipe("chrono GRU", layers.GRU, lambda layer, length: cures.chrono_(layer, max_lag=length)),
    "lstm": Recipe("LSTM", layers.LSTM),
    "lstm-forget1": Recipe("forget-bias-1 LSTM", layers.LSTM, lambda layer, length: cures.forget_bias_(layer, 1.0)),
    "lstm-chrono": Recipe("chrono LSTM", layers.LSTM, lambda layer, length: cures.chrono_(layer, max_lag=length)),
}
"""Every model that `compare` and `train_on` can build, by name: a cell, and how it is initialised."""


def _of_the_zoo() -> dict[str, Recipe]:
    """The cells of `unvanish.cells.ZOO` that torch has not, as they are; and with chrono biases where one gate
    carries."""
    found = {}
    for name, kind in ZOO.items():
        if name in CELLS:
            continue
        title = kind.__name__
        layer = partial(layers.Recurrent, kind())
        found[name] = Recipe(title, layer)
        if kind().carry_gate is not None:
            found[f"{name}-chrono"] = Recipe(f"chrono {title}", layer, RECIPES["lstm-chrono"].prepare)
    return found


RECIPES |= _of_the_zoo()

REMEDIES: dict[str, tuple[str, ...]] = {
    "rnn": ("gru-chrono", "rnn-orthogonal", "irnn"),
    "gru": ("gru-chrono",),
    "lstm": ("lstm-chrono", "lstm-forget1"),
} | {name: (f"{name}-chrono",) for name in ZOO if name not in CELLS and f"{name}-chrono" in RECIPES}
"""Plain recipe → the recipes that cure it, the one to prefer first."""


def recipe(name: str, argument: str = "cell") -> Recipe:
    """The recipe called `name`, the value of the caller's `argument`.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"{argument}: expected one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


@dataclass(frozen=True)
class Shape:
    """Everything about a model except its weights, saved together with them."""

    cell: str
    """a name out of `RECIPES`"""
    inputs: int
    """I; of an embedding of symbols, its width"""
    outputs: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    """dropout between layers, on embedded symbols, and on the states that are read"""
    read: Read = "last"
    answers: int = 1
    symbols: int | None = None
    """the number of symbols, where x contains symbols"""
    tbptt: int | None = None
    checkpoint_every: int | None = None
    """the backward pass keeps one state in this many; None: all"""
    clip_recurrence: float | None = None

    def build(self, length: int) -> SequenceModel:
        """The model for sequences of up to `length` steps; weights come from torch's global generator."""
        layer = recipe(self.cell).recurrent(
            self.inputs,
            self.hidden,
            length,
            num_layers=self.layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout if self.layers > 1 else 0.0,
        )
        if self.clip_recurrence is not None:
            cures.clip_recurrence_(layer, self.clip_recurrence)
        if self.checkpoint_every is not None:
            layer.checkpoint_every = self.checkpoint_every  # type: ignore[assignment]
        return SequenceModel(
            layer,
            self.outputs,
            self.answers,
            read=self.read,
            embedding=None if self.symbols is None else nn.Embedding(self.symbols, self.inputs),
            dropout=self.dropout,
            tbptt=self.tbptt,
        )
