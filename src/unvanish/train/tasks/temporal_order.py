"""Temporal order (Hochreiter & Schmidhuber 1997, experiment 6; lengths and positions as in Pascanu, Mikolov & Bengio
2013, §4.1)."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from unvanish.train.tasks.task import Generated, Samples, Split, as_float


class TemporalOrder(Generated):
    """Two symbols X or Y occur among distractors a, b, c, d, in the second tenth and the sixth tenth; the answer is
    which, in order.

    x is one-hot over {X, Y, a, b, c, d}; four classes XX, XY, YX, YY. A constant answer errs in 3 of 4: chance.
    """

    name = "temporal-order"
    title = "Temporal order, 2 symbols"
    describe = "Two relevant symbols occur among many distractors; the answer is which two, and in which order."
    source = "Hochreiter & Schmidhuber 1997, experiment 6a; Pascanu, Mikolov & Bengio 2013"
    kind = "classification"
    default_length = 100
    least_length = 10
    inputs = 6
    outputs = 4
    chance = 0.75
    solved_below = 0.01
    tenths: ClassVar[tuple[int, ...]] = (1, 5)
    """the positions of the symbols: from this tenth of the sequence to the next"""

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        T = self.length
        symbols = np.empty((len(indices), T), dtype=np.int64)
        y = np.zeros(len(indices), dtype=np.int64)
        for row, index in enumerate(indices):
            rng = self.generator(split, index)
            symbols[row] = 2 + rng.integers(4, size=T)
            for tenth in self.tenths:
                place = rng.integers(tenth * T // 10, (tenth + 1) * T // 10)
                symbols[row, place] = rng.integers(2)
                y[row] = 2 * y[row] + symbols[row, place]
        return as_float(np.eye(self.inputs, dtype=np.float32)[symbols]), torch.as_tensor(y)


class TemporalOrder3(TemporalOrder):
    """As `TemporalOrder` with three symbols, in the second, fourth and seventh tenth: eight classes, chance 7/8."""

    name = "temporal-order-3"
    title = "Temporal order, 3 symbols"
    describe = "Three relevant symbols occur among many distractors; the answer is which three, and in which order."
    source = "Hochreiter & Schmidhuber 1997, experiment 6b; Pascanu, Mikolov & Bengio 2013"
    outputs = 8
    chance = 0.875
    tenths = (1, 3, 6)
