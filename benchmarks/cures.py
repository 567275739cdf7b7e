"""Which cure helps which cell, on which kind of long-lag task: every cure of `unvanish.cures`, each alone.

    python benchmarks/cures.py run FILE.jsonl [--reduced] [--workers 2] [--seconds 600]
    python benchmarks/cures.py report FILE.jsonl [--reduced] [--picture docs/pictures/cures.png]

`run` does the trainings that FILE.jsonl lacks, one line each, and goes on where it was stopped. The grid is walked in
blocks of one lag, learning rate and seed, each with every cell, cure and task, so that a part of the grid is balanced;
`--reduced` is the first block. A cure that refuses a cell is recorded with its reason and counts as no training.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import groupby, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import unvanish as uv
from unvanish import cures, flow
from unvanish import nn as layers
from unvanish.train.models import SequenceModel
from unvanish.train.tasks import Task, make_task

HIDDEN, BATCH, UPDATES, EVERY, JUDGED = 32, 32, 600, 25, 256
GOAL = 0.5
"""share of the best constant answer's error; below it in two validations in a row a task counts as learnt"""
TASKS = ("adding", "temporal-order", "delayed-recall", "digits-padded", "noise-free")
LAGS, RATES, SEEDS = (50, 25, 100), (1e-2, 3e-3), (0, 1, 2)
CELLS: dict[str, Callable[..., Any]] = {
    "LSTM": layers.LSTM,
    "GRU": layers.GRU,
    "tanh-RNN": layers.RNN,
    "IndRNN": partial(layers.Recurrent, uv.cells.ZOO["indrnn"]()),
}


class Case(NamedTuple):
    """One training of the grid."""

    lag: int
    rate: float
    seed: int
    task: str
    cell: str
    cure: str


class Trial:
    """A model, and what a cure changes about its training."""

    def __init__(self, case: Case, task: Task, x: Tensor) -> None:
        torch.manual_seed(case.seed)
        self.case, self.task, self.x = case, task, x[:BATCH]
        self.layer = CELLS[case.cell](task.inputs, HIDDEN, batch_first=True)
        self.model = SequenceModel(self.layer, task.outputs, task.answers)
        self.helper: nn.Module | None = None
        """trained along"""
        self.around: AbstractContextManager[Any] = nullcontext()
        """in which a training pass runs"""
        self.states: Callable[[Tensor], Tensor] = lambda x: self.model.recurrent(x)[0]
        self.auxiliary: Callable[[Tensor, Tensor], Tensor] | None = None
        """of (states, x), added to the loss"""
        self.after_backward: Callable[[], Any] = lambda: None
        self.with_optimizer: Callable[[torch.optim.Optimizer], Any] = lambda optimizer: None

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        states = self.states(x)
        task, read = self.task, states[:, -1] if self.task.answers == 1 else states[:, -self.task.answers :]
        loss = task.loss(self.model.head(read), y)
        return loss if self.auxiliary is None else loss + self.auxiliary(states, x)

    def pretrain(self, penalty: Callable[[Tensor], Tensor], updates: int) -> None:
        """On inputs alone."""
        optimizer = torch.optim.Adam(self.layer.parameters(), lr=3e-3)
        for _ in range(updates):
            optimizer.zero_grad()
            penalty(self.x[:8]).backward()
            optimizer.step()


def clipper(trial: Trial) -> None:
    trial.after_backward = cures.GradientClipper(trial.model.parameters(), quantile=0.5, maximum=1.0).clip_


def carry_rate(trial: Trial) -> None:
    cures.carry_bias.carry_biases(trial.model, "CarryRate")
    trial.with_optimizer = lambda optimizer: cures.CarryRate(optimizer, trial.model, 0.1)


