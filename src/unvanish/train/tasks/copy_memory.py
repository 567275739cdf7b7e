"""Copy memory (Hochreiter & Schmidhuber 1997; Arjovsky, Shah & Bengio 2016, §5.1)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from unvanish.train.tasks.task import Generated, Samples, Split, as_float

SYMBOLS, WORD = 8, 10
BLANK, GO = SYMBOLS, SYMBOLS + 1


class CopyMemory(Generated):
    """Ten symbols out of eight, T blanks, a go signal, blanks; the last ten answers are the ten symbols, all others
    blank.

    x is one-hot over 10, y has T + 20 classes. Answering blanks, then the symbols at random, has cross-entropy 10 ln
    8 / (T + 20): chance. `length` is T, the delay; a sequence has T + 20 steps.
    """

    name = "copy"
    title = "Copy memory"
    describe = "Ten symbols are shown; after a long blank delay they are to be repeated."
    source = "Hochreiter & Schmidhuber 1997; Arjovsky, Shah & Bengio 2016"
    kind = "prediction"
    default_length = 200
    least_length = 1
    inputs = SYMBOLS + 2
    outputs = SYMBOLS + 1
    chance = WORD * math.log(SYMBOLS) / (200 + 2 * WORD)
    variable: ClassVar[bool] = False
    """whether the delay of each sample is drawn from 1 … T"""

    def __init__(self, length: int | None = None, seed: int = 0) -> None:
        super().__init__(length, seed)
        self.answers = self.length + 2 * WORD
        self.chance = WORD * math.log(SYMBOLS) / self.answers
        self.solved_below = self.chance / 10

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        steps = self.length + 2 * WORD
        symbols = np.full((len(indices), steps), BLANK)
        y = np.full((len(indices), steps), BLANK)
        for row, index in enumerate(indices):
            rng = self.generator(split, index)
            word = rng.integers(SYMBOLS, size=WORD)
            delay = rng.integers(1, self.length + 1) if self.variable else self.length
            symbols[row, :WORD] = word
            symbols[row, WORD + delay - 1] = GO
            y[row, WORD + delay : 2 * WORD + delay] = word
        return as_float(np.eye(self.inputs, dtype=np.float32)[symbols]), torch.as_tensor(y)


class VariableCopyMemory(CopyMemory):
    """As `CopyMemory`, each sample with a delay of its own, uniform in 1 … T: the model can't count, it must wait for
    the go signal."""

    name = "copy-variable"
    title = "Copy memory, variable delay"
    source = "Tallec & Ollivier 2018, section 4; after Arjovsky, Shah & Bengio 2016"
    variable = True
