"""Who learns what: long-lag tasks of the literature, all sides of a comparison under one budget.

    python benchmarks/tasks.py run    --out runs [--only adding-200] [--seconds 60]
    python benchmarks/tasks.py report --out runs          # the tables of benchmarks/README.md

`run` does the trainings that the folder lacks and appends each to PART.jsonl in it; with `--seconds` it starts no
further one after that time, and goes on with the next call. One thread: on two cores let two parts run side by side.
`--accelerator gpu` trains on a CUDA device.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from torch import Tensor

from unvanish.train.configuration import Machines, Optimizer, Schedule, TrainingConfiguration
from unvanish.train.fit import answers, evaluate, fit
from unvanish.train.models import SequenceModel, recipe
from unvanish.train.tasks import Task, make_task
from unvanish.train.tasks.reber import EmbeddedReber
from unvanish.train.tasks.task import Split


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    title: str
    cell: str
    hidden: int
    seeds: int = 3
    lr: float | None = None
    """where it is not the part's"""
    omega: float = 0.0
    """weight of Ω"""
    elman: bool = False

    def build(self, task: Task) -> SequenceModel:
        layer = recipe(self.cell).recurrent(task.inputs, self.hidden, task.length)
        return (Elman if self.elman else SequenceModel)(layer, task.outputs, task.answers)


class Elman(SequenceModel):
    """Elman's procedure: h_{t-1} is an input like any other, no error passes to the step before.

    The same as `tbptt=1`, all steps at once.
    """

    def step(self, x: Tensor, lengths: Tensor | None = None, hx: Any = None) -> tuple[Tensor, Any]:
        with torch.no_grad():
            states, final = self.recurrent(x, hx)
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
        again, _ = self.recurrent(x.flatten(0, 1).unsqueeze(1), before.flatten(0, 1).unsqueeze(0))
        return self.head(again.view_as(states)), final


@dataclass(frozen=True)
class Part:
    """A task, and what is compared on it."""

    task: str
    length: int | None
    sides: tuple[Side, ...]
    steps: int
    lr: float
    goal: float
    """share of the chance level below which the validation error counts as learnt; the grammar has the paper's goal,
    no wrong string in the training and test sets, and its figures are of the validation set"""
    batch: int = 32
    rounds: int = 20
    """validations along the way"""
    patience: int = 2
    """training stops when that many validations in a row reached the goal"""
    optimizer: Optimizer = "adam"
    schedule: Schedule = "constant"
    weight_decay: float = 0.0

    def configuration(self, side: Side, seed: int) -> TrainingConfiguration:
        return TrainingConfiguration(
            self.steps,
            self.batch,
            side.lr or self.lr,
            1.0,
            seed,
            every=self.steps // self.rounds,
            optimizer=self.optimizer,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            omega=side.omega,
        )


def sides(hidden: int, seeds: int, *cells: str) -> tuple[Side, ...]:
    return tuple(Side(recipe(cell).title, cell, hidden, seeds=seeds) for cell in cells)


LSTMS = ("lstm-chrono", "lstm-forget1", "rnn")
ORDER = (Side("tanh-RNN, clip", "rnn", 50), Side("tanh-RNN, clip + Ω", "rnn", 50, omega=1.0))
COPY = sides(128, 1, "lstm-forget1", "lstm-chrono")
REBER = (
    Side("forget-bias-1 LSTM", "lstm-forget1", 16, seeds=64),
    Side("Elman net, error one step back", "rnn", 24, seeds=2, elman=True),
    Side("tanh-RNN, error through the whole string", "rnn", 24, seeds=2),
)
MNIST = (
    Side("chrono LSTM", "lstm-chrono", 48, seeds=1, lr=1e-2),
    Side("IRNN", "irnn", 48, seeds=1),
    Side("tanh-RNN", "rnn", 48, seeds=1),
)
PARTS = {
    "adding-200": Part("adding", 200, sides(64, 2, *LSTMS), steps=1500, lr=1e-2, goal=0.06),
    "adding-400": Part("adding", 400, sides(64, 1, *LSTMS), steps=1500, lr=1e-2, goal=0.06),
    "adding-750": Part("adding", 750, sides(32, 1, *LSTMS), steps=1500, lr=1e-2, goal=0.06),
    "copy-200": Part("copy", 200, COPY, steps=10000, lr=1e-3, goal=0.5, rounds=40, optimizer="rmsprop"),
    "copy-500": Part("copy", 500, COPY, steps=10000, lr=1e-3, goal=0.5, rounds=40, optimizer="rmsprop"),
    "order-50": Part("temporal-order", 50, ORDER, steps=6000, lr=1e-3, goal=0.01 / 0.75, rounds=40),
    "order-100": Part("temporal-order", 100, ORDER, steps=6000, lr=1e-3, goal=0.01 / 0.75, rounds=40),
    "order-150": Part("temporal-order", 150, ORDER, steps=6000, lr=1e-3, goal=0.01 / 0.75, rounds=40),
    "reber": Part(
        "embedded-reber",
        None,
        REBER,
        steps=6000,
        lr=2e-2,
        goal=0.0,
        batch=8,
        rounds=120,
        patience=1,
        optimizer="adamw",
        schedule="cosine",
        weight_decay=0.1,
    ),
    "mnist": Part("mnist", None, MNIST, steps=1000, lr=1e-3, goal=0.0),
}


