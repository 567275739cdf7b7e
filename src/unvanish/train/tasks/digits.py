"""Handwritten digits read pixel by pixel, after the sequential MNIST of Le, Jaitly & Hinton 2015, on scikit-learn's 8
× 8 images."""

from collections.abc import Sequence

import numpy as np
import torch

from unvanish.train.tasks.base import Samples, Split, Task, as_float


class Digits(Task):
    """x_t is one pixel in [0, 1], row by row, 64 steps; the answer, after the last, is the digit.

    1,797 images (UCI optical digits), shuffled once by the seed: 1,197 to train, 300 to validate, 300 to test. The
    classes are nearly balanced, so the best constant answer errs in about 90 %.
    """

    name = "digits"
    title = "Digits, pixel by pixel"
    describe = "Real handwritten digits, shown one pixel at a time; the answer, after the last, is the digit."
    source = "Le, Jaitly & Hinton 2015 (sequential MNIST); images: Alpaydin & Kaynak 1998"
    kind = "classification"
    default_length = 64
    inputs = 1
    outputs = 10
    solved_below = 0.2

    def __init__(self, length: int | None = None, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        if length not in (None, self.default_length):
            raise ValueError(
                f"length: an image of the digits has {self.default_length} pixels, got {length}; leave it out"
            )
        self.length = self.default_length
        self.seed = seed
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(labels))
        bounds: dict[Split, slice] = {"test": slice(0, 300), "validation": slice(300, 600), "train": slice(600, None)}
        self._data = {
            split: (as_float(images[order[part]] / 16).unsqueeze(-1), torch.as_tensor(labels[order[part]]))
            for split, part in bounds.items()
        }
        self.chance = 1 - np.bincount(labels).max() / len(labels)

    def size(self, split: Split) -> int:
        return len(self._data[split][1])

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        x, y = self._data[split]
        rows = torch.as_tensor(indices)
        return x[rows], y[rows]
