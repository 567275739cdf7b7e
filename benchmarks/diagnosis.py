"""Does the diagnosis say who learns, and do its cures make them learn? A grid of small trainings, measured.

    python benchmarks/diagnosis.py train  --out grid --half design   # trains the runs; goes on where it stopped
    python benchmarks/diagnosis.py judge  --out grid --half design   # diagnoses them before training and after 5 %
    python benchmarks/diagnosis.py fit    --out grid                 # the weights of unvanish.diagnosis.trial
    python benchmarks/diagnosis.py cure   --out grid --half design   # trains again after the first prescription
    python benchmarks/diagnosis.py report --out grid                 # AUC, calibration, cures, false alarms

The grid: 8 recipes × depth 1, 2 × 4 tasks × 2 lengths, the width alternating, one seed per run. Half of it, by a hash
of the run's name, is to design on; the other half is looked at once. A run has learnt when the mean of its last three
validation errors is below half of chance.
"""

import argparse
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import unvanish as uv
from unvanish.train.models import RECIPES, SequenceModel
from unvanish.train.tasks import Task, make_task
from unvanish.train.tasks.base import Generated, Samples, Split, as_float

CELLS = ("rnn", "rnn-orthogonal", "irnn", "gru", "gru-chrono", "lstm", "lstm-forget1", "lstm-chrono")
LENGTHS = {"adding": (20, 50), "delayed-recall": (30, 80), "temporal-order": (20, 60), "copy": (10, 30)}
UPDATES, WARM_UP, BATCH, LR, CLIP = 600, 30, 32, 3e-3, 1.0
MEASURED_AT = (100, 200, 300, 400, 500, 550, 600)
JUDGED = range(256, 768)
"""validation samples that a diagnosis is given; the 256 before them tell who has learnt"""
LEARNT = 0.5
"""of the chance level"""


class ShortCopy(Generated):
    """Copy memory small enough for the budget: two symbols out of eight, blanks, a go signal; only the two answers
    count."""

    name = "copy"
    title = "Copy of two symbols"
    describe = "Two symbols are shown; after a blank delay they are to be repeated."
    source = "after Arjovsky, Shah & Bengio 2016, §5.1"
    kind = "prediction"
    default_length = 10
    inputs, outputs, answers = 10, 8, 2
    chance = math.log(8)
    solved_below = chance / 10

    def samples(self, split: Split, indices: Sequence[int]) -> Samples:
        words = np.stack([self.generator(split, index).integers(8, size=2) for index in indices])
        symbols = np.full((len(indices), self.length + 4), 8)
        symbols[:, :2], symbols[:, self.length + 1] = words, 9
        return as_float(np.eye(10, dtype=np.float32)[symbols]), torch.as_tensor(words)


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    cell: str
    depth: int
    width: int
    task: str
    length: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.length}-{self.cell}-{self.depth}x{self.width}"

    @property
    def half(self) -> str:
        return ("design", "held-out")[hashlib.sha256(f"{self.name}-{self.seed}".encode()).digest()[0] % 2]

    def make_task(self) -> Task:
        return ShortCopy(self.length) if self.task == "copy" else make_task(self.task, self.length)

    def build(self, task: Task) -> SequenceModel:
        torch.manual_seed(self.seed)
        recipe = RECIPES[self.cell]
        options = {} if recipe.nonlinearity is None else {"nonlinearity": recipe.nonlinearity}
        layer = recipe.layer(task.inputs, self.width, num_layers=self.depth, batch_first=True, **options)
        if recipe.prepare is not None:
            recipe.prepare(layer, task.length)
        return SequenceModel(layer, task.outputs, task.answers)


