"""Does the diagnosis say who learns, and do its cures make them learn? A grid of small trainings, measured.

    python benchmarks/diagnosis.py train  --out grid      # trains every run of the grid; goes on where it stopped
    python benchmarks/diagnosis.py judge  --out grid      # diagnoses every run before training and after the warm-up
    python benchmarks/diagnosis.py cure   --out grid      # trains the failed runs again after the first prescription
    python benchmarks/diagnosis.py report --out grid      # AUC, calibration, cures, false alarms

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

import unvanish as uv
from unvanish.train.models import RECIPES, SequenceModel
from unvanish.train.tasks import Task, make_task

CELLS = ("rnn", "rnn-orthogonal", "irnn", "gru", "gru-chrono", "lstm", "lstm-forget1", "lstm-chrono")
LENGTHS = {"adding": (30, 100), "delayed-recall": (40, 120), "temporal-order": (30, 80), "copy": (10, 40)}
UPDATES, WARM_UP, BATCH, LR, CLIP = 500, 25, 32, 3e-3, 1.0
LEARNT = 0.5
"""of the chance level"""


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
    def held_out(self) -> bool:
        return hashlib.sha256(self.name.encode()).digest()[0] % 2 == 1

    def make_task(self) -> Task:
        return make_task(self.task, self.length, self.seed)

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
        yield Run(cell, depth, (24, 48)[(number // 8 + number) % 2], task, LENGTHS[task][which], 1000 + number)


def train(model: nn.Module, task: Task, at: dict[int, Callable[[], None]] | None = None) -> list[float]:
    """Validation errors along the way."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    x_v, y_v = task.samples("validation", range(256))
    errors = []
    for update in range(UPDATES):
        if at is not None and update in at:
            at[update]()
        x, y = task.samples("train", range(update * BATCH, (update + 1) * BATCH))
        loss = task.loss(model(x), y)
        if not loss.isfinite():
            return [*errors, float("inf")]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if (update + 1) % 25 == 0:
            with torch.no_grad():
                errors.append(float(task.error(model(x_v), y_v)))
    return errors


def learnt(errors: list[float], chance: float) -> bool:
    return sum(errors[-3:]) / 3 < LEARNT * chance


def run_grid(out: Path) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    for run in grid():
        result = out / f"{run.name}.json"
        if result.exists():
            continue
        task = run.make_task()
        model = run.build(task)

        def keep(when: str, model: nn.Module = model, run: Run = run) -> None:
            save_file({k: v.clone() for k, v in model.state_dict().items()}, out / f"{run.name}.{when}.safetensors")

        keep("start")
        errors = train(model, task, {WARM_UP: lambda keep=keep: keep("warm")})
        found = {**asdict(run), "errors": errors, "chance": task.chance, "learnt": learnt(errors, task.chance)}
        result.write_text(json.dumps(found))
        print(
            f"{run.name:44} {'learns' if found['learnt'] else 'fails '} {errors[-1] / task.chance:.2f} of chance",
            flush=True,
        )


def judge(out: Path) -> None:
    """The diagnosis of every run, before training and after the warm-up."""
    from safetensors.torch import load_file

    for run in grid():
        result = out / f"{run.name}.judged.json"
        if result.exists():
            continue
        task, found = run.make_task(), {}
        for when in ("start", "warm"):
            model = run.build(task)
            model.load_state_dict(load_file(out / f"{run.name}.{when}.safetensors"))
            x, y = task.samples("validation", range(64))
            start = time.perf_counter()
            diagnosis = uv.diagnose(model, x, y, loss=task.loss)
            layers = [{**asdict(d), "curve": None} for d in diagnosis.values()]
            cure = next((p.cure for p in diagnosis.prescriptions if p.act is not None), None)
            found[when] = {"layers": layers, "cure": cure, "seconds": time.perf_counter() - start}
        result.write_text(json.dumps(found))
        print(f"{run.name:44} {found['start']['layers'][0]['verdict']:10} {found['start']['cure']}", flush=True)


