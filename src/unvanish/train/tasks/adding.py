"""The adding problem (Hochreiter & Schmidhuber 1997, experiment 4, in the form of Arjovsky, Shah & Bengio 2016,
§5.2), and its product."""

from collections.abc import Sequence

import numpy as np

from unvanish.train.tasks.task import Generated, Samples, Split, as_float


def _marked(task: Generated, split: Split, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(x [B, T, 2], the two marked values [B, 2]): x_t = (u_t, m_t), u_t ~ U[0, 1], m_t marks one step of each half."""
    T, half = task.length, task.length // 2
    x = np.zeros((len(indices), T, 2), dtype=np.float32)
    values = np.empty((len(indices), 2), dtype=np.float32)
    for row, index in enumerate(indices):
        rng = task.generator(split, index)
        x[row, :, 0] = rng.random(T, dtype=np.float32)
        marks = [rng.integers(half), half + rng.integers(T - half)]
        x[row, marks, 1] = 1
        values[row] = x[row, marks, 0]
    return x, values


class Adding(Generated):
    """x_t = (u_t, m_t): u_t ~ U[0, 1]; m_t marks one step of the first half and one of the second. Answer: the sum of
    the marked u.

    Always answering 1 has MSE Var(u + u') = 1/6 ≈ 0.167: chance. To do better, an error at the last step must reach
    the marks.
    """

    name = "adding"
    title = "Adding problem"
    describe = "Two of many random numbers are marked; the answer, after the last, is their sum."
    source = "Hochreiter & Schmidhuber 1997; Arjovsky, Shah & Bengio 2016"
    note = (
        "It does not need marks near the end for that: a GRU of 32 units learns as well where the last 20 of 200 steps "
        "hold none (benchmarks/far_marks.py)."
    )
    kind = "regression"
    default_length = 200
    inputs = 2
    outputs = 1
    chance = 1 / 6
    solved_below = 0.01

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        x, values = _marked(self, split, indices)
        return as_float(x), as_float(values.sum(1, keepdims=True))


class Multiplication(Generated):
    """As `Adding`, but the answer is the product of the two marked numbers.

    Always answering 1/4 has MSE Var(u u') = 1/9 − 1/16 = 7/144 ≈ 0.0486: chance.
    """

    name = "multiplication"
    title = "Multiplication problem"
    describe = "Two of many random numbers are marked; the answer, after the last, is their product."
    source = "Hochreiter & Schmidhuber 1997, experiment 5"
    kind = "regression"
    default_length = 100
    inputs = 2
    outputs = 1
    chance = 7 / 144
    solved_below = 0.005

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        x, values = _marked(self, split, indices)
        return as_float(x), as_float(values.prod(1, keepdims=True))
