"""Handwritten digits followed by noise: real data with a lag, after the noise-padded images of Chang et al. 2019."""

from collections.abc import Sequence

import numpy as np
import torch

from unvanish.train.tasks.digits import Digits
from unvanish.train.tasks.task import Generated, Samples, Split

ROWS = 8
"""rows of an image, and pixels of a row"""
NOISE = 0.1
"""the largest amplitude of the noise; pixels lie in [0, 1]"""


class PaddedDigits(Generated):
    """x_t is row t of an 8 × 8 digit in the first 8 steps, then noise uniform in [−0.1, 0.1]; the answer, after the
    last step, is the digit.

    The images are those of `Digits`, in the same three parts. Training draws an image and fresh noise for every
    sample. A constant answer has the most frequent digit's error: chance.

    Raises:
        ValueError: the sequence is too short for an image.
    """

    name = "digits-padded"
    title = "Digits, then noise"
    describe = (
        "A real handwritten digit, row by row, and then only noise; the answer, after the last step, is the digit."
    )
    source = "Chang, Chen, Haber & Chi 2019 (noise-padded images); images: Alpaydin & Kaynak 1998"
    kind = "classification"
    default_length = 200
    least_length = ROWS
    inputs = ROWS
    outputs = 10
    solved_below = 0.2

    def __init__(self, length: int | None = None, seed: int = 0) -> None:
        super().__init__(length, seed)
        self._images = Digits(seed=seed)
        self.chance = self._images.chance

    def size(self, split: Split) -> int:
        return super().size(split) if split == "train" else self._images.size(split)

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        x = np.empty((len(indices), self.length, ROWS), dtype=np.float32)
        images = np.empty(len(indices), dtype=np.int64)
        for row, index in enumerate(indices):
            rng = self.generator(split, index)
            images[row] = rng.integers(self._images.size("train")) if split == "train" else index
            x[row, ROWS:] = rng.uniform(-NOISE, NOISE, (self.length - ROWS, ROWS))
        pixels, labels = self._images.samples(split, images.tolist())
        x[:, :ROWS] = pixels.reshape(len(indices), ROWS, ROWS).numpy()
        return torch.as_tensor(x), labels
