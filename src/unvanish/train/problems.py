"""Problems with one answer per sequence, a class or a number: how the data is split, the model judged, and applied."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, Dataset

from unvanish.train.data.sequences import Scale, Sequences, split
from unvanish.train.data.table import DataError
from unvanish.train.data.vocabulary import Vocabulary
from unvanish.train.fit import answers
from unvanish.train.models import SequenceModel, Shape
from unvanish.train.settings import Settings
from unvanish.train.supervised import together
from unvanish.train.tasks.task import Split

Example = tuple[Tensor, Tensor]
"""(x `[T, I]` or symbols `[T]`, y)"""
Item = TypeVar("Item")
Judgement = dict[str, dict[str, float]]
""" "model" or the name of a baseline → metric → value on the test split"""


class DataProblem(ABC):
    """A `Problem` from the user's data, and everything needed to apply the model later."""

    kind: ClassVar[str]
    applied_to: ClassVar[type]
    """the data that `Trained.predict` takes; a task has none"""
    metric: str
    """the error that is reported during training"""
    shuffle: bool = True
    carry: bool = False
    length: int
    """steps of the longest training sequence"""
    steps: ClassVar[int | None] = None
    """updates where settings leave epochs and steps open; None: 50 passes"""
    patience: ClassVar[int | None] = 10
    """rounds, where settings leave it open"""
    columns: Mapping[str, str] = {}
    """how the file was read: the options of `read_data`, kept for data that the model is applied to"""

    @abstractmethod
    def begin(self, settings: Settings) -> Shape:
        """Lay the samples out for these settings; the model they need.

        Raises:
            ValueError: the settings don't fit the problem.
        """

    @abstractmethod
    def dataset(self, split: Split) -> Dataset: ...

    def size(self, split: Split) -> int:
        return len(self.dataset(split))  # type: ignore[arg-type]

    def examples(self, split: Split, most: int) -> list[Example]:
        """Up to `most` samples of a split, spread evenly over it."""
        dataset = self.dataset(split)
        return [dataset[i] for i in evenly(range(self.size(split)), most)]

    @abstractmethod
    def loss(self, answer: Tensor, y: Tensor) -> Tensor: ...

    @abstractmethod
    def error(self, answer: Tensor, y: Tensor) -> Tensor: ...

    @abstractmethod
    def judge(self, model: SequenceModel) -> Judgement:
        """The metrics of the model and of the baselines on the test split; empty where there is none."""

    @abstractmethod
    def tensors(self) -> Iterable[Tensor]:
        """The problem's data, to distinguish it from another."""

    @abstractmethod
    def keep(self) -> dict[str, Any]:
        """Plain data that `apply` needs, and information for the user."""


class Labelled(DataProblem):
    """Sequences, or texts, and one answer each."""

    applied_to = Sequences

    def __init__(self, data: Sequences, *, seed: int = 0, test: bool = True, by_class: bool) -> None:
        self.data, self.y = data, data.targets()
        self.parts = split(self.y if by_class else None, len(data), seed, test=test)
        drawn = "whole sequences, drawn by the seed" + (" within each class" if by_class else "")
        shares = "70 % train, 15 % validation, 15 % test" if test else "85 % train, 15 % validation"
        self.rule = f"{drawn}: {shares}"
        training = [data.x[i] for i in self.parts["train"]]
        self.input = input_of(training)
        self._x: list[Tensor] = [self.input(x) for x in data.x]  # type: ignore[arg-type]
        self.length = max(len(self._x[i]) for i in self.parts["train"])

    def begin(self, settings: Settings) -> Shape:
        if settings.read == "all":
            raise ValueError("read: expected last or mean where a sequence has one answer, got 'all'")
        symbols = len(self.input) if isinstance(self.input, Vocabulary) else None
        return Shape(
            **settings.shape(),
            inputs=settings.hidden if symbols else len(self.data.channels),
            outputs=self.outputs,
            read=settings.read or ("mean" if symbols else "last"),
            symbols=symbols,
        )

    def dataset(self, split: Split) -> Dataset:
        return Listed([(self._x[i], self._y[i]) for i in self.parts.get(split, [])])

    @cached_property
    def _y(self) -> list[Tensor]:
        return self.targets()

    def tensors(self) -> Iterable[Tensor]:
        return [*self._x, *self._y]

    def keep(self) -> dict[str, Any]:
        return {
            "channels": self.data.channels,
            "input": to_json(self.input),
            "split_rule": self.rule,
            "split": {name: len(self.parts[name]) for name in ("train", "validation", "test") if name in self.parts},
        }

    minimised: ClassVar[Callable[[Tensor, Tensor], Tensor]]
    """(answer, y) → what training minimises"""

    @classmethod
    def encoded(cls, config: dict[str, Any], data: Sequences, most: int) -> list[Example]:
        """The first `most` sequences with their answers, as in training.

        Raises:
            DataError: other channels or classes than in training, or no targets.
        """
        first = Sequences(data.x[:most], None if data.y is None else data.y[:most], data.names[:most], data.channels)
        return list(zip(inputs_of(config, first), cls.encode(config, first), strict=True))

    @staticmethod
    @abstractmethod
    def encode(config: dict[str, Any], data: Sequences) -> list[Tensor]:
        """y of sequences, as in training."""

    def loss(self, answer: Tensor, y: Tensor) -> Tensor:
        return type(self).minimised(answer, y)

    @property
    @abstractmethod
    def outputs(self) -> int:
        """O"""

    @abstractmethod
    def targets(self) -> list[Tensor]:
        """y of every sequence."""