def grid() -> Iterator[Run]:
    points = itertools.product(LENGTHS, (0, 1), (1, 2), CELLS)
    for number, (task, which, depth, cell) in enumerate(points):
        yield Run(cell, depth, (24, 48)[(number // 8 + number) % 2], task, LENGTHS[task][which], 2000 + number)


@cache
def batches(task: str, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every run of a task sees the same samples: (x, y) to train on, (x, y) to validate."""
    made = Run("", 0, 0, task, length, 0).make_task()
    return *made.samples("train", range(UPDATES * BATCH)), *made.samples("validation", range(256))


def train(model: nn.Module, run: Run, keep: Any = None) -> list[float]:
    """Validation errors at `MEASURED_AT`; `keep()` is called after the warm-up."""
    task = run.make_task()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    x, y, x_v, y_v = batches(run.task, run.length)
    errors = []
    for update in range(UPDATES):
        if keep is not None and update == WARM_UP:
            keep()
        now = slice(update * BATCH, (update + 1) * BATCH)
        loss = task.loss(model(x[now]), y[now])
        if not loss.isfinite():
            return [*errors, float("inf")]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if update + 1 in MEASURED_AT:
            with torch.no_grad():
                errors.append(float(task.error(model(x_v), y_v)))
    return errors


def learnt(errors: list[float], chance: float) -> bool:
    return sum(errors[-3:]) / 3 < LEARNT * chance


def run_grid(out: Path, runs: list[Run]) -> None:
    from safetensors.torch import save_file

    for run in runs:
        result = out / f"{run.name}.json"
        if result.exists():
            continue
        task = run.make_task()
        model = run.build(task)

        def keep(when: str = "warm", model: nn.Module = model, run: Run = run) -> None:
            save_file({k: v.clone() for k, v in model.state_dict().items()}, out / f"{run.name}.{when}.safetensors")

        keep("start")
        begun = time.process_time()
        errors = train(model, run, keep)
        found = {**asdict(run), "errors": errors, "chance": task.chance, "learnt": learnt(errors, task.chance)}
        found["seconds"] = time.process_time() - begun
        result.write_text(json.dumps(found))
        print(
            f"{run.name:44} {'learns' if found['learnt'] else 'fails '} {errors[-1] / task.chance:.2f} of chance, "
            f"{found['seconds']:.1f} s",
            flush=True,
        )


def judge(out: Path, runs: list[Run]) -> None:
    """The diagnosis of every run, before training and after the warm-up."""
    from safetensors.torch import load_file

    for run in runs:
        result = out / f"{run.name}.judged.json"
        if result.exists():
            continue
        task, found = run.make_task(), {}
        x, y = task.samples("validation", JUDGED)
        for when in ("start", "warm"):
            model = run.build(task)
            model.load_state_dict(load_file(out / f"{run.name}.{when}.safetensors"))
            begun = time.process_time()
            diagnosis = uv.diagnose(model, x, y, loss=task.loss, trial=True, lr=LR)
            told = time.process_time()
            first = next((p.cure for p in diagnosis.prescriptions if p.act is not None), None)
            found[when] = {
                "survival": min(d.evidence["median_survival"] for d in diagnosis.values()),
                "readable": diagnosis.readable,
                "chance": diagnosis.chance,
                "cure": first,
                "seconds": told - begun,
                "cure_seconds": time.process_time() - told,
            }
        result.write_text(json.dumps(found))
        start = found["start"]
        print(f"{run.name:44} {start['chance']:.2f} {start['cure']}, {start['seconds']:.1f} s", flush=True)


def cure(out: Path, runs: list[Run]) -> None:
    """Every run that failed and was told so: the first prescription, the same budget."""
    for run in runs:
        result = out / f"{run.name}.cured.json"
        outcome = json.loads((out / f"{run.name}.json").read_text())
        told = json.loads((out / f"{run.name}.judged.json").read_text())["start"]["cure"]
        if result.exists() or outcome["learnt"] or told is None:
            continue
        task = run.make_task()
        model = run.build(task)
        x, y = task.samples("validation", JUDGED)
        diagnosis = uv.diagnose(model, x, y, loss=task.loss, trial=True, lr=LR)
        first = next(p for p in diagnosis.prescriptions if p.act is not None)
        model = first.apply(model)
        errors = train(model, run)
        found = {"cure": first.cure, "learnt": learnt(errors, task.chance), "errors": errors}
        result.write_text(json.dumps(found))
        print(f"{run.name:44} {first.cure:45} {'learns' if found['learnt'] else 'fails'}", flush=True)


def report(out: Path, runs: list[Run]) -> None:
    """Everything on the runs chosen, by the chance that the library gives."""
    rows = [_row(out, run) for run in runs]
    y = np.array([row["learnt"] for row in rows])
    print(f"{len(rows)} runs, {y.sum()} learn")
    tasks = [row["task"] for row in rows]
    groups = [(row["task"], row["length"]) for row in rows]
    rates = np.array([y[[other == task for other in tasks]].mean() for task in tasks])
    base, by_task = np.mean((y.mean() - y) ** 2), np.mean((rates - y) ** 2)
    print(f"Brier score of the base rate {base:.3f}, of each task's {by_task:.3f}")
    for when in ("start", "warm"):
        p, survival, readable = (np.array([row[when][k] for row in rows]) for k in ("chance", "survival", "readable"))
        inside = [np.array([group == key for group in groups]) for key in dict.fromkeys(groups)]
        within = [roc_auc_score(y[at], p[at]) for at in inside if 0 < y[at].sum() < at.sum()]
        print(f"  {when}: AUC {roc_auc_score(y, p):.2f}, by survival alone {roc_auc_score(y, survival):.2f}, by "
              f"readability alone {roc_auc_score(y, readable):.2f}; Brier {np.mean((p - y) ** 2):.3f}")  # fmt: skip
        print(f"    within task and length {np.mean(within):.2f} over {len(within)} groups that both learn and fail")
        for low in (0.0, 0.25, 0.5, 0.75):
            at = (p >= low) & (p < low + 0.25)
            if at.any():
                print(f"    chance {low:.2f}–{low + 0.25:.2f}: {y[at].mean():.2f} learnt of {at.sum()}")
    failed = [row for row in rows if not row["learnt"]]
    told = [row for row in failed if row["start"]["cure"] is not None]
    print(f"  cure: {sum(row['cured'] for row in told)} of {len(told)} failed runs with a prescription learn after it; "
          f"{len(failed)} failed, {sum(row['start']['chance'] < 0.5 for row in failed)} predicted to")  # fmt: skip
    alarms = [row for row in rows if row["learnt"] and row["start"]["cure"] is not None]
    print(f"  false alarms: {len(alarms)} of {y.sum()} learning runs were told to change")
    for what, key in (("a diagnosis", "seconds"), ("trying the cures", "cure_seconds")):
        taken = np.array([row[when][key] for row in rows for when in ("start", "warm")])
        print(f"  {what}: median {np.median(taken):.2f} s of one core, {(taken < 2).mean():.0%} of {len(taken)} under "
              f"2 s, at most {taken.max():.1f} s")  # fmt: skip


def fit(out: Path, runs: list[Run]) -> None:
    """The weights of `unvanish.diagnosis.trial`, from the design half alone."""
    rows = [_row(out, run) for run in runs if run.half == "design"]
    x = [
        (row[w]["readable"], math.log(min(1.0, max(row[w]["survival"], math.exp(-20)))))
        for row in rows
        for w in ("start", "warm")
    ]
    fitted = LogisticRegression(C=3).fit(x, [row["learnt"] for row in rows for _ in ("start", "warm")])
    print(f"WEIGHTS = ({fitted.intercept_[0]:.2f}, {fitted.coef_[0][0]:.2f}, {fitted.coef_[0][1]:.2f})")


def _row(out: Path, run: Run) -> dict[str, Any]:
    outcome = json.loads((out / f"{run.name}.json").read_text())
    judged = json.loads((out / f"{run.name}.judged.json").read_text())
    cured = out / f"{run.name}.cured.json"
    return {
        **{k: outcome[k] for k in ("task", "length", "learnt")},
        **judged,
        "cured": json.loads(cured.read_text())["learnt"] if cured.exists() else None,
    }


def main() -> None:
    parts = {"train": run_grid, "judge": judge, "fit": fit, "cure": cure, "report": report}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--half", choices=["design", "held-out"], help="[default: both]")
    parser.add_argument("--only", default="", help="runs whose name starts so")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [r for r in grid() if arguments.half in (None, r.half) and r.name.startswith(arguments.only)]
    parts[arguments.part](arguments.out, runs)


if __name__ == "__main__":
    main()