def cure(out: Path) -> None:
    """Every run that failed and was told why: the first prescription, the same budget."""
    for run in grid():
        result = out / f"{run.name}.cured.json"
        outcome = json.loads((out / f"{run.name}.json").read_text())
        told = json.loads((out / f"{run.name}.judged.json").read_text())["start"]["cure"]
        if result.exists() or outcome["learnt"] or told is None:
            continue
        task = run.make_task()
        model = run.build(task)
        x, y = task.samples("validation", range(64))
        first = next(p for p in uv.diagnose(model, x, y, loss=task.loss).prescriptions if p.act is not None)
        model = first.apply(model)
        errors = train(model, task)
        found = {"cure": first.cure, "learnt": learnt(errors, task.chance), "errors": errors}
        result.write_text(json.dumps(found))
        print(f"{run.name:44} {first.cure:45} {'learns' if found['learnt'] else 'fails'}", flush=True)


def report(out: Path) -> None:
    """Everything on the design half and on the held-out half."""
    rows = [_row(out, run) for run in grid()]
    judges = {}
    for when in ("start", "warm"):
        design = [row for row in rows if not row["held_out"]]
        judges[when] = LogisticRegression().fit([[row[when]] for row in design], [row["learnt"] for row in design])
    for half in (False, True):
        some = [row for row in rows if row["held_out"] == half]
        print(f"\n{'held-out' if half else 'design'} half: {len(some)} runs, {sum(r['learnt'] for r in some)} learn")
        for when in ("start", "warm"):
            y, score = [row["learnt"] for row in some], [row[when] for row in some]
            keys = dict.fromkeys((row["task"], row["length"]) for row in some)
            groups = [[row for row in some if (row["task"], row["length"]) == key] for key in keys]
            groups = [group for group in groups if len({row["learnt"] for row in group}) == 2]
            within = [roc_auc_score([r["learnt"] for r in g], [r[when] for r in g]) for g in groups]
            p = judges[when].predict_proba([[v] for v in score])[:, 1]
            print(f"  {when}: AUC {roc_auc_score(y, score):.2f} overall; within task and length {np.mean(within):.2f} "
                  f"over {len(within)} groups that both learn and fail; Brier {np.mean((p - y) ** 2):.3f} "
                  f"(base rate {np.mean((np.mean(y) - y) ** 2):.3f})")  # fmt: skip
            for low in (0.0, 0.25, 0.5, 0.75):
                inside = [yy for yy, pp in zip(y, p, strict=True) if low <= pp < low + 0.25]
                if inside:
                    print(f"    predicted {low:.2f}–{low + 0.25:.2f}: {np.mean(inside):.2f} learnt of {len(inside)}")
        cured = [row["cured"] for row in some if row["cured"] is not None]
        told = [row for row in some if row["learnt"] and row["told"]]
        learning = [row for row in some if row["learnt"]]
        print(f"  cure: {sum(cured)} of {len(cured)} failed runs learn after the first prescription")
        print(f"  false alarms: {len(told)} of {len(learning)} learning runs were told to change")
    print(f"\nslowest diagnosis {max(row['seconds'] for row in rows):.1f} s")


def _row(out: Path, run: Run) -> dict[str, Any]:
    outcome = json.loads((out / f"{run.name}.json").read_text())
    judged = json.loads((out / f"{run.name}.judged.json").read_text())
    cured = out / f"{run.name}.cured.json"
    # The worst layer's survival at the lag, in nats; what is below e⁻²⁰ is all the same to a training in float32.
    survival = {
        when: max(-20.0, min(math.log(max(layer["evidence"]["survival"], 1e-300)) for layer in judged[when]["layers"]))
        for when in ("start", "warm")
    }
    return {
        **{k: outcome[k] for k in ("task", "length", "learnt")},
        **survival,
        "held_out": run.held_out,
        "told": judged["start"]["cure"] is not None,
        "cured": json.loads(cured.read_text())["learnt"] if cured.exists() else None,
        "seconds": max(judged[when]["seconds"] for when in judged),
    }


def main() -> None:
    parts = {"train": run_grid, "judge": judge, "cure": cure, "report": report}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    parts[arguments.part](arguments.out)


if __name__ == "__main__":
    main()