def squared_error(answer: Tensor, y: Tensor) -> Tensor:
    """Mean over samples of (answer − y)²; `[B, 1]`, `[B]`."""
    return mse_loss(answer[:, 0], y)


class Classification(Labelled):
    """Which class: cross-entropy; the error rate is reported. The split is within each class.

    Args:
        data: sequences or texts, with targets.
        seed: of the split.
        test: whether a part is kept back to judge the model on.

    Raises:
        DataError: one class only, no targets, or too few sequences.
    """

    kind = "classification"
    minimised = staticmethod(cross_entropy)
    metric = "error rate"

    def __init__(self, data: Sequences, *, seed: int = 0, test: bool = True) -> None:
        self.counts = data.classes()
        self.classes = list(self.counts)
        super().__init__(data, seed=seed, test=test, by_class=True)

    @property
    def outputs(self) -> int:
        return len(self.classes)

    def targets(self) -> list[Tensor]:
        return self.encode({"classes": self.classes}, self.data)

    @staticmethod
    def encode(config: dict[str, Any], data: Sequences) -> list[Tensor]:
        """y of sequences, as in training.

        Raises:
            DataError: no targets, or a class that did not occur in training.
        """
        place = {label: torch.tensor(k) for k, label in enumerate(config["classes"])}
        for label in data.targets():
            if label not in place:
                raise DataError(f"data: expected one of the classes {', '.join(place)}, got {label!r}")
        return [place[label] for label in data.targets()]

    def error(self, answer: Tensor, y: Tensor) -> Tensor:
        return (answer.argmax(-1) != y).double().mean()

    def judge(self, model: SequenceModel) -> Judgement:
        if "test" not in self.parts:
            return {}
        pairs = [(answer.argmax(1), y) for answer, y in answers(model, self, "test")]
        said, truth = (torch.cat(part) for part in zip(*pairs, strict=True))
        common = Counter(self.y[i] for i in self.parts["train"]).most_common(1)[0][0]
        majority = torch.full_like(truth, self.classes.index(common))
        return {"model": _rates(said, truth), f"majority class, {common}": _rates(majority, truth)}

    def keep(self) -> dict[str, Any]:
        return super().keep() | {"classes": self.classes, "class_counts": self.counts}

    @staticmethod
    def apply(model: SequenceModel, config: dict[str, Any], data: Sequences) -> list[str]:
        """A class per sequence."""
        return [config["classes"][k] for k in outputs_of(model, config, data).argmax(1).tolist()]


