"""Train several recurrent models on the same tasks: which gradients survive, and which models learn."""

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

import unvanish
from unvanish import flow
from unvanish.train.configuration import TrainingConfiguration
from unvanish.train.fit import evaluate, fit
from unvanish.train.gradient_breakdown import break_down
from unvanish.train.gradient_reach import PROBES, measure
from unvanish.train.memory import estimated, require
from unvanish.train.models import Recipe, SequenceModel, recipe
from unvanish.train.records import Comparison, GradientBreakdown, Reach, Run, TaskResult, Trial
from unvanish.train.supervised import Progress
from unvanish.train.tasks import TASKS, Task, make_task
from unvanish.train.tasks.digits import PixelDigits
from unvanish.train.untrained import cured, forget_bias_series, rescued

DEFAULT_TASKS = ("adding", "digits-padded")
"""the tasks of a comparison where none are given"""
DEFAULT_CELLS = ("rnn", "gru", "lstm", "lstm-chrono", "janet-chrono", "ur_lstm")
"""the cells of a comparison where none are given"""
DEFAULT_STEPS = {"adding": 800, "digits-padded": 800}
STEPS = 600
"""updates for a task without a default of its own"""
HIDDEN, BATCH, LR, CLIP = 32, 32, 1e-2, 1.0

Tell = Callable[[str, int, int, float | None], None]
"""(task and cell, updates done, updates in all, latest validation error)"""
Say = Callable[[str], None]
"""the current stage, in one line"""


def run_one(
    task: Task,
    name: str,
    hidden: int,
    configuration: TrainingConfiguration,
    seeds: int,
    tell: Tell,
    say: Say,
    folder: Path | None,
) -> Run:
    """Measure, train, measure again, once per seed; along the training of the first. One seed gives one trial."""
    chosen, label = recipe(name), f"{task.name} {name}"
    found: list[_Trained] = []
    for number in range(seeds):
        here = task if number == 0 else make_task(task.name, task.length, task.seed + number)
        mine = replace(configuration, seed=configuration.seed + number)
        say(f"{label}: training {number + 1} of {seeds}, seed {mine.seed}")

        def told(update: int, error: float | None, done: int = number * configuration.steps) -> None:
            tell(label, done + update, seeds * configuration.steps, error)

        found.append(_trained(here, chosen, hidden, mine, number == 0, told))
    first = found[0]
    if folder is not None:
        _save_flow(first.model, task, folder / f"{task.name}-{name}.flow")
    say(f"{label}: cures and rescue, before any training")
    return Run(
        name=name,
        title=chosen.title,
        parameters=sum(p.numel() for p in first.model.parameters()),
        trials=[each.trial for each in found],
        moments=first.moments,
        breakdown=first.breakdown,
        cures=cured(task, name, hidden, configuration.seed),
        rescue=rescued(task, name, hidden, configuration.seed),
    )


class _Trained(NamedTuple):
    """One training, and its measurements."""

    model: SequenceModel
    trial: Trial
    moments: list[Reach]
    breakdown: list[GradientBreakdown]


def _trained(
    task: Task,
    chosen: Recipe,
    hidden: int,
    configuration: TrainingConfiguration,
    closely: bool,
    tell: Callable[[int, float | None], None],
) -> _Trained:
    """Train a model from the configuration's seed; `closely`: reach at every round's end, and the gradient's breakdown
    before and after."""
    start = time.perf_counter()
    torch.manual_seed(configuration.seed)
    model = chosen.build(task, hidden)
    moments = [measure(model, task, 0)]
    breakdown = [break_down(model, task, 0, PROBES // 2)] if closely else []

    def look(update: int) -> None:
        moments.append(measure(model, task, update))

    at = range(configuration.round, configuration.steps, configuration.round) if closely else ()
    progress = fit(model, task, configuration, at=dict.fromkeys(at, look), tell=tell)
    look(configuration.steps)
    if closely:
        breakdown.append(break_down(model, task, configuration.steps, PROBES // 2))
    error, seconds = evaluate(model, task), time.perf_counter() - start
    return _Trained(model, _trial(task, configuration, progress, error, seconds, moments), moments, breakdown)


def _trial(
    task: Task,
    configuration: TrainingConfiguration,
    progress: Progress,
    error: float,
    seconds: float,
    moments: list[Reach],
) -> Trial:
    stays = [all(e < task.solved_below for e in progress.error[i:]) for i in range(len(progress.error))]
    return Trial(
        seed=configuration.seed,
        curve_update=progress.update,
        curve_error=progress.error,
        test_error=error,
        solved=error < task.solved_below,
        solved_at=next((u for u, stay in zip(progress.update, stays, strict=True) if stay), None),
        seconds=seconds,
        reach=[moments[0].reach, moments[-1].reach],
    )


def _save_flow(model: SequenceModel, task: Task, path: Path) -> None:
    """The record of one backward pass over the probes."""
    with flow.watch(model) as record:
        x, y = task.samples("validation", range(PROBES))
        task.loss(model(x), y).backward()
    record.save(path)
    model.zero_grad()


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
    seeds: int = 3,
    flows: str | os.PathLike[str] | None = None,
    command: str = "unvanish.train.compare(...)",
    tell: Tell = lambda *_: None,
    say: Say = lambda _: None,
) -> Comparison:
    """Train every cell on every task from several seeds; measure how far the last step's gradient reaches
    before, along and after training.

    Args:
        tasks: names out of `unvanish.train.TASKS`.
        cells: names out of `unvanish.train.RECIPES`.
        length: steps of the sequences; None: each task's own. Tasks of images keep theirs where there are others.
        hidden: H.
        steps: optimizer updates; None: each task's own.
        batch: samples per update.
        lr: Adam's learning rate.
        seed: the first, of data, weights and order; the others follow it.
        seeds: trainings of each cell on each task.
        flows: a folder for one flow file per run; None: keep none.
        command: what the user typed, for the report.
        tell: called after every update.
        say: called with a line at every stage.

    Raises:
        ValueError: no task or cell, an unknown one or one named twice, a number out of range, or too little memory.
        ArithmeticError: a loss became NaN or infinite.
    """
    if hidden < 1:
        raise ValueError(f"hidden: expected at least 1, got {hidden}")
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
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
                runs.append(run_one(task, name, hidden, configuration, seeds, tell, say, folder))
            except ArithmeticError as error:
                raise ArithmeticError(f"{task.name}, {name}: {error}") from error
        say(f"{task.name}: an LSTM with one forget bias after the other, before any training")
        settings = {**asdict(configuration), "seeds": seeds, "hidden": hidden, "optimizer": "Adam", "probes": PROBES}
        results.append(
            TaskResult(
                name=task.name,
                title=task.title,
                describe=task.describe,
                source=task.source,
                note=task.note,
                length=task.length,
                metric=task.metric,
                chance=task.chance,
                solved_below=task.solved_below,
                settings=settings,
                runs=runs,
                forget_bias=forget_bias_series(task, hidden, seed),
            )
        )
    return Comparison(results, environment(), command)


def _told_apart(names: Sequence[str], argument: str) -> None:
    """Raise where there is no name or a repeated one, since files and parts of the page are named after them."""
    if not names:
        raise ValueError(f"{argument}: expected at least one name, got none")
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"{argument}: expected each name once, got {name!r} {times} times")


def environment() -> dict[str, str]:
    """Versions, processor and threads, on which a figure depends besides the seed."""
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
