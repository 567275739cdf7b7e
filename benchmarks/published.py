"""Published results beside ours: what the papers' tasks come to here, and how far reach says what can be learnt.

    python benchmarks/published.py run FOLDER [--only adding-1997] [--seconds 600]
    python benchmarks/published.py report FOLDER [--picture docs/pictures/critical.png]

`run` does the trainings that FOLDER lacks, appends one line for each to NAME.jsonl in it, and goes on where it was
stopped. `report` also reads the parts that `benchmarks/tasks.py run --out FOLDER` did. The trainings are the largest
reduction of the papers' that one core does in minutes; the table names the differences.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import tasks
import torch
from torch import Tensor

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


@cache
def flossed(seed: int) -> dict[str, Tensor]:
    """The weights of a tanh-RNN of 80 units after 60 updates on the squares of its first 20 exponents alone."""
    torch.manual_seed(seed)
    layer = layers.RNN(1, 80, batch_first=True)
    penalty = cures.GradientFlossing(layer, n=20, every=5, warmup=20)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for number in range(60):
        x, _ = DelayedCopy(1, seed).samples("validation", range(4 * number, 4 * number + 4))
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


CHI, LAGS = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0), (10, 20, 40, 80, 160)
EXPERIMENTS: dict[str, tuple[Callable[..., Found], list[dict[str, Any]]]] = {
    "adding-1997": (
        adding_1997,
        [{"length": length, "seed": seed} for length, seed in ((100, 0), (100, 1), (100, 2), (500, 0))],
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
    "critical": (
        critical,
        [
            {"cell": cell, "chi": chi, "lag": lag, "seed": seed}
            for seed, cell, lag, chi in product(range(3), ("tanh-RNN", "GRU"), LAGS, CHI)
        ],
    ),
}


def run(folder: Path, names: list[str], seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for name in names:
        experiment, cases = EXPERIMENTS[name]
        done = [{key: found[key] for key in cases[0]} for found in tasks.read(folder, name)]
        for case in cases:
            if case in done:
                continue
            if time.perf_counter() - start > seconds:
                return
            began = time.perf_counter()
            found = case | experiment(**case)
            found["seconds"] = round(time.perf_counter() - began, 1)
            with (folder / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(name, found, flush=True)


def share(runs: list[Found]) -> str:
    return f"{sum(r['learnt_at'] is not None for r in runs)} of {len(runs)}"


def of_tasks(folder: Path, part: str, *sides: str) -> str:
    """What `tasks.py` found: of each side how many learnt, and after how many sequences."""
    shown = []
    for side, mine in tasks.by_side(tasks.PARTS[part], tasks.read(folder, part)):
        if side.title in sides:
            at = [r["learnt_at"] for r in mine if r["learnt_at"] is not None]
            after = f", after {median(at) * tasks.PARTS[part].batch:,.0f} sequences" if at else ""
            shown.append(f"{side.title} {share(mine)}{after}")
    return "; ".join(shown)


def of_adding(folder: Path, length: int) -> str:
    mine = [r for r in tasks.read(folder, "adding-1997") if r["length"] == length]
    got = [r["sequences"] for r in mine if r["sequences"]]
    return mine and (
        f"{len(got)} of {len(mine)}, after {median(got):,.0f} sequences; at most {max(r['wrong'] for r in mine)} of "
        "2,560 wrong"
        if got
        else f"0 of {len(mine)}"
    )


def of_mnist(folder: Path) -> str:
    runs = tasks.read(folder, "mnist-rows")
    cells = dict.fromkeys(r["cell"] for r in runs)
    figures = {cell: [100 * r["right"] for r in runs if r["cell"] == cell] for cell in cells}
    return "; ".join(
        f"{recipe(cell).title} {mean(v):.1f} % ({min(v):.1f} to {max(v):.1f})" for cell, v in figures.items()
    )


def of_flossing(folder: Path) -> str:
    runs = tasks.read(folder, "flossing")
    shown = []
    for delay in dict.fromkeys(r["delay"] for r in runs):
        plain, first = (
            [100 * r["right"] for r in runs if (r["delay"], r["flossing"]) == (delay, kind)] for kind in (False, True)
        )
        shown.append(
            f"d = {delay}: {median(plain):.0f} % right plain, {median(first):.0f} % flossed (n = {len(first)})"
        )
    return "; ".join(shown)


LSTM97 = "Hochreiter & Schmidhuber 1997"
ROWS: tuple[tuple[str, str, Callable[[Path], Any], str], ...] = (
    (
        f"adding, T = 100, experiment 4 ({LSTM97})",
        "74,000 sequences; 1 of 2,560 wrong",
        partial(of_adding, length=100),
        "the paper's task and rule to stop; ours Adam, batches of 16, chrono LSTM of 16 units (1,297 weights, theirs "
        "93), zeros before shorter sequences",
    ),
    (
        f"adding, T = 500 ({LSTM97})",
        "209,000 sequences; 0 of 2,560 wrong",
        partial(of_adding, length=500),
        "as above; at most 200,000 sequences",
    ),
    (
        "adding, T = 200 (Tallec & Ollivier 2018)",
        "chrono learns sooner than a forget bias of 1 (figure)",
        lambda folder: of_tasks(folder, "adding-200", "chrono LSTM", "forget-bias-1 LSTM"),
        "H = 64 instead of 128, Adam at 1e-2 instead of RMSprop at 1e-3; at most 48,000 sequences",
    ),
    (
        "adding, T = 400",
        "",
        lambda folder: of_tasks(folder, "adding-400", "chrono LSTM", "forget-bias-1 LSTM"),
        "as above",
    ),
    (
        "temporal order, T = 50 (Pascanu et al. 2013)",
        "clip + Ω: every run",
        lambda folder: of_tasks(folder, "order-50", "tanh-RNN, clip", "tanh-RNN, clip + Ω"),
        "Adam at 1e-3 instead of SGD; at most 192,000 sequences instead of millions",
    ),
    (
        f"embedded Reber ({LSTM97})",
        "LSTM 97 to 100 % of trials, 8,440 to 39,740 strings",
        lambda folder: of_tasks(folder, "reber", "forget-bias-1 LSTM"),
        "with forget gates, AdamW, batches of 8",
    ),
    (
        "sequential MNIST, row by row",
        "pixel by pixel, 60,000 images: LSTM 98.9 %, UR-LSTM 99.28 %, IndRNN 99.0 %, expRNN 98.7 %",
        of_mnist,
        "rows of 28 pixels, 4,000 images, 25 passes, H = 128, one layer: not the same task, and ours is far below",
    ),
    (
        "delayed copy (Engelken 2023)",
        "flossing before training lets tanh-RNNs bridge longer delays (figure)",
        of_flossing,
        "N = 80, batch 16, Adam at 1e-3 as there; 150 steps instead of 300, 2,000 updates, 60 updates of flossing on "
        "20 exponents instead of 500 on 75",
    ),
)


def report(folder: Path) -> None:
    print("| task | published | here | differences |\n|---|---|---|---|")
    for task, published, ours, differences in ROWS:
        if found := ours(folder):
            print(f"| {task} | {published or '–'} | {found} | {differences} |")
    print(
        "\n| cell | χ | reach | " + " | ".join(f"T = {lag}" for lag in LAGS) + " |\n|---|---|---|" + "---|" * len(LAGS)
    )
    for cell, chi, reach, learnt in by_chi(tasks.read(folder, "critical")):
        print(f"| {cell} | {chi:g} | {reach:g} | {' | '.join('' if v is None else f'{v:.2f}' for v in learnt)} |")


def by_chi(runs: list[Found]) -> list[tuple[str, float, float, list[float | None]]]:
    """(cell, χ, median reach, share learnt at each lag)."""
    rows = []
    for cell, chi in product(("tanh-RNN", "GRU"), CHI):
        mine = [r for r in runs if (r["cell"], r["chi"]) == (cell, chi) and "refused" not in r]
        if mine:
            at = [[r["learnt_at"] is not None for r in mine if r["lag"] == lag] for lag in LAGS]
            rows.append((cell, chi, median(r["reach"] for r in mine), [mean(v) if v else None for v in at]))
    return rows


def draw(folder: Path, path: Path) -> None:
    """The share learnt over χ and lag, and over it the reach before training."""
    from matplotlib import pyplot as plt  # a figure is asked for: only then is it loaded

    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "critical"})
    rows = by_chi(tasks.read(folder, "critical"))
    cells = list(dict.fromkeys(row[0] for row in rows))
    size = (1 + 4.2 * len(cells), 3.6)
    figure, (both,) = plt.subplots(1, len(cells), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, cell in zip(both, cells, strict=True):
        mine = [row for row in rows if row[0] == cell]
        shares = [[math.nan if v is None else v for v in row[3]] for row in mine]
        image = axes.pcolormesh(np.array(shares).T, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
        # Lags double from cell to cell: log2 of the reach, with the first lag at the middle of the first cell.
        heights = [0.5 + math.log2(max(row[2], LAGS[0] / 2**0.5) / LAGS[0]) for row in mine]
        axes.plot([i + 0.5 for i in range(len(mine))], heights, "o-", color="crimson", label="reach before training")
        axes.set_xticks([i + 0.5 for i in range(len(mine))], [f"{row[1]:g}" for row in mine])
        axes.set_yticks([i + 0.5 for i in range(len(LAGS))], [str(lag) for lag in LAGS])
        axes.set(title=cell, xlabel="χ, mean squared singular value of a step", ylim=(0, len(LAGS)))
    both[0].set_ylabel("lag, steps")
    both[0].legend(loc="lower right", fontsize=8)
    figure.colorbar(image, ax=list(both), label="share of trainings that learnt")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=tuple(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no training after that")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "run":
        run(given.folder, given.only, given.seconds)
        return
    report(given.folder)
    if given.picture is not None:
        draw(given.folder, given.picture)


if __name__ == "__main__":
    main()
