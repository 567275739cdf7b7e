"""The trainings of `published.py`: the papers' tasks as they set them, in the largest reduction that one core does."""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unvanish import cures, flow
from unvanish import nn as layers
from unvanish.train.models import SequenceModel, recipe
from unvanish.train.tasks import Task
from unvanish.train.tasks.digits import SequentialMNIST
from unvanish.train.tasks.recall import DelayedRecall
from unvanish.train.tasks.task import Generated, Samples, Split, as_float

Found = dict[str, Any]


class Adding1997(Generated):
    """The adding problem as Hochreiter & Schmidhuber 1997 set it (experiment 4): T to 1.1 T pairs, values from
    [−1, 1], marks 1 among the first ten pairs and the first T/2 − 1, −1 at both ends; the target is 0.5 + (X₁ + X₂)/4,
    and an answer is right within 0.04. Shorter sequences begin with zeros here."""

    kind = "regression"
    default_length = 100
    inputs, outputs = 2, 1

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        T = self.length
        longest = T + T // 10
        x, y = np.zeros((len(indices), longest, 2)), np.zeros((len(indices), 1))
        for row, index in enumerate(indices):
            rng = self.generator(split, index)
            first = longest - int(rng.integers(T, longest + 1))
            x[row, first:, 0] = rng.uniform(-1, 1, longest - first)
            x[row, [first, -1], 1] = -1
            a = first + int(rng.integers(10))
            b = first + int(rng.integers(T // 2 - 1))
            while b == a:
                b = first + int(rng.integers(T // 2 - 1))
            # X₁ or X₂ of a marked first pair counts as 0, as in the paper.
            values = [0.0 if place == first else x[row, place, 0] for place in (a, b)]
            x[row, [a, b], 1] = 1
            y[row] = 0.5 + sum(values) / 4
        return as_float(x), as_float(y)


class RowsOfMNIST(SequentialMNIST):
    """As `SequentialMNIST`, one row of 28 pixels at a step."""

    inputs = 28

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        x, y = super().samples(split, indices)
        return x.view(len(x), 28, 28), y


class DelayedCopy(Generated):
    """y_t = x_{t−d}, x_t a fair coin, ±1: the delayed copy of Engelken 2023; `length` is d, a sequence 150 steps."""

    kind = "regression"
    default_length = 10
    inputs, outputs, answers = 1, 1, 150
    chance = 0.5

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        coins = np.stack([self.generator(split, i).integers(2, size=self.answers) for i in indices])
        x = as_float(2 * coins - 1).unsqueeze(-1)
        y = torch.zeros_like(x)
        y[:, self.length :] = x[:, : -self.length]
        return x, y


def updates(model: SequenceModel, task: Task, rate: float, batch: int, clip: float = 1.0) -> Any:
    """Train with Adam, one update for each `next`: (the loss, the answers' errors before it)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    size = task.size("train")
    order = np.random.default_rng(task.seed)
    rows: list[int] = []
    for number in range(sys.maxsize):
        if task.shuffle:
            rows = rows if len(rows) >= batch else order.permutation(size).tolist()
            rows, here = rows[batch:], rows[:batch]
        else:
            here = list(range(number * batch, (number + 1) * batch))
        x, y = task.samples("train", here)
        optimizer.zero_grad()
        answer = model(x)
        loss = task.loss(answer, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        yield loss.detach(), answer.detach() - y if task.kind == "regression" else None


@torch.no_grad()
def judged(model: SequenceModel, x: Tensor, y: Tensor, wrong: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The mean of wrong(answer, y)."""
    parts = [wrong(model(a), b).double() for a, b in zip(x.split(256), y.split(256), strict=True)]
    return float(torch.cat(parts).mean())


def adding_1997(length: int, seed: int) -> Found:
    """The paper's rule to stop: the last 2,000 sequences right, their mean error below 0.01; then 2,560 to test."""
    task, batch, last = Adding1997(length, seed), 16, 2000
    torch.manual_seed(seed)
    model = recipe("lstm-chrono").build(task, 16)
    errors: list[float] = []
    for number, (_, off) in enumerate(updates(model, task, 5e-3, batch), start=1):
        errors += off.abs().flatten().tolist()
        stop = len(errors) >= last and max(errors[-last:]) < 0.04 and mean(errors[-last:]) < 0.01
        if stop or number * batch >= 200_000:
            break
    x, y = task.samples("test", range(2560))
    wrong = judged(model, x, y, lambda answer, y: ((answer - y).abs() >= 0.04).flatten())
    return {"sequences": number * batch if stop else None, "wrong": round(wrong * 2560)}


def mnist_rows(cell: str, seed: int) -> Found:
    """25 passes over 4,000 images, the weights of the pass with the best validation error."""
    task, batch, passes = RowsOfMNIST(seed=seed), 32, 25
    torch.manual_seed(seed)
    model = SequenceModel(recipe(cell).recurrent(28, 128, 28), 10)
    validation, best = task.samples("validation", range(500)), (math.inf, copy.deepcopy(model.state_dict()))
    training = updates(model, task, 1e-3, batch)

    def wrong(answer: Tensor, y: Tensor) -> Tensor:
        return answer.argmax(-1) != y

    for _ in range(passes):
        for _ in range(task.size("train") // batch):
            next(training)
        best = min(best, (judged(model, *validation, wrong), copy.deepcopy(model.state_dict())), key=lambda b: b[0])
    model.load_state_dict(best[1])
    return {"right": 1 - judged(model, *task.samples("test", range(500)), wrong)}


def spectra(within: float, seed: int) -> Found:
    """A GRU of 64 units whose weights start uniform in ±`within`: its exponents before and after 10 passes over 4,000
    images row by row, and the share of right answers."""
    task, batch = RowsOfMNIST(seed=seed), 32
    torch.manual_seed(seed)
    layer = layers.GRU(28, 64, batch_first=True)
    for weight in layer.parameters():
        nn.init.uniform_(weight, -within, within)
    model = SequenceModel(layer, 10)
    x, y = task.samples("test", range(500))

    def exponents() -> list[float]:
        found = flow.lyapunov(layer, x[:16]).exponents
        return [float(found[0]), float(found.mean())]

    before, training = exponents(), updates(model, task, 1e-3, batch)
    for _ in range(10 * (task.size("train") // batch)):
        next(training)
    right = judged(model, x, y, lambda answer, y: answer.argmax(-1) == y)
    return {"right": right, "before": before, "after": exponents()}


@cache
def flossed(seed: int) -> dict[str, Tensor]:
    """The weights of a tanh-RNN of 80 units after 60 updates on the squares of its first 20 exponents alone."""
    torch.manual_seed(seed)
    layer = layers.RNN(1, 80, batch_first=True)
    penalty = cures.GradientFlossing(layer, n=20, every=5, warmup=20)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for number in range(60):
        x, _ = DelayedCopy(2, seed).samples("validation", range(4 * number, 4 * number + 4))
        optimizer.zero_grad()
        penalty(x[:, :100]).backward()
        optimizer.step()
    return layer.state_dict()


def flossing(delay: int, flossing: bool, seed: int) -> Found:
    """The share of right signs after 2,000 updates, and the largest exponents before them."""
    task = DelayedCopy(delay, seed)
    torch.manual_seed(seed)
    layer = layers.RNN(1, 80, batch_first=True)
    model = SequenceModel(layer, 1, task.answers)
    if flossing:
        layer.load_state_dict(flossed(seed))
    x, y = task.samples("test", range(256))
    exponents = flow.lyapunov(layer, x[:2], n=20, warmup=20).exponents
    training = updates(model, task, 1e-3, 16)
    for _ in range(2000):
        next(training)
    right = judged(model, x, y, lambda answer, y: ((answer.sign() == y)[:, delay:]).flatten())
    return {"right": right, "exponents": [float(exponents[0]), float(exponents[-1])]}


def critical(cell: str, chi: float, lag: int, seed: int) -> Found:
    """A class shown at the first step, asked for after `lag` steps of noise: learnt within 400 updates or not, and the
    reach of a gradient before training."""
    task = DelayedRecall(lag, seed)
    torch.manual_seed(seed)
    layer = {"tanh-RNN": layers.RNN, "GRU": layers.GRU}[cell](task.inputs, 64, batch_first=True)
    cures.orthogonal_(layer)
    probe, _ = DelayedRecall(200, seed).samples("validation", range(16))
    try:
        cures.critical_(layer, probe, target=chi)
    except ArithmeticError as why:
        return {"refused": str(why)}
    layer.double()
    curve = flow.adjoint_map(layer, probe.double(), sources=[-1]).over_lag(0).median(1).values
    layer.float()
    model = SequenceModel(layer, task.outputs)
    x, y = task.samples("validation", range(256))
    training, learnt = updates(model, task, 3e-3, 32), None
    for number in range(1, 401):
        next(training)
        if number % 25 == 0 and judged(model, x, y, lambda a, y: a.argmax(-1) != y) < 0.5 * task.chance:
            learnt = number
            break
    return {"learnt_at": learnt, "reach": flow.decay(curve).reach, "rate": flow.decay(curve).rate}


WITHIN = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
CHI, LAGS = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0), (10, 20, 40, 80, 160)
EXPERIMENTS: dict[str, tuple[Callable[..., Found], list[dict[str, Any]]]] = {
    "adding-1997": (
        adding_1997,
        [{"length": length, "seed": seed} for length, seed in product((100, 500), range(3))],
    ),
    "mnist-rows": (
        mnist_rows,
        [
            {"cell": cell, "seed": seed}
            for seed, cell in product(range(3), ("lstm-chrono", "ur_lstm", "indrnn", "gru", "rnn"))
        ],
    ),
    "flossing": (
        flossing,
        [
            {"delay": delay, "flossing": first, "seed": seed}
            for seed, delay, first in product(range(3), (10, 20, 40), (False, True))
        ],
    ),
    "spectra": (spectra, [{"within": within, "seed": seed} for seed, within in product(range(3), WITHIN)]),
    "critical": (
        critical,
        [
            {"cell": cell, "chi": chi, "lag": lag, "seed": seed}
            for seed, cell, lag, chi in product(range(3), ("tanh-RNN", "GRU"), LAGS, CHI)
        ],
    ),
}
