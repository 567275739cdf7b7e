"""Published results beside ours: what the papers' tasks come to here, and how far reach says what can be learnt.

    python benchmarks/published.py run FOLDER [--only adding-1997] [--seconds 600]
    python benchmarks/published.py report FOLDER [--picture docs/pictures/critical.png]

`run` does the trainings that FOLDER lacks, appends one line for each to NAME.jsonl in it, and goes on where it was
stopped. `report` also reads the parts that `benchmarks/tasks.py run --out FOLDER` did. The trainings are the largest
reduction of the papers' that one core does in minutes; the table names the differences.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import tasks
import torch
from published_experiments import CHI, EXPERIMENTS, LAGS, Found

from unvanish.train.models import recipe


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
        if plain and first:
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
    exponents(tasks.read(folder, "spectra"))
    print(
        "\n| cell | χ | reach | " + " | ".join(f"T = {lag}" for lag in LAGS) + " |\n|---|---|---|" + "---|" * len(LAGS)
    )
    for cell, chi, reach, learnt in by_chi(tasks.read(folder, "critical")):
        print(f"| {cell} | {chi:g} | {reach:g} | {' | '.join('' if v is None else f'{v:.2f}' for v in learnt)} |")


def exponents(runs: list[Found]) -> None:
    """Exponents before and after training beside the answers, means over seeds; and how their ranks correlate."""
    if not runs:
        return
    print("\n| weights within ± | λ_1, before → after | mean λ, before → after | right |\n|---|---|---|---|")
    for within in dict.fromkeys(r["within"] for r in runs):
        mine = [r for r in runs if r["within"] == within]
        first, all_ = (
            " → ".join(f"{mean(r[when][i] for r in mine):.2f}" for when in ("before", "after")).replace("-", "−")
            for i in (0, 1)
        )
        right = [100 * r["right"] for r in mine]
        print(f"| {within:g} | {first} | {all_} | {mean(right):.1f} % ({min(right):.1f} to {max(right):.1f}) |")
    ranks = [np.argsort(np.argsort(v)) for v in ([-abs(r["after"][0]) for r in runs], [r["right"] for r in runs])]
    print(f"\nRank correlation of −|λ_1| after training and right answers: {np.corrcoef(*ranks)[0, 1]:.2f}")


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