class Regression(Labelled):
    """A number: mean squared error, in units of the training targets' deviation.

    Args:
        data: sequences or texts, with targets that are numbers.
        seed: of the split.
        test: whether a part is kept back to judge the model on.

    Raises:
        DataError: a target is not a finite number, no targets, or too few sequences.
    """

    kind = "regression"
    minimised = staticmethod(squared_error)
    metric = "mean squared error / variance"

    def __init__(self, data: Sequences, *, seed: int = 0, test: bool = True) -> None:
        super().__init__(data, seed=seed, test=test, by_class=False)
        self.numbers = torch.tensor(data.numbers(), dtype=torch.float64)
        chosen = self.numbers[self.parts["train"]]
        self.target_scale = float(chosen.mean()), float(chosen.std(correction=0)) or 1.0

    @property
    def outputs(self) -> int:
        return 1

    def targets(self) -> list[Tensor]:
        return self.encode({"target_scale": self.target_scale}, self.data)

    @staticmethod
    def encode(config: dict[str, Any], data: Sequences) -> list[Tensor]:
        """y of sequences, as in training.

        Raises:
            DataError: no targets, or one that is not a finite number.
        """
        mean, deviation = config["target_scale"]
        return list(((torch.tensor(data.numbers(), dtype=torch.float64) - mean) / deviation).float())

    def error(self, answer: Tensor, y: Tensor) -> Tensor:
        return self.loss(answer, y)

    def judge(self, model: SequenceModel) -> Judgement:
        if "test" not in self.parts:
            return {}
        mean, deviation = self.target_scale
        truth = self.numbers[self.parts["test"]]
        said = torch.cat([answer[:, 0].double() for answer, _ in answers(model, self, "test")]) * deviation + mean
        return {"model": _errors(said, truth), "mean": _errors(torch.full_like(truth, mean), truth)}

    def keep(self) -> dict[str, Any]:
        return super().keep() | {"target_scale": self.target_scale}

    @staticmethod
    def apply(model: SequenceModel, config: dict[str, Any], data: Sequences) -> list[float]:
        """A number per sequence."""
        mean, deviation = config["target_scale"]
        return (outputs_of(model, config, data)[:, 0].double() * deviation + mean).tolist()


class Listed(Dataset):
    """Samples of a list."""

    def __init__(self, samples: list[tuple[Tensor, Tensor]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Up to `most` of the items, at equal distances."""
    count = min(len(items), most)
    return [items[k * len(items) // count] for k in range(count)]


def input_of(x: Sequence[Any]) -> Scale | Vocabulary:
    """The encoder that turns training sequences, or training texts, into tensors."""
    return Vocabulary.of(x, "word") if isinstance(x[0], str) else Scale.of(list(x))


def to_json(input: Scale | Vocabulary) -> dict[str, Any]:
    """The inverse of `from_json`."""
    return {"scale": asdict(input)} if isinstance(input, Scale) else {"vocabulary": input.to_json()}


def from_json(data: dict[str, Any]) -> Scale | Vocabulary:
    """The inverse of `to_json`."""
    return Scale(**data["scale"]) if "scale" in data else Vocabulary.from_json(data["vocabulary"])


def inputs_of(config: dict[str, Any], data: Sequences) -> list[Tensor]:
    """x of sequences, as in training.

    Raises:
        DataError: other channels than in training.
    """
    encode = from_json(config["input"])
    texts = isinstance(encode, Vocabulary)
    if len(data) and isinstance(data.x[0], str) != texts:
        raise DataError(f"data: the model was trained on {'texts' if texts else 'numbers'}; expected the same")
    if not texts and data.channels != config["channels"]:
        raise DataError(f"data: expected the channels {config['channels']}, got {data.channels}")
    return [encode(x) for x in data.x]  # type: ignore[arg-type]


@torch.no_grad()
def outputs_of(model: SequenceModel, config: dict[str, Any], data: Sequences) -> Tensor:
    """`[N, O]`: what the model answers to sequences of the same channels.

    Raises:
        DataError: other channels than in training.
    """
    model.eval()
    samples = Listed([(x, torch.tensor(0)) for x in inputs_of(config, data)])
    found = [model(x, lengths) for x, lengths, _ in DataLoader(samples, batch_size=256, collate_fn=together)]
    return torch.cat(found)


def _rates(said: Tensor, truth: Tensor) -> dict[str, float]:
    right = (said == truth).double()
    return {
        "accuracy": float(right.mean()),
        "balanced accuracy": float(np.mean([float(right[truth == k].mean()) for k in truth.unique()])),
    }


def _errors(said: Tensor, truth: Tensor) -> dict[str, float]:
    wrong = said - truth
    return {"mse": float((wrong**2).mean()), "mae": float(wrong.abs().mean())}
