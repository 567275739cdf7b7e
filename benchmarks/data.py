"""Your own data: what the defaults and the commands reach on three data sets, over seeds.

    pip install -e '.[benchmarks]'
    python benchmarks/data.py vowels              # JapaneseVowels, its own training and test files (shipped with aeon)
    python benchmarks/data.py sunspots            # yearly sunspots (shipped with statsmodels), rolling backtest
    python benchmarks/data.py reviews FILE.csv    # review sentences, columns `text` and `label`

`vowels` fits the estimator with its defaults; the others run `unvanish train` and read the figures that it prints.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unvanish.cli import main as unvanish_command
from unvanish.train.data.ucr import read_ts
from unvanish.train.estimators import SequenceClassifier

SUNSPOTS = "--kind forecasting --target SUNACTIVITY --time YEAR --season 11 --window 33"
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
    parser.add_argument("which", choices=["vowels", "sunspots", "reviews"])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    if (given.which == "reviews") != (given.file is not None):
        parser.error("FILE: expected for reviews, and for nothing else")
    torch.set_num_threads(1)
    seeds = range(given.seeds)
    if given.which == "reviews":
        reviews(seeds, given.file)
    else:
        (vowels if given.which == "vowels" else sunspots)(seeds)


if __name__ == "__main__":
    main()
