"""One symbol at the start, to be recalled at the end: without noise in between, and with it."""

from collections.abc import Sequence

import numpy as np
import torch

from unvanish.train.tasks.task import Generated, Samples, Split, as_float


class NoiseFreeLag(Generated):
    """x, a_1, …, a_{T−1} or y, a_1, …, a_{T−1}: the answer, after the last, is which of x and y came first.

    Every step but the first is the same in all sequences, one-hot over T + 1 symbols, so nothing distracts: the
    purest long lag.
    """

    name = "noise-free"
    title = "Noise-free long lag"
    describe = "One of two symbols, then always the same long sequence; the answer is which of the two it was."
    source = "Hochreiter & Schmidhuber 1997, experiment 2a"
    kind = "classification"
    default_length = 100
    outputs = 2
    chance = 0.5
    solved_below = 0.01

    def __init__(self, length: int | None = None, seed: int = 0) -> None:
        super().__init__(length, seed)
        self.inputs = self.length + 1

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        y = np.array([self.generator(split, index).integers(2) for index in indices], dtype=np.int64)
        x = np.zeros((len(indices), self.length, self.inputs), dtype=np.float32)
        x[:, np.arange(1, self.length), np.arange(2, self.length + 1)] = 1
        x[np.arange(len(indices)), 0, y] = 1
        return as_float(x), torch.as_tensor(y)


class DelayedRecall(Generated):
    """A class, one-hot over 8 at the first step, then T − 1 steps of noise ~ N(0, 1) in two other features; the
    answer is the class."""

    name = "delayed-recall"
    title = "Delayed recall"
    describe = "A class is shown once, then only noise; the answer, after the last step, is the class."
    source = "after Bengio, Simard & Frasconi 1994 (latching a bit against noise)"
    kind = "classification"
    default_length = 100
    inputs = 10
    outputs = 8
    chance = 7 / 8
    solved_below = 0.05

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        x = np.zeros((len(indices), self.length, self.inputs), dtype=np.float32)
        y = np.empty(len(indices), dtype=np.int64)
        for row, index in enumerate(indices):
            rng = self.generator(split, index)
            y[row] = rng.integers(self.outputs)
            x[row, 0, y[row]] = 1
            x[row, 1:, self.outputs :] = rng.standard_normal((self.length - 1, 2), dtype=np.float32)
        return as_float(x), torch.as_tensor(y)
