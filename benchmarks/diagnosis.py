"""Does the diagnosis say who learns, and does its plan make the others learn? A grid of small trainings, measured.

    python benchmarks/diagnosis.py run    --out grid [--budget 6]   # trains, diagnoses, cures; goes on where it stopped
    python benchmarks/diagnosis.py fit    --out grid                # the weights of interventions.chance
    python benchmarks/diagnosis.py report --out grid                # leave-one-kind-out: AUC, Brier, alarms, rescues

The grid: 9 kinds of task × 2 lags × 3 learning rates × half of 16 recurrent layers, the halves in turn; width and depth
alternate, one seed per run. Every run is trained for `UPDATES` updates of Adam on 2,048 samples, and has learnt when
its loss on unseen samples is below `LEARNT` of the way from the best constant answer down to the lowest loss that any
run of the same task and lag reached. It is diagnosed before training. Where the diagnosis has a plan, the run is
trained again with it, as long as before.

In the report the chance of each run comes from weights fitted without any run of its kind of task.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diagnosis_grid import KINDS, Run, grid
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import unvanish as uv
from unvanish.diagnosis import interventions
from unvanish.diagnosis.interventions.bar import best_constant
from unvanish.diagnosis.interventions.chance import HORIZON, Features
from unvanish.diagnosis.interventions.material import Rows
from unvanish.diagnosis.subject import Subject

UPDATES, BATCH = HORIZON, 32
TRAINED, JUDGED = 2048, 256
"""samples to train on, which the diagnosis is given too, and unseen ones that tell who has learnt"""
EVERY, ENOUGH = 50, 0.03
"""updates between two looks; share of the best constant's loss from which a training stops early, as it has learnt"""
LEARNT = 0.5
TOLD = 0.5
"""a chance below which a run counts as told that it will fail"""


