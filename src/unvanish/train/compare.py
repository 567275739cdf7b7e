"""The main job: the same tasks for several recurrent models, whose gradient survives and who learns."""

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch

import unvanish
from unvanish import flow
from unvanish.train.configuration import TrainingConfiguration
from unvanish.train.fit import evaluate, fit
from unvanish.train.gradient_breakdown import break_down, ending_together
from unvanish.train.memory import estimated, require
from unvanish.train.models import REMEDIES, SequenceModel, recipe
from unvanish.train.records import Comparison, Cured, Reach, Run, TaskResult
from unvanish.train.supervised import Progress
from unvanish.train.tasks import TASKS, Task, make_task
from unvanish.train.tasks.digits import PixelDigits

DEFAULT_TASKS = ("adding", "digits")
DEFAULT_CELLS = ("rnn", "gru", "lstm", "lstm-chrono")
DEFAULT_STEPS = {"adding": 800}
STEPS = 600
"""updates for a task without a default of its own"""
HIDDEN, BATCH, LR, CLIP = 48, 64, 1e-2, 1.0
PROBES = 32
"""validation samples on which the flow is measured"""

Tell = Callable[[Task, str, int, int, float | None], None]
"""(task, cell, updates done, updates in all, latest validation error)"""


def measure(model: SequenceModel, task: Task, update: int, fraction: float = 0.01) -> Reach:
    """‖∂E_T/∂s_{T−ℓ}‖ of the task's own error at the last step, s = c for the LSTM and h for the others, in float64.

    The rows of the map are renormalised as they go, so `log_norm` is right far below what the training's float32 can
    hold.

    Raises:
        ArithmeticError: the error is NaN or infinite.
    """
    double = deepcopy(model).double().train(False)
    x, y = ending_together(task, PROBES)
    states, _ = double.recurrent(x)
    last = states[:, -1].detach().requires_grad_()
    error = task.loss(double.head(last), y) * len(y)
    if not error.isfinite():
        raise ArithmeticError(f"the loss became {error.item()} at update {update}; try a smaller lr")
    (source,) = torch.autograd.grad(error, last)
    found = flow.adjoint_map(double.recurrent, x, sources=[-1], error=source.unsqueeze(0))
    log_norms = found.over_lag(0)
    relative = log_norms - log_norms[0]
    # No interpolation: between two exact zeros, −inf, it would make a NaN.
    middle, low, high = (torch.quantile(relative, q, dim=1, interpolation="lower") for q in (0.5, 0.1, 0.9))
    decay = flow.decay(middle, fraction=fraction)
    return Reach(
        update=update,
        lag=list(range(len(middle))),
        log_norm=middle.tolist(),
        low=low.tolist(),
        high=high.tolist(),
        rate=decay.rate,
        half_life=decay.half_life,
        reach=decay.reach,
        fraction=fraction,
    )


def cured(task: Task, name: str, hidden: int, seed: int) -> list[Cured]:
    """How each cure of a plain recipe changes the reach of the gradient before training; global random numbers stay."""
    found = []
    with torch.random.fork_rng(devices=[]):
        for remedy in REMEDIES.get(name, ()):
            torch.manual_seed(seed)
            chosen = recipe(remedy)
            found.append(Cured(remedy, chosen.title, measure(chosen.build(task, hidden), task, 0)))
    return found


