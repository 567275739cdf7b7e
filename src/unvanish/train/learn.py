"""One training from settings: a task or the user's data in, a `Trained` out."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger

from unvanish.flow import GradientFlow
from unvanish.train.fit import Machines, Tell, fit
from unvanish.train.problems import DataProblem
from unvanish.train.settings import Settings
from unvanish.train.tasks.base import Task
from unvanish.train.trained import SCHEMA, Trained


def train_on(
    problem: DataProblem,
    settings: Settings,
    *,
    flow_every: int | None = 100,
    checkpoints: Path | None = None,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
    machines: Machines | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    tell: Tell = lambda update, error: None,
) -> Trained:
    """Train a model, and judge it once on the test split, beside the baselines.

    Args:
        problem: what is learnt.
        settings: the model and the training.
        flow_every: updates between two measurements of the gradient's reach (`flow.GradientFlow`); None: none.
        checkpoints, resume, loggers, machines, callbacks, tell: as in `fit`.

    Raises:
        ValueError: the settings don't fit the problem.
        ArithmeticError: the loss became NaN or infinite.
        OSError: a checkpoint can't be written.
    """
    shape = problem.begin(settings)
    budget = settings.budget(problem.size("train"))
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = shape.build(problem.length)
    flow = None if flow_every is None else GradientFlow(flow_every)
    progress = fit(
        model,
        problem,
        budget,
        tell=tell,
        callbacks=[*callbacks, *([] if flow is None else [flow])],
        checkpoints=checkpoints,
        resume=resume,
        loggers=loggers,
        machines=machines,
    )
    config: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": problem.kind,
        "settings": asdict(settings),
        "shape": asdict(shape),
        "updates": progress.update[-1],
        "validation": {"metric": problem.metric, "update": progress.update, "error": progress.error},
        "gradient_flow": {} if flow is None else {name: asdict(found) for name, found in flow.latest.items()},
        **problem.keep(),
        "test": problem.judge(model),
    }
    return Trained(model, config)
