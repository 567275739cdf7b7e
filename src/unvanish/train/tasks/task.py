"""The definition of a task: samples that can be redrawn from (seed, index), a metric, and the chance level."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset

Split = Literal["train", "validation", "test"]
IGNORED = -100
"""a class that is not judged: where nothing is asked, or shorter answers are padded"""
SPLITS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
Samples = tuple[Tensor, Tensor]
"""(x [B, T, I], y): y is [B, O] for a regression, [B] classes, or [B, answers] classes where several steps are
answered"""


class Task(ABC):
    """A supervised task on sequences, answered at the last step or the last few.

    Every sample is a function of (seed, split, index) alone, so any one can be regenerated.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    describe: ClassVar[str]
    source: ClassVar[str]
    """the paper"""
    kind: ClassVar[Literal["regression", "classification", "prediction"]]
    """how an answer is judged: squared error, share of wrong classes, or cross-entropy over all answered steps"""
    default_length: ClassVar[int]
    note: ClassVar[str] = ""
    """a caution on what a short first reach means for this task, with the experiment that shows it"""

    shuffle: bool = True
    carry: bool = False

    length: int
    seed: int
    inputs: int
    """I, features per step"""
    outputs: int
    """targets, or classes"""
    answers: int = 1
    """steps that are answered, the last ones"""
    chance: float
    """error of the best answer that ignores the input"""
    solved_below: float
    """error below which the task counts as solved"""

    def __init__(self, length: int | None = None, seed: int = 0) -> None:
        self.length = whole(length, "length", self.default_length, 1)
        self.seed = whole(seed, "seed", 0, 0)

    @property
    def metric(self) -> str:
        """Name of the error that is reported."""
        names = {
            "regression": "mean squared error",
            "classification": "error rate",
            "prediction": "cross-entropy (nats)",
        }
        return names[self.kind]

    @abstractmethod
    def size(self, split: Split) -> int:
        """Samples in a split."""

    @abstractmethod
    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        """The samples with these indices."""

    def dataset(self, split: Split) -> Dataset[Samples]:
        """The split for a DataLoader that requests whole batches (`batch_size=None` and a batch sampler, or
        `__getitems__`)."""
        return _Samples(self, split)

    def loss(self, answer: Tensor, y: Tensor) -> Tensor:
        """What training minimises; `answer` is `[B, O]`, or `[B, answers, O]` where several steps are answered."""
        if self.kind == "regression":
            return mse_loss(answer, y)
        return cross_entropy(answer.flatten(0, -2), y.flatten())

    def error(self, answer: Tensor, y: Tensor) -> Tensor:
        """The metric, mean over the batch."""
        if self.kind == "classification":
            return (answer.argmax(-1) != y).double().mean()
        return self.loss(answer, y)

    def generator(self, split: Split, index: int) -> np.random.Generator:
        """The random numbers of one sample."""
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, SPLITS[split], index]))


class Generated(Task):
    """A task whose samples are drawn: training never sees one twice."""

    shuffle = False
    least_length: ClassVar[int] = 2

    def __init__(self, length: int | None = None, seed: int = 0) -> None:
        super().__init__(whole(length, "length", self.default_length, self.least_length), seed)

    def size(self, split: Split) -> int:
        return 2**40 if split == "train" else 1000


class _Samples(Dataset[Samples]):
    def __init__(self, task: Task, split: Split) -> None:
        self.task = task
        self.split: Split = split

    def __len__(self) -> int:
        return self.task.size(self.split)

    def __getitem__(self, index: int) -> Samples:
        x, y = self.task.samples(self.split, [index])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> list[Samples]:
        x, y = self.task.samples(self.split, indices)
        return list(zip(x, y, strict=True))


def whole(value: int | None, name: str, default: int, least: int) -> int:
    """A whole number with a default and a least value.

    Raises:
        ValueError: below `least`.
    """
    if value is None:
        return default
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def as_float(x: object) -> Tensor:
    """A float32 tensor of an array."""
    return torch.as_tensor(x, dtype=torch.float32)
