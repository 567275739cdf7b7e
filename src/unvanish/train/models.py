"""The models that a task is answered with: a recurrent layer and a linear read-out of its last state."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from unvanish import cures
from unvanish import nn as layers
from unvanish.train.tasks import Task


class SequenceModel(nn.Module):
    """answer_t = W h_t + b, from the last states of `recurrent`: one, or as many as the task asks for."""

    def __init__(self, recurrent: nn.RNNBase, outputs: int, answers: int = 1) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.answers = answers
        self.head = nn.Linear(recurrent.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, I]` → `[B, O]`, or `[B, answers, O]`"""
        states, _ = self.recurrent(x)
        return self.head(states[:, -1] if self.answers == 1 else states[:, -self.answers :])


@dataclass(frozen=True)
class Recipe:
    """A cell, and what is done to it before training."""

    title: str
    layer: Callable[..., nn.RNNBase]
    prepare: Callable[[nn.RNNBase, int], object] | None = None
    """in place, given the layer and the sequence length"""
    nonlinearity: str | None = None

    def build(self, task: Task, hidden: int) -> SequenceModel:
        """The model for a task; weights come from torch's global generator."""
        options = {} if self.nonlinearity is None else {"nonlinearity": self.nonlinearity}
        layer = self.layer(task.inputs, hidden, batch_first=True, **options)
        if self.prepare is not None:
            self.prepare(layer, task.length)
        return SequenceModel(layer, task.outputs, task.answers)


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

REMEDIES: dict[str, tuple[str, ...]] = {
    "rnn": ("gru-chrono", "rnn-orthogonal", "irnn"),
    "gru": ("gru-chrono",),
    "lstm": ("lstm-chrono", "lstm-forget1"),
}
"""Plain recipe → the recipes that cure it, the one to prefer first."""


def recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"cells: expected names out of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]