class StopAtGoal(lightning.Callback):
    """Ends the training once the validations say that the task is learnt; keeps the update at which they began to."""

    def __init__(self, reached: Callable[[float], bool], patience: int) -> None:
        self.reached, self.patience = reached, patience
        self.since: list[int] = []
        """validations in a row that say so"""

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.since = [*self.since, trainer.global_step] if self.reached(pl_module.progress.error[-1]) else []
        trainer.should_stop |= len(self.since) >= self.patience


def train(part: Part, side: Side, seed: int, accelerator: str) -> dict[str, Any]:
    """One training, and what came of it."""
    start = time.perf_counter()
    task = make_task(part.task, part.length, seed)
    torch.manual_seed(seed)
    model = side.build(task)
    found: dict[str, Any] = {
        "side": side.title,
        "seed": seed,
        "chance": task.chance,
        "parameters": sum(p.numel() for p in model.parameters()),
    }

    def reached(error: float) -> bool:
        if isinstance(task, EmbeddedReber):
            return not any(any(wrong_strings(model, task, split).values()) for split in ("train", "test"))
        return error < part.goal * task.chance

    stop = StopAtGoal(reached, part.patience)
    try:
        machines = Machines(accelerator=accelerator)
        progress = fit(model, task, part.configuration(side, seed), callbacks=[stop], machines=machines)
    except ArithmeticError as error:
        return found | {"failed": str(error), "test_error": math.inf, "learnt_at": None}
    found |= {
        "updates": progress.update,
        "errors": progress.error,
        "test_error": evaluate(model, task),
        "learnt_at": stop.since[0] if stop.since else None,
    }
    if isinstance(task, EmbeddedReber):
        found["wrong"] = wrong_strings(model, task, "validation")
    return found | {"seconds": round(time.perf_counter() - start, 1)}


@torch.no_grad()
def wrong_strings(model: SequenceModel, task: EmbeddedReber, split: Split) -> dict[str, int]:
    """Strings with a wrong prediction of the long-range symbol, and with any other wrong one."""
    was_training = model.training
    judged = [task.wrong(answer, y) for answer, y in answers(model, task, split)]
    model.train(was_training)
    long_range, other = (torch.cat(parts) for parts in zip(*judged, strict=True))
    return {"long_range": int(long_range.sum()), "other": int(other.sum())}


def read(out: Path, name: str) -> list[dict[str, Any]]:
    path = out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(out: Path, names: list[str], seconds: float, accelerator: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for name in names:
        part = PARTS[name]
        done = {(found["side"], found["seed"]) for found in read(out, name)}
        for seed in range(max(side.seeds for side in part.sides)):
            for side in part.sides:
                if seed >= side.seeds or (side.title, seed) in done:
                    continue
                if time.perf_counter() - start > seconds:
                    return
                found = train(part, side, seed, accelerator)
                with (out / f"{name}.jsonl").open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(
                    f"{name} {side.title} seed {seed}: {found['test_error']:.4g}, at {found['learnt_at']}", flush=True
                )
    print("all done", flush=True)


def report(out: Path, names: list[str]) -> None:
    """One table for all tasks but the grammar, and one for it."""
    print("| task | model | test error, median (worst) | chance | learnt | after updates, median |")
    print("|---|---|---|---|---|---|")
    for name in names:
        part, runs = PARTS[name], read(out, name)
        for side, mine in by_side(part, runs):
            if part.task == "embedded-reber":
                continue
            errors = [found["test_error"] for found in mine]
            cells = [name, side.title, f"{median(errors):.4f} ({max(errors):.4f})", f"{mine[0]['chance']:.4f}"]
            print_row(*cells, *(learnt(mine) if part.goal else ("", "")))
    if "reber" not in names:
        return
    print("\n| model | weights | learnt | after updates, median | strings wrong at the long-range symbol | elsewhere |")
    print("|---|---|---|---|---|---|")
    for side, mine in by_side(PARTS["reber"], read(out, "reber")):
        shares = [sum(found["wrong"][where] for found in mine) / (256 * len(mine)) for where in ("long_range", "other")]
        print_row(side.title, mine[0]["parameters"], *learnt(mine), *(f"{share:.1%}" for share in shares))


def by_side(part: Part, runs: list[dict[str, Any]]) -> list[tuple[Side, list[dict[str, Any]]]]:
    """The runs of each side that has some."""
    found = [(side, [run for run in runs if run["side"] == side.title]) for side in part.sides]
    return [(side, mine) for side, mine in found if mine]


def learnt(runs: list[dict[str, Any]]) -> tuple[str, str]:
    at = [run["learnt_at"] for run in runs if run["learnt_at"] is not None]
    return f"{len(at)} of {len(runs)}", f"{median(at):g}" if at else "–"


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--accelerator", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "run":
        run(given.out, given.only, given.seconds, given.accelerator)
    else:
        report(given.out, given.only)


if __name__ == "__main__":
    main()
