"""The tables and the picture of `cures.py`."""

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cures_trial import CELLS, CURES, LAGS, RATES, SEEDS, TASKS, Case, refusals


def case_of(found: dict[str, Any]) -> Case:
    return Case(*(found[name] for name in Case._fields))


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    middle, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (middle - spread) / (n + z * z), (middle + spread) / (n + z * z)


def by_treatment(runs: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(cell, cure, its trainings)"""
    for cell, cure in product(CELLS, CURES):
        mine = [r for r in runs if (r["cell"], r["cure"]) == (cell, cure)]
        if mine:
            yield cell, cure, mine


def report(runs: list[dict[str, Any]]) -> None:
    """Tables per cell, the refusals, and how long the whole grid takes."""
    plain = {case_of(r)[:5]: r for r in runs if r["cure"] == "as it is"}
    rows: dict[str, list[tuple[float, str]]] = {cell: [] for cell in CELLS}
    for cell, cure, mine in by_treatment(runs):
        learnt = [r["learnt_at"] for r in mine if r["learnt_at"] is not None]
        k, n = len(learnt), len(mine)
        low, high = wilson(k, n)
        pairs = [(plain[case_of(r)[:5]]["learnt_at"], r["learnt_at"]) for r in mine if case_of(r)[:5] in plain]
        rescued = sum(was is None and now is not None for was, now in pairs)
        harmed = sum(was is not None and now is None for was, now in pairs)
        before, after = ([r[key] for r in mine if r[key] is not None] for key in ("reach_before", "reach_after"))
        shown = [
            cure,
            f"{k} of {n}",
            f"{low:.2f} to {high:.2f}",
            "" if cure == "as it is" else f"{rescued} / {harmed}",
            f"{median(learnt):g}" if learnt else "–",
            f"{median(before):g} → {median(after):g}" if after else "–",
            str(sum(r["diverged"] for r in mine)),
            f"{median(r['seconds'] for r in mine):.1f}",
        ]
        rows[cell].append((k / n, f"| {' | '.join(shown)} |"))
    for cell, found in rows.items():
        print(f"\n**{cell}**\n")
        print("| cure | learnt | 95 % | rescued / harmed | updates | reach, before → after | diverged | CPU s |")
        print("|---|---|---|---|---|---|---|---|")
        print("\n".join(line for _, line in sorted(found, key=lambda pair: -pair[0])))
    print("\nRefused:\n")
    for cell in CELLS:
        print(f"- {cell}: {', '.join(cure for cure in CURES if (cell, cure) in refusals())}")
    print(f"\n{len(runs)} trainings, {sum(r['seconds'] for r in runs) / 60:.0f} min")
    print(f"the whole grid on 2 cores: {hours(runs):.1f} h")


def hours(runs: list[dict[str, Any]], cores: int = 2) -> float:
    """Of the whole grid: each training takes the median of the CPU time of its cell, cure and lag here; at a lag that
    was not run, that of all lags in proportion."""
    total = 0.0
    for _, _, mine in by_treatment(runs):
        for lag in LAGS:
            same = [r["seconds"] for r in mine if r["lag"] == lag]
            one = median(same) if same else lag * median(r["seconds"] / r["lag"] for r in mine)
            total += one * len(TASKS) * len(RATES) * len(SEEDS)
    return total / 3600 / cores


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Percentage learnt, cure × (cell, task), as wide as a page of the documentation; grey: the cure does not fit."""
    from matplotlib import pyplot as plt  # a figure is asked for: only then is it loaded

    names = [cure for cure in CURES if any(r["cure"] == cure for r in runs)]
    columns = list(product(CELLS, TASKS))
    share = torch.full((len(names), len(columns)), math.nan)
    for (i, cure), (j, (cell, task)) in product(enumerate(names), enumerate(columns)):
        mine = [r for r in runs if (r["cell"], r["task"], r["cure"]) == (cell, task, cure)]
        if mine:
            share[i, j] = sum(r["learnt_at"] is not None for r in mine) / len(mine)
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "cures"})
    figure, axes = plt.subplots(figsize=(7.4, 8.2), layout="constrained")
    axes.set_facecolor("#eeeeee")
    axes.pcolormesh(share, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
    for i, j in (share == share).nonzero().tolist():
        value = float(share[i, j])
        axes.text(
            j + 0.5,
            i + 0.5,
            f"{value:.0%}".removesuffix("%"),
            ha="center",
            va="center",
            fontsize=7.5,
            color="black" if value > 0.6 else "white",
        )
    axes.set_yticks([i + 0.5 for i in range(len(names))], names, fontsize=8)
    axes.set_xticks([j + 0.5 for j in range(len(columns))], [task for _, task in columns], rotation=60, ha="right")
    axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()
    for n, cell in enumerate(CELLS):
        axes.text((n + 0.5) * len(TASKS), -0.3, cell, ha="center", fontweight="bold")
        axes.axvline(n * len(TASKS), color="white", linewidth=4)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=170)
