"""Does a GRU learn adding because the second mark may fall within its first reach? Trains it with no mark in the last
steps.

python benchmarks/far_marks.py [free steps at the end] [seeds]
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch

from unvanish.train import TASKS
from unvanish.train.configuration import TrainingConfiguration
from unvanish.train.fit import evaluate, fit
from unvanish.train.models import recipe
from unvanish.train.tasks.adding import Adding
from unvanish.train.tasks.task import Samples, Split


class FarMarks(Adding):
    """`Adding` whose second mark stays out of the last `free` steps."""

    free = 20

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        T, half = self.length, self.length // 2
        x = np.zeros((len(indices), T, 2), dtype=np.float32)
        sums = np.empty((len(indices), 1), dtype=np.float32)
        for row, index in enumerate(indices):
            rng = self.generator(split, index)
            x[row, :, 0] = rng.random(T, dtype=np.float32)
            marks = [rng.integers(half), half + rng.integers(T - half - self.free)]
            x[row, marks, 1] = 1
            sums[row] = x[row, marks, 0].sum()
        return torch.as_tensor(x), torch.as_tensor(sums)


def main() -> None:
    FarMarks.free = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for seed in range(int(sys.argv[2]) if len(sys.argv) > 2 else 3):
        torch.manual_seed(seed)
        task = FarMarks(seed=seed)
        model = recipe("gru").build(task, 32)
        fit(model, task, TrainingConfiguration(800, 32, 1e-2, 1.0, seed))
        print(f"seed {seed}: mean squared error {evaluate(model, task):.4f}, chance {TASKS['adding'].chance:.4f}")


if __name__ == "__main__":
    main()
