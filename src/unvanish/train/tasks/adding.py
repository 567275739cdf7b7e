"""The adding problem (Hochreiter & Schmidhuber 1997, experiment 4, in the form of Arjovsky, Shah & Bengio 2016,
§5.2)."""

from collections.abc import Sequence

import numpy as np

from unvanish.train.tasks.base import Samples, Split, Task, as_float, whole

_SPLITS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}


class Adding(Task):
    """x_t = (u_t, m_t): u_t ~ U[0, 1]; m_t marks one step of the first half and one of the second. Answer: the sum of
    the marked u.

    Always answering 1 has MSE Var(u + u') = 1/6 ≈ 0.167: chance. To do better, an error at the last step must reach
    the marks.
    """

    name = "adding"
    title = "Adding problem"
    describe = "Two of many random numbers are marked; the answer, after the last, is their sum."
    source = "Hochreiter & Schmidhuber 1997; Arjovsky, Shah & Bengio 2016"
    kind = "regression"
    default_length = 200
    inputs = 2
    outputs = 1
    chance = 1 / 6
    solved_below = 0.01

    def __init__(self, length: int | None = None, seed: int = 0) -> None:
        self.length = whole(length, "length", self.default_length, 2)
        self.seed = seed

    def size(self, split: Split) -> int:
        """Training never sees a sample twice."""
        return 2**40 if split == "train" else 1000

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        T, half = self.length, self.length // 2
        x = np.zeros((len(indices), T, 2), dtype=np.float32)
        y = np.empty((len(indices), 1), dtype=np.float32)
        for row, index in enumerate(indices):
            rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, _SPLITS[split], index]))
            x[row, :, 0] = rng.random(T, dtype=np.float32)
            marks = [rng.integers(half), half + rng.integers(T - half)]
            x[row, marks, 1] = 1
            y[row] = x[row, marks, 0].sum()
        return as_float(x), as_float(y)
