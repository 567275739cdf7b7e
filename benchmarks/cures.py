"""Which cure helps which cell, on which kind of long-lag task: every cure of `unvanish.cures`, each alone.

    python benchmarks/cures.py run [FILE.csv] [--reduced] [--workers 2] [--seconds 600]
    python benchmarks/cures.py report [FILE.csv] [--reduced] [--picture docs/pictures/cures.png]

`run` does the trainings that FILE.csv lacks, one line each, and goes on where it was stopped; without FILE it extends
the published ones, benchmarks/cures.csv. The grid is walked in blocks of one lag, learning rate and seed, each with
every cell, cure and task, so that a part of the grid is balanced; `--reduced` is the first block.
"""

import argparse
import csv
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from cures_report import case_of, draw, report
from cures_trial import CELLS, CURES, LAGS, RATES, SEEDS, TASKS, Case, material, refusals, train


def grid(blocks: int | None = None) -> list[Case]:
    """All trainings, block by block; a cure that refuses a cell is left out."""
    # Neighbours differ in all three, so that a part of the grid is spread over lags, rates and seeds.
    count = len(SEEDS) * len(LAGS) * len(RATES)
    settings = [(SEEDS[(i // 6 + i) % 3], LAGS[i % 3], RATES[i % 2]) for i in range(count)][:blocks]
    return [
        Case(lag, rate, seed, task, cell, cure)
        for seed, lag, rate in settings
        for task, cell, cure in product(TASKS, CELLS, CURES)
        if (cell, cure) not in refusals()
    ]


PUBLISHED = Path(__file__).with_suffix(".csv")
FOUND = ("learnt_at", "diverged", "reach_before", "reach_after", "seconds")
HEADER = (*Case._fields, *FOUND)


def read(path: Path) -> list[dict[str, Any]]:
    """The trainings in the file; a last line that was cut off is dropped from it."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        path.write_bytes(content[:whole])
    return [_parsed(row) for row in csv.DictReader(content[:whole].decode().splitlines())]


def _parsed(row: dict[str, str]) -> dict[str, Any]:
    case = Case(int(row["lag"]), float(row["rate"]), int(row["seed"]), row["task"], row["cell"], row["cure"])._asdict()
    whole = {name: int(row[name]) if row[name] else None for name in ("learnt_at", "reach_before", "reach_after")}
    return case | whole | {"diverged": row["diverged"] == "1", "seconds": float(row["seconds"])}


def write(path: Path, found: dict[str, Any]) -> None:
    """Append a training."""
    found = {**found, "diverged": int(found["diverged"])}
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow([found[name] for name in HEADER])


def run_group(path: Path, cases: list[Case], until: float) -> list[str]:
    """Trainings on the same samples, each written as soon as it is done; stops at that time of day."""
    torch.set_num_threads(1)
    done = []
    for case in cases:
        if time.time() > until:
            break
        write(path, train(case))
        done.append(case.cure)
    material.cache_clear()
    return done


def run(path: Path, cases: list[Case], workers: int, seconds: float) -> None:
    if not path.exists():
        path.write_text(",".join(HEADER) + "\n")
    done = {case_of(found) for found in read(path)}
    missing = [case for case in cases if case not in done]
    groups = [list(group) for _, group in groupby(missing, key=lambda case: case[:5])]
    start, finished = time.time(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = [pool.submit(run_group, path, group, start + seconds) for group in groups]
        for future in as_completed(running):
            finished += len(future.result())
            took = time.time() - start
            left = took / max(finished, 1) * (len(missing) - finished)
            print(
                f"\r{len(done) + finished} of {len(cases)} trainings, {took:.0f} s, about {left / 60:.0f} min left  ",
                end="",
                file=sys.stderr,
                flush=True,
            )
    print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("file", type=Path, nargs="?", default=PUBLISHED)
    parser.add_argument("--reduced", action="store_true", help="the first block of the grid")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no training after that")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    cases = grid(1 if given.reduced else None)
    if given.what == "run":
        run(given.file, cases, given.workers, given.seconds)
        return
    wanted = set(cases)
    runs = [found for found in read(given.file) if case_of(found) in wanted]
    if not runs:
        parser.error(f"FILE: {given.file} holds no trainings; do `run` first")
    report(runs)
    if given.picture is not None:
        draw(runs, given.picture)


if __name__ == "__main__":
    main()