def run_one(
    task: Task, name: str, hidden: int, configuration: TrainingConfiguration, tell: Tell, folder: Path | None
) -> Run:
    """Measure, train, measure again; the same seed gives the same run."""
    start = time.perf_counter()
    torch.manual_seed(configuration.seed)
    chosen = recipe(name)
    model = chosen.build(task, hidden)
    before = measure(model, task, 0)
    breakdown = [break_down(model, task, 0, PROBES // 2)]
    during: list[Reach] = []
    moments = {configuration.steps // 10, configuration.steps // 2} - {0, configuration.steps}
    progress: Progress = fit(
        model,
        task,
        configuration,
        at={update: lambda done: during.append(measure(model, task, done)) for update in moments},
        tell=lambda done, error: tell(task, name, done, configuration.steps, error),
    )
    if folder is not None:
        with flow.watch(model) as record:
            x, y = task.samples("validation", range(PROBES))
            task.loss(model(x), y).backward()
        record.save(folder / f"{task.name}-{name}.flow")
    model.zero_grad()
    breakdown.append(break_down(model, task, configuration.steps, PROBES // 2))
    test_error = evaluate(model, task)
    stays = [all(e < task.solved_below for e in progress.error[i:]) for i in range(len(progress.error))]
    return Run(
        name=name,
        title=chosen.title,
        parameters=sum(p.numel() for p in model.parameters()),
        curve_update=progress.update,
        curve_error=progress.error,
        test_error=test_error,
        solved=test_error < task.solved_below,
        solved_at=next((u for u, stay in zip(progress.update, stays, strict=True) if stay), None),
        seconds=time.perf_counter() - start,
        before=before,
        during=during,
        after=measure(model, task, configuration.steps),
        breakdown=breakdown,
        cures=cured(task, name, hidden, configuration.seed),
    )


def compare(
    tasks: Sequence[str] = DEFAULT_TASKS,
    cells: Sequence[str] = DEFAULT_CELLS,
    *,
    length: int | None = None,
    hidden: int = HIDDEN,
    steps: int | None = None,
    batch: int = BATCH,
    lr: float = LR,
    seed: int = 0,
    flows: str | os.PathLike[str] | None = None,
    command: str = "unvanish.train.compare(...)",
    tell: Tell = lambda *_: None,
) -> Comparison:
    """Train every cell on every task under one budget; measure how far the last step's error reaches, before, during
    and after.

    Args:
        tasks: names out of `unvanish.train.TASKS`.
        cells: names out of `unvanish.train.RECIPES`.
        length: steps of the sequences; None: each task's own. Tasks of images keep theirs where there are others.
        hidden: H.
        steps: optimizer updates; None: each task's own.
        batch: samples per update.
        lr: Adam's learning rate.
        seed: of data, weights and order.
        flows: a folder for one flow file per run; None: keep none.
        command: what the user typed, for the report.
        tell: called after every update.

    Raises:
        ValueError: no task or cell, an unknown one or one named twice, a number out of range, or too little memory.
        ArithmeticError: a loss became NaN or infinite.
    """
    if hidden < 1:
        raise ValueError(f"hidden: expected at least 1, got {hidden}")
    _told_apart(tasks, "tasks")
    _told_apart(cells, "cells")
    for name in cells:
        recipe(name, "cells")
    images = {name for name in tasks if issubclass(TASKS.get(name, Task), PixelDigits)}
    keep = images if images != set(tasks) else set()
    chosen = [make_task(name, None if name in keep else length, seed) for name in tasks]
    configurations = [
        TrainingConfiguration(
            steps if steps is not None else DEFAULT_STEPS.get(task.name, STEPS), batch, lr, CLIP, seed
        )
        for task in chosen
    ]
    for task in chosen:
        needed = estimated(task.inputs, hidden, task.outputs, task.length, batch)
        require(needed, f"hidden {hidden}, batch {batch}, length {task.length}")
    results = []
    folder = None if flows is None else Path(flows)
    for task, configuration in zip(chosen, configurations, strict=True):
        runs = []
        for name in cells:
            try:
                runs.append(run_one(task, name, hidden, configuration, tell, folder))
            except ArithmeticError as error:
                raise ArithmeticError(f"{task.name}, {name}: {error}") from error
        settings = {**asdict(configuration), "hidden": hidden, "optimizer": "Adam", "probes": PROBES}
        results.append(
            TaskResult(
                name=task.name,
                title=task.title,
                describe=task.describe,
                source=task.source,
                length=task.length,
                metric=task.metric,
                chance=task.chance,
                solved_below=task.solved_below,
                settings=settings,
                runs=runs,
            )
        )
    return Comparison(results, environment(), command)


def _told_apart(names: Sequence[str], argument: str) -> None:
    """Raise where there is no name, or one stands twice: files and parts of the page are called by them."""
    if not names:
        raise ValueError(f"{argument}: expected at least one name, got none")
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{argument}: expected each name once, got {name!r} {times} times")


def environment() -> dict[str, str]:
    """Versions, processor and threads: what a figure depends on besides the seed."""
    return {
        "unvanish": unvanish.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
