"""Models, batches and subjects that tests of the diagnosis share; all tiny, learning in tens of updates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unvanish.diagnosis.interventions import Outcome, run
from unvanish.diagnosis.subject import Subject


def subject(
    model: nn.Module, *batch: Any, loss: Callable[..., Tensor] | None = None, step: Callable[..., Tensor] | None = None
) -> Subject:
    """What is diagnosed."""
    if step is not None:
        return Subject(model, step=step)
    return Subject(model, batch[:-1], batch[-1], loss)


class Last(nn.Module):
    """Reads the last step of a batch-first recurrent module."""

    def __init__(self, rnn: Any, out: int, dropout: float = 0.0, end: nn.Module | None = None) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size, out)
        self.drop, self.end = nn.Dropout(dropout), end or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(self.drop(self.rnn(x)[0][:, -1])))


def recall(samples: int, steps: int, seed: int = 1, classes: int = 3) -> tuple[Tensor, Tensor]:
    """A class shown at the first step, among noise, to be told after the last."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (samples,), generator=g)
    x = 0.2 * torch.randn(samples, steps, 4, generator=g)
    x[torch.arange(samples), 0, y] += 2
    return x, y


def drawn(steps: int) -> Callable[[nn.Module], Tensor]:
    """A step on a fresh batch of `recall` per call, drawn from torch's random numbers."""

    def step(model: nn.Module) -> Tensor:
        x, y = recall(32, steps, seed=int(torch.randint(10**6, ())))
        return cross_entropy(model(x), y)

    return step


class RandomTargets:
    """Targets that have nothing to do with the input."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, samples: int) -> tuple[Tensor, Tensor]:
        """(x, y) of coin flips ("classes") or normal numbers."""
        g = torch.Generator().manual_seed(9)
        x, _ = recall(samples, 5)
        return x, torch.randint(2, (samples,), generator=g) if self.kind == "classes" else torch.randn(
            samples, 1, generator=g
        )


def outcome(model: nn.Module, *batch: Any, loss: Callable[..., Tensor] = cross_entropy, **options: Any) -> Outcome:
    """Of the interventions alone."""
    return run(subject(model, *batch, loss=loss), budget=options.pop("budget", 60.0), **options)


def codes(found: Outcome) -> list[str]:
    """Of its findings, in order."""
    return [f.code for f in found.findings]


def gru(out: int = 3, **options: Any) -> Last:
    """Drawn from seed 0."""
    torch.manual_seed(0)
    return Last(nn.GRU(4, 16, batch_first=True), out, **options)