def train(model: nn.Module, run: Run, bar: float, make: Callable[[nn.Module], torch.optim.Optimizer]) -> float:
    """The lowest loss on unseen samples, looked at every few updates."""
    loss = KINDS[run.kind].loss
    optimizer, lowest = make(model), math.inf
    x_v, y_v = run.samples(JUDGED, 1)
    x, y = run.samples(TRAINED, 2)
    order, batches = torch.Generator().manual_seed(run.seed), tuple[Tensor, ...]()
    for update in range(UPDATES):
        if update % (TRAINED // BATCH) == 0:
            batches = torch.randperm(TRAINED, generator=order).split(BATCH)
        at = batches[update % (TRAINED // BATCH)]
        value = loss(model(x[at]), y[at])
        optimizer.zero_grad()
        value.backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        if not bool(value.isfinite()) or not bool(norms.isfinite().all()):
            break
        optimizer.step()
        if (update + 1) % EVERY == 0:
            with torch.no_grad():
                now = float(loss(model(x_v), y_v))
            lowest = min(lowest, now if math.isfinite(now) else math.inf)
            if lowest < ENOUGH * bar:
                break
    return lowest


def bar_of(run: Run) -> float:
    """The loss of the best constant answer on the samples that a diagnosis is given."""
    x, y = run.samples(TRAINED, 2)
    found, _ = best_constant(Rows(Subject(run.build(), (x,), y, KINDS[run.kind].loss), TRAINED, 0), 0)
    if found is None:
        raise RuntimeError(f"{run.name}: has no best constant answer")
    return found.mean


def measure(run: Run, budget: float) -> dict[str, Any]:
    """Train, diagnose, and train again with the plan if there is one."""
    bar = bar_of(run)
    found: dict[str, Any] = {**asdict(run), "bar": bar}
    begun = time.process_time()
    found["lowest"] = train(run.build(), run, bar, lambda m: torch.optim.Adam(m.parameters(), lr=run.lr))
    found["seconds"] = time.process_time() - begun
    model, (x, y) = run.build(), run.samples(TRAINED, 2)
    subject = Subject(model, (x,), y, KINDS[run.kind].loss)
    begun = time.process_time()
    layers = uv.diagnose(model, x, y, loss=KINDS[run.kind].loss, budget=0).layers
    given = torch.optim.Adam(model.parameters(), lr=run.lr)
    told = interventions.run(subject, budget=budget, optimizer=given, layers=layers)
    found["diagnosis_seconds"] = time.process_time() - begun
    found["codes"] = [f.code for f in told.findings]
    found["features"] = None if told.features is None else astuple(told.features)
    found["plan"] = [step.says for step in told.plan.steps]
    found["cured"] = None
    if told.plan:
        names: dict[str, Any] = {"model": run.build()}
        exec(told.plan.code, names)  # as a reader would paste it
        found["cured"] = train(names["model"], run, bar, lambda _: names["optimizer"])
    return found


def run_grid(out: Path, runs: list[Run], budget: float) -> None:
    for number, run in enumerate(runs, 1):
        result = out / f"{run.name}.json"
        if result.exists():
            continue
        found = measure(run, budget)
        result.write_text(json.dumps(found))
        cured = "" if found["cured"] is None else f", {found['cured'] / found['bar']:.2f} with the plan"
        print(
            f"{number}/{len(runs)} {run.name:42} {found['lowest'] / found['bar']:.2f} of the bar, "
            f"{' '.join(found['codes']) or 'nothing proved'}{cured}; {found['seconds']:.1f} + "
            f"{found['diagnosis_seconds']:.1f} s",
            flush=True,
        )


def rows_of(out: Path, runs: list[Run]) -> list[dict[str, Any]]:
    """Every finished run, with whether it learnt, as it was and with the plan."""
    rows = [json.loads(p.read_text()) for run in runs if (p := out / f"{run.name}.json").exists()]
    for row in rows:
        same = [r for r in rows if (r["kind"], r["lag"]) == (row["kind"], row["lag"])]
        lowest = min(min(r["lowest"], r["cured"] or math.inf) for r in same)
        # A task that nobody has learnt, like the hopeless one, has no lowest loss to go by: then it is 0.
        floor = lowest if lowest < LEARNT * row["bar"] else 0.0
        threshold = floor + LEARNT * (row["bar"] - floor)
        row["learnt"] = row["lowest"] < threshold
        row["rescued"] = row["cured"] is not None and row["cured"] < threshold
    return [row for row in rows if row["features"] is not None]


def _weights(rows: list[dict[str, Any]]) -> tuple[float, ...]:
    learnt = [row["learnt"] for row in rows]
    if len(set(learnt)) < 2:
        raise SystemExit(f"the {len(rows)} runs to fit on all {'learn' if learnt[0] else 'fail'}; run more of the grid")
    fitted = LogisticRegression(C=3).fit([row["features"] for row in rows], learnt)
    return (float(fitted.intercept_[0]), *(float(w) for w in fitted.coef_[0]))


def fit(out: Path, runs: list[Run]) -> None:
    """The weights of `unvanish.diagnosis.interventions.chance`, from all runs."""
    rows = rows_of(out, runs)
    if not rows:
        raise SystemExit(f"no finished run in {out}")
    print(f"WEIGHTS = ({', '.join(f'{w:.2f}' for w in _weights(rows))})")


def report(out: Path, runs: list[Run]) -> None:
    """Per kind of task, with weights fitted on the other kinds alone."""
    rows = rows_of(out, runs)
    kinds = sorted({row["kind"] for row in rows})
    if len(kinds) < 2:
        raise SystemExit(f"expected finished runs of at least two kinds of task in {out}, found {len(kinds)}")
    for kind in kinds:
        weights = _weights([row for row in rows if row["kind"] != kind])
        for row in rows:
            if row["kind"] == kind:
                row["chance"] = Features(*row["features"]).chance(weights)
    print(f"{'kind':10} {'runs':>5} {'learn':>6} {'AUC':>6} {'Brier':>6} {'false plans':>15} {'rescued':>10}")
    for kind in [*kinds, "all"]:
        some = [row for row in rows if kind in (row["kind"], "all")]
        y, p = np.array([row["learnt"] for row in some]), np.array([row["chance"] for row in some])
        auc = f"{roc_auc_score(y, p):.3f}" if 0 < y.sum() < len(y) else "–"
        alarms = sum(row["learnt"] and bool(row["plan"]) for row in some)
        failed = [row for row in some if not row["learnt"] and row["chance"] < TOLD]
        told = [row for row in failed if row["plan"]]
        rescued = sum(row["rescued"] for row in told)
        print(
            f"{kind:10} {len(some):5} {y.sum():6} {auc:>6} {np.mean((p - y) ** 2):6.3f} {f'{alarms} of {y.sum()}':>15} "
            f"{f'{rescued} of {len(told)}':>10}"
        )
    curable = [row for row in rows if not row["learnt"] and row["kind"] != "coin"]
    print(f"failures of kinds that can be learnt: {len(curable)}, with a plan {sum(bool(r['plan']) for r in curable)}, "
          f"rescued {sum(r['rescued'] for r in curable)}")  # fmt: skip
    wrong = [row for row in rows if row["learnt"] and row["codes"] and row["codes"][0] == "not_learnable_from_input"]
    print(f"called not learnable though they learn: {len(wrong)}; hopeless ones called healthy: "
          f"{sum('healthy' in r['codes'] for r in rows if r['kind'] == 'coin')}")  # fmt: skip
    for what, key in (("a training", "seconds"), ("a diagnosis", "diagnosis_seconds")):
        taken = np.array([row[key] for row in rows])
        print(
            f"{what}: median {np.median(taken):.1f} s of one core, at most {taken.max():.1f} s, in all "
            f"{taken.sum() / 60:.0f} min"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "fit", "report"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds for the interventions of one run")
    parser.add_argument("--only", default="", help="runs whose name starts so")
    parser.add_argument("--every", type=int, default=1, help="only each n-th run of the grid")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [run for run in grid() if run.name.startswith(arguments.only)][:: arguments.every]
    if arguments.part == "run":
        run_grid(arguments.out, runs, arguments.budget)
    else:
        {"fit": fit, "report": report}[arguments.part](arguments.out, runs)


if __name__ == "__main__":
    main()