def truncated(trial: Trial) -> None:
    def states(x: Tensor) -> Tensor:
        walk = cures.TruncatedBPTT(x, x.shape[1] // 2, batch_first=True)
        parts = []
        for piece in walk:
            part, state = trial.layer(piece.x, piece.state)
            parts.append(part)
            walk.hand_on(state)
        return torch.cat(parts, 1)

    trial.states = states


def reconstruction(trial: Trial) -> None:
    aux = cures.Reconstruction(HIDDEN, trial.task.inputs, length=10, batch_first=True)
    trial.helper, trial.auxiliary = aux, lambda states, x: 0.5 * aux(states, x)


def omega(trial: Trial) -> None:
    penalty = cures.Omega(trial.model)
    trial.around, trial.after_backward = penalty, lambda: penalty.penalty().backward()


def flossing(trial: Trial) -> None:
    trial.pretrain(cures.GradientFlossing(trial.layer, n=HIDDEN // 4, every=5), 30)


def local_stability(trial: Trial) -> None:
    trial.pretrain(cures.LocalStability(trial.layer), 100)


def critical(trial: Trial) -> None:
    target = {"LSTM": 0.7, "GRU": 0.8}.get(trial.case.cell, 1.0)
    cures.critical_(trial.layer, trial.x, target=target)


def identity(trial: Trial) -> None:
    if trial.case.cell == "tanh-RNN":
        trial.layer = layers.RNN(trial.task.inputs, HIDDEN, batch_first=True, nonlinearity="relu")
        trial.model.recurrent = trial.layer
    cures.identity_(trial.layer)


def replaced(trial: Trial, by: str, max_lag: int | None = None) -> None:
    trial.model = cures.replace_(uv.restore(trial.model), by)  # type: ignore[assignment]
    if max_lag:
        cures.chrono_(trial.model, max_lag)
    uv.accelerate(trial.model)


def in_place(trial: Trial, cure: Callable[[nn.Module], nn.Module]) -> None:
    trial.model = cure(trial.model)  # type: ignore[assignment]


def forced(trial: Trial) -> None:
    raise TypeError("forced: needs the values that it puts the state on, at every step; these tasks have none")


CURES: dict[str, Callable[[Trial], None]] = {
    "as it is": lambda t: None,
    "forget_bias_(1)": lambda t: in_place(t, cures.forget_bias_),
    "forget_bias_(ln T)": lambda t: in_place(t, lambda m: cures.forget_bias_(m, math.log(t.case.lag))),
    "chrono_(T)": lambda t: in_place(t, lambda m: cures.chrono_(m, t.case.lag)),
    "uniform_gate_": lambda t: in_place(t, cures.uniform_gate_),
    "rescue_(T − 1)": lambda t: cures.rescue_(t.layer, t.x, t.case.lag - 1) and None,
    "CarryRate(0.1)": carry_rate,
    "orthogonal_": lambda t: in_place(t, cures.orthogonal_),
    "identity_ (relu)": identity,
    "spectral_radius_(1)": lambda t: in_place(t, cures.spectral_radius_),
    "critical_": critical,
    "LocalStability": local_stability,
    "GradientFlossing": flossing,
    "Omega": omega,
    "constrain_ orthogonal": lambda t: in_place(t, cures.constrain_),
    "constrain_ spectral": lambda t: in_place(t, lambda m: cures.constrain_(m, "spectral")),
    "GradientClipper": clipper,
    "clip_recurrence_(1)": lambda t: in_place(t, lambda m: cures.clip_recurrence_(m, 1.0)),
    "h_detach_(0.25)": lambda t: in_place(t, lambda m: cures.h_detach_(m, 0.25)),
    "TruncatedBPTT(T/2)": truncated,
    "Reconstruction": reconstruction,
    "zoneout_(0.1)": lambda t: in_place(t, lambda m: cures.zoneout_(m, 0.1)),
    "recurrent_dropout_(0.1)": lambda t: in_place(t, lambda m: cures.recurrent_dropout_(m, 0.1)),
    "layer_norm_": lambda t: in_place(t, cures.layer_norm_),
    "replace_ by LSTM": lambda t: replaced(t, "lstm"),
    "replace_ by GRU": lambda t: replaced(t, "gru"),
    "replace_ by GRU, chrono_(T)": lambda t: replaced(t, "gru", t.case.lag),
    "forced": forced,
}


def grid(blocks: int | None = None) -> list[Case]:
    """All trainings, block by block."""
    # Neighbours differ in all three, so that a part of the grid is spread over lags, rates and seeds.
    count = len(SEEDS) * len(LAGS) * len(RATES)
    settings = [(SEEDS[(i // 6 + i) % 3], LAGS[i % 3], RATES[i % 2]) for i in range(count)][:blocks]
    return [
        Case(lag, rate, seed, task, cell, cure)
        for seed, lag, rate in settings
        for task, cell, cure in product(TASKS, CELLS, CURES)
    ]


@cache
def material(name: str, lag: int, seed: int) -> tuple[Task, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(task, training samples for every update, those it is judged on): the same for all cells and cures."""
    task = make_task(name, lag, seed)
    return task, task.samples("train", range(UPDATES * BATCH)), task.samples("validation", range(JUDGED))


def reach(trial: Trial) -> int:
    """The largest lag at which the median over samples of ‖∂E_T/∂x_{T−ℓ}‖, E_T a random error at the last state, is
    above 1 % of its value at lag 0: one figure for every cell and cure, those included whose steps are not traced."""
    model = trial.model
    was_training, dtype = model.training, next(model.parameters()).dtype
    model.double().train(False)
    x = trial.x.double().requires_grad_()
    last = model.recurrent(x)[0][:, -1]
    error = torch.randn(last.shape, generator=torch.Generator().manual_seed(0), dtype=last.dtype)
    (dx,) = torch.autograd.grad((last * error).sum(), x)
    model.to(dtype).train(was_training)
    norms = dx.norm(dim=-1).log().median(0).values.flip(0)
    if not norms[0].isfinite() or bool((norms.isnan() | (norms == math.inf)).any()):
        return 0
    return flow.decay(norms).reach


FAILED = {"learnt_at": None, "diverged": True, "reach_before": None, "reach_after": None}


def train(case: Case) -> dict[str, Any]:
    """One training, and what came of it."""
    start = time.process_time()
    task, (x, y), judged = material(case.task, case.lag, case.seed)
    trial = Trial(case, task, x)
    found: dict[str, Any] = case._asdict()
    try:
        CURES[case.cure](trial)
    except (TypeError, ValueError) as why:
        return found | {"refused": str(why)}
    except ArithmeticError as why:
        # It fits the cell, and could not be carried out on these weights: that is a failure.
        return found | FAILED | {"failed": str(why), "seconds": round(time.process_time() - start, 3)}
    found["reach_before"] = reach(trial)
    parameters = [*trial.model.parameters(), *(trial.helper.parameters() if trial.helper else ())]
    optimizer = torch.optim.Adam(parameters, lr=case.rate, fused=True)
    trial.with_optimizer(optimizer)
    below, errors = 0, []
    found |= {"learnt_at": None, "diverged": False}
    for update in range(1, UPDATES + 1):
        here = slice((update - 1) * BATCH, update * BATCH)
        optimizer.zero_grad()
        with trial.around:
            loss = trial.loss(x[here], y[here])
            loss.backward()
        if not loss.isfinite():
            found["diverged"] = True
            break
        try:
            trial.after_backward()
        except ArithmeticError:
            found["diverged"] = True
            break
        optimizer.step()
        if update % EVERY == 0:
            errors.append(error(trial.model, task, *judged))
            below = below + 1 if errors[-1] < GOAL * task.chance else 0
            if below == 2:
                found["learnt_at"] = update - EVERY
                break
    found |= {"error": min(errors, default=None), "chance": task.chance}
    found["reach_after"] = None if found["diverged"] else reach(trial)
    return found | {"seconds": round(time.process_time() - start, 3)}


@torch.no_grad()
def error(model: SequenceModel, task: Task, x: Tensor, y: Tensor) -> float:
    model.eval()
    found = float(task.error(model(x), y))
    model.train()
    return found if math.isfinite(found) else math.inf


def read(path: Path) -> list[dict[str, Any]]:
    """The trainings in the file; a last line that was cut off is dropped from it."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        path.write_bytes(content[:whole])
    return [json.loads(line) for line in content[:whole].splitlines()]


def case_of(found: dict[str, Any]) -> Case:
    return Case(*(found[name] for name in Case._fields))


def run_group(path: Path, cases: list[Case], until: float) -> list[str]:
    """Trainings on the same samples, each written as soon as it is done; stops at that time of day."""
    torch.set_num_threads(1)
    done = []
    for case in cases:
        if time.time() > until:
            break
        found = train(case)
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        done.append(case.cure)
    material.cache_clear()
    return done


def run(path: Path, cases: list[Case], workers: int, seconds: float) -> None:
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


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    middle, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (middle - spread) / (n + z * z), (middle + spread) / (n + z * z)


def by_treatment(runs: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(cell, cure, its trainings), refusals left out."""
    for cell, cure in product(CELLS, CURES):
        mine = [r for r in runs if (r["cell"], r["cure"]) == (cell, cure) and "refused" not in r]
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
        print("| cure | learnt | 95 % | rescued / harmed | updates | reach, before → after | diverged | s |")
        print("|---|---|---|---|---|---|---|---|")
        print("\n".join(line for _, line in sorted(found, key=lambda pair: -pair[0])))
    print("\nRefused:\n")
    for cell in CELLS:
        names = sorted({r["cure"] for r in runs if "refused" in r and r["cell"] == cell}, key=list(CURES).index)
        print(f"- {cell}: {', '.join(names)}")
    print(f"\n{sum('refused' not in r for r in runs)} trainings, {sum(r.get('seconds', 0) for r in runs) / 60:.0f} min")
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
    """Share learnt, cure × (cell, task); hatched: the cure refuses the cell."""
    from matplotlib import pyplot as plt  # a figure is asked for: only then is it loaded

    names = [cure for cure in CURES if any(r["cure"] == cure and "refused" not in r for r in runs)]
    columns = list(product(CELLS, TASKS))
    share = torch.full((len(names), len(columns)), math.nan)
    for (i, cure), (j, (cell, task)) in product(enumerate(names), enumerate(columns)):
        mine = [r for r in runs if (r["cell"], r["task"], r["cure"]) == (cell, task, cure) and "refused" not in r]
        if mine:
            share[i, j] = sum(r["learnt_at"] is not None for r in mine) / len(mine)
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "cures"})
    figure, axes = plt.subplots(figsize=(9.5, 8.2), layout="constrained")
    axes.set_facecolor("#eeeeee")
    image = axes.pcolormesh(share, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
    for i, j in (share == share).nonzero().tolist():
        value = float(share[i, j])
        axes.text(
            j + 0.5,
            i + 0.5,
            f"{value:.0%}".removesuffix("%"),
            ha="center",
            va="center",
            fontsize=6.5,
            color="black" if value > 0.6 else "white",
        )
    axes.set_yticks([i + 0.5 for i in range(len(names))], names, fontsize=8)
    axes.set_xticks([j + 0.5 for j in range(len(columns))], [task for _, task in columns], rotation=60, ha="right")
    axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()
    for n, cell in enumerate(CELLS):
        axes.text((n + 0.5) * len(TASKS), -0.3, cell, ha="center", fontweight="bold")
        axes.axvline(n * len(TASKS), color="white", linewidth=4)
    figure.colorbar(image, label="share of trainings that learnt (grey: the cure does not fit)", shrink=0.6)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("file", type=Path)
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
