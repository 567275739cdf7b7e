"""Sequences of any length with one target each, and how they are split."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unvanish.train.data.table import DataError, numbers

LARGEST = 1e150
"""the largest magnitude whose square float64 can represent"""


@dataclass(frozen=True)
class Sequences:
    """The sequences of a data file, with their targets."""

    x: list[np.ndarray] | list[str]
    """[T_i, I] each, float64, NaN where a value is missing; or texts"""
    y: list[str] | None
    """as written in the file; None where there is no target column"""
    names: list[str]
    """of the sequences: their id, or their row in the file"""
    channels: list[str]
    places: list[str] = field(default_factory=list)
    """file, row and column of each target; empty where they come from no file"""

    def __len__(self) -> int:
        return len(self.x)

    def place(self, index: int) -> str:
        """The place of a target, as messages name it."""
        return self.places[index] if self.places else f"data: {self.names[index]}"

    def targets(self) -> list[str]:
        """The targets.

        Raises:
            DataError: there are none.
        """
        if self.y is None:
            raise DataError("data: there are no targets; name their column with --target")
        return self.y

    def classes(self) -> dict[str, int]:
        """class → how many sequences it has, in the order of the classes' names.

        Raises:
            DataError: there is one class only.
        """
        counts = Counter(self.targets())
        if len(counts) < 2:
            only = self.targets()[0]
            raise DataError(f"{self.place(0)}: every sequence has the class {only!r}; expected two or more classes")
        return dict(sorted(counts.items()))

    def numbers(self) -> list[float]:
        """The targets as numbers.

        Raises:
            DataError: one isn't a finite number, or too large for its square to be one.
        """
        found = numbers(self.targets(), self.place, missing=()).tolist()
        for index, value in enumerate(found):
            if abs(value) >= LARGEST:
                raise DataError(f"{self.place(index)}: expected a magnitude below {LARGEST:g}, got {value:g}")
        return found


def split(y: list[str] | None, n: int, seed: int, *, test: bool = True) -> dict[str, list[int]]:
    """70 % train, 15 % validation, 15 % test; whole sequences, drawn by `seed`, within each class where `y` is given.

    Without `test`, the test part is used for training.

    Raises:
        DataError: a split would stay empty.
    """
    order = np.random.default_rng(seed).permutation(n)
    classes = {label: place for place, label in enumerate(sorted(set(y)))} if y is not None else {}
    members = [[int(i) for i in order if y is None or classes[y[i]] == c] for c in range(max(1, len(classes)))]
    found: dict[str, list[int]] = {"validation": [], "train": []} | ({"test": []} if test else {})
    for group in members:
        held = max(1, round(0.15 * len(group))) if len(group) >= len(found) else 0
        found["validation"] += group[:held]
        if test:
            found["test"] += group[held : 2 * held]
        found["train"] += group[(2 if test else 1) * held :]
    for name, indices in found.items():
        if not indices:
            raise DataError(
                f"data: {n} sequences leave the {name} split empty; expected {len(found)} or more of at least one class"
            )
    return {name: sorted(indices) for name, indices in found.items()}


@dataclass(frozen=True)
class Scale:
    """(x − mean)/deviation by channel, both of the training sequences alone; a missing value becomes 0, the mean."""

    mean: list[float]
    deviation: list[float]

    @classmethod
    def of(cls, x: list[np.ndarray]) -> "Scale":
        """The scale of these sequences, ignoring NaN; a constant channel is only shifted.

        Raises:
            DataError: values so large that their deviation overflows.
        """
        values = np.concatenate(x)
        known = np.isfinite(values)
        count = np.maximum(known.sum(0), 1)
        with np.errstate(over="ignore", invalid="ignore"):
            mean = np.where(known, values, 0.0).sum(0) / count
            deviation = np.sqrt((np.where(known, values - mean, 0.0) ** 2).sum(0) / count)
        if not (np.isfinite(mean).all() and np.isfinite(deviation).all()):
            raise DataError(
                f"data: values are too large to be scaled in float64; expected magnitudes below about {LARGEST:g}"
            )
        # A constant channel's deviation is only the rounding of its mean.
        varies = deviation > 4 * np.finfo(np.float64).eps * np.abs(mean)
        return cls(mean.tolist(), np.where(varies, deviation, 1.0).tolist())

    def __call__(self, x: np.ndarray) -> Tensor:
        """`[T, I]` → `[T, I]` float32

        Raises:
            DataError: a value lies so far from the training sequences that float32 can't hold it.
        """
        scaled = (x - np.asarray(self.mean)) / np.asarray(self.deviation)
        if (np.abs(scaled) > 1e30).any():
            raise DataError("data: a value lies more than 1e30 deviations from the mean of the training sequences")
        return torch.from_numpy(np.where(np.isnan(scaled), 0.0, scaled).astype(np.float32))
