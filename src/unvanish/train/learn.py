"""One training from settings: a task or the user's data in, a `Trained` out."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unvanish.extras import extra
from unvanish.flow.callback import GradientFlow
from unvanish.seeding import seeded
from unvanish.train.assessment import assess, examine, remedied
from unvanish.train.configuration import Machines, TrainingConfiguration
from unvanish.train.fit import JUDGED, fit
from unvanish.train.memory import estimated, require
from unvanish.train.models import Shape
from unvanish.train.problems import DataProblem
from unvanish.train.run_folder import RunFolder, fingerprint
from unvanish.train.settings import Settings
from unvanish.train.trained import SCHEMA, Trained
from unvanish.train.training_page import reaches, training_page, training_preview

with extra("lab"):
    import lightning
    from lightning.pytorch.loggers import Logger

FLOW_STEPS = 200_000
"""steps, over all samples, used to measure the gradient's reach, unless a single sample is longer"""

Tell = Callable[[int, int, float | None], None]
"""(updates done, updates at most, latest validation error)"""


def train_on(
    problem: DataProblem,
    settings: Settings,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    flow_every: int | None = 100,
    loggers: Sequence[Logger] = (),
    machines: Machines | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    tell: Tell = lambda done, total, error: None,
    assessed: bool = True,
    budget: float = 0.0,
) -> Trained:
    """Train a model, and judge it once on the test split, together with the baselines.

    Args:
        problem: the problem to learn.
        settings: the model and the training.
        out: folder for checkpoints, one per round, and in the end for the model and a page about the training
            (`report.html`, and its card as PNG and SVG); None: nothing is written.
        resume: go on from the newest checkpoint in `out`, to the same weights as without the interruption (on the CPU
            bit for bit); begin where there is none.
        flow_every: updates between two measurements of the gradient's reach (`flow.GradientFlow`); None: none.
        loggers: Lightning's.
        machines: where it runs; None: in this process.
        callbacks: Lightning's, further ones.
        tell: called after every update.
        assessed: whether to store the training's assessment in `config["assessment"]` and the gradient's reach before
            and after it in `config["reach"]`, and to write the page; takes some seconds.
        budget: seconds for trying changes on copies of the model before training, if the trained one is no better
            than guessing; the page then has the plan that makes the loss fall.

    Raises:
        ValueError: the settings don't fit the problem, or need more memory than there is; `out` holds something else,
            or another training; budget is negative or not finite, or is given without an assessment.
        FileExistsError: `out` holds a training, and `resume` is off.
        ArithmeticError: the loss became NaN or infinite.
        KeyboardInterrupt: Ctrl-C; the last good checkpoint is kept.
        OSError: `out` can't be written; the last good checkpoint is kept.
    """
    if not 0 <= budget < math.inf:
        raise ValueError(f"budget: expected a finite number of seconds, 0 or more, got {budget}")
    if budget and not assessed:
        raise ValueError("budget: changes are tried after an assessment; leave assessed=True, or budget out")
    shape = problem.begin(settings)
    configuration = settings.configuration(problem.size("train"), problem.steps, problem.patience)
    machines = machines or Machines()
    if machines.accelerator == "cpu":
        _check_memory(problem, shape, configuration)
    with seeded(settings.seed):
        model = shape.build(problem.length)
    untrained = deepcopy(model) if assessed else None
    # Fewer samples of very long sequences: measuring keeps every state of them.
    samples = max(1, min(8, FLOW_STEPS // problem.length))
    flow = None if flow_every is None else GradientFlow(flow_every, samples=samples)
    folder = None
    if out is not None:
        run = {
            "kind": problem.kind,
            "configuration": asdict(configuration),
            "shape": asdict(shape),
            "data": fingerprint(problem),
        }
        folder = RunFolder(Path(out), run, resume, machines.first)
        if folder.finished:
            return Trained.load(out)
    with nullcontext() if folder is None else folder.in_its_words():
        progress = fit(
            model,
            problem,
            configuration,
            tell=lambda done, error: tell(done, configuration.steps, error),
            callbacks=[*callbacks, *([] if flow is None else [flow])],
            checkpoints=None if folder is None else folder.checkpoints,
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
            "gradient_flow": {} if flow is None else {name: _plain(found) for name, found in flow.latest.items()},
            "columns": dict(problem.columns),
            **problem.keep(),
            "test": problem.judge(model),
        }
        page = None
        if untrained is not None:
            try:
                was, now = (examine(problem, m, settings.seed) for m in (untrained, model))
                found = reaches(was, now), asdict(assess(problem, model, now, config["test"], settings.seed))
                config["reach"], config["assessment"] = found
                tried = None
                if budget and not config["assessment"]["better"]:
                    tried = remedied(problem, untrained, configuration, budget)
                    config["plan"] = tried.plan.code
                if folder is not None:
                    page = training_page(config, was, now, tried), training_preview(config, was, now)
            except Exception as error:  # a measurement must not cost the trained model
                warnings.warn(
                    f"the trained model could not be examined ({type(error).__name__}: {error}); it is kept without "
                    "an assessment or a page",
                    stacklevel=2,
                )
        trained = Trained(model, config)
        if folder is not None:
            folder.finish(trained, page)
    return trained


def _check_memory(problem: DataProblem, shape: Shape, configuration: TrainingConfiguration) -> None:
    batch, length, judged = min(configuration.batch, problem.size("train")), problem.length, 0
    if problem.size("validation"):
        # A language model's sequence is longer than the piece that an update uses.
        longest = max(length, len(problem.dataset("validation")[0][0]))
        judged = min(JUDGED, problem.size("validation")) * longest
    needed = estimated(
        shape.inputs,
        shape.hidden,
        shape.outputs,
        length,
        batch,
        layers=shape.layers,
        directions=2 if shape.bidirectional else 1,
        checkpoint_every=shape.checkpoint_every,
        symbols=shape.symbols or 0,
        answered=length if shape.read == "all" else shape.answers,
        judged=judged,
    )
    require(needed, f"hidden {shape.hidden}, layers {shape.layers}, batch {batch}, length {length}")


def _plain(found: Any) -> dict[str, float | None]:
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in found._asdict().items()
    }
