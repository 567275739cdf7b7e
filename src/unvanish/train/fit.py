"""Train a model for a number of updates, on Lightning: in rounds, resumable, on one process or many."""

import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unvanish.extras import extra
from unvanish.seeding import generators_kept
from unvanish.train.checkpoints import SaveEachRound, SealedCheckpointIO, newest
from unvanish.train.configuration import Machines, TrainingConfiguration
from unvanish.train.models import SequenceModel
from unvanish.train.supervised import Problem, Progress, Supervised, Tell, judged, together
from unvanish.train.tasks.task import Split

with extra("lab"):
    import lightning
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.loggers import Logger

JUDGED = 256
"""samples that are judged at once"""


class _At(lightning.Callback):
    """Calls `act(update)` when training has done these updates."""

    def __init__(self, updates: set[int], act: Callable[[int], None]) -> None:
        self.updates, self.act = updates, act

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in self.updates:
            self.act(trainer.global_step)


def fit(
    model: SequenceModel,
    problem: Problem,
    configuration: TrainingConfiguration,
    *,
    at: dict[int, Callable[[int], None]] | None = None,
    tell: Tell = lambda update, error: None,
    callbacks: Sequence[lightning.Callback] = (),
    checkpoints: Path | None = None,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
    machines: Machines | None = None,
) -> Progress:
    """Minimise the problem's loss for its configured updates, the global gradient norm clipped; validate at the
    end of each round. With `patience` the model ends with the weights of its best round, else with the last.

    Args:
        model: answers what the problem's loss takes.
        problem: where samples come from.
        configuration: of the training.
        at: update → called with the update once it is done.
        tell: called after each update with the latest validation error.
        callbacks: further ones of Lightning.
        checkpoints: folder for a checkpoint per round; None: none are written.
        resume: go on from the newest checkpoint in the folder, if there is one: to the same weights, bit for bit on
            the CPU.
        loggers: Lightning's.
        machines: where it runs; None: on this process.

    Raises:
        ArithmeticError: the loss became NaN or infinite.
        KeyboardInterrupt: Ctrl-C; the last checkpoint is kept.
        ValueError: the batch can't be shared by the processes; a checkpoint does not fit the model.
        OSError: a checkpoint can't be written; the last good one is kept.
    """
    machines = machines or Machines()
    if configuration.batch % machines.processes:
        raise ValueError(f"batch: expected a multiple of the {machines.processes} processes, got {configuration.batch}")
    module = Supervised(model, problem, configuration, tell)
    chosen = [*callbacks]
    if at:
        chosen.append(_At(set(at), lambda update: at[update](update)))
    start = None
    if checkpoints is not None:
        chosen.append(SaveEachRound(checkpoints))
        start = newest(checkpoints) if resume else None
    several = machines.processes > 1
    plugins: list[Any] = [SealedCheckpointIO()]
    if several and SLURMEnvironment.detect():
        # Its own requeueing would save in the middle of a round.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    on_interrupt = signal.getsignal(signal.SIGINT)
    with _quiet(), generators_kept():
        try:
            trainer = lightning.Trainer(
                accelerator=machines.accelerator,
                devices=machines.devices,
                num_nodes=machines.nodes,
                strategy="ddp" if several else "auto",
                plugins=plugins,
                max_steps=configuration.steps,
                max_epochs=-1,
                num_sanity_val_steps=0,
                reload_dataloaders_every_n_epochs=1,
                use_distributed_sampler=False,
                gradient_clip_val=configuration.clip,
                logger=list(loggers),
                log_every_n_steps=min(10, configuration.round),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=chosen,
            )
        except (MisconfigurationException, ValueError) as error:
            raise ValueError(f"devices, nodes, accelerator: {error}") from error
        try:
            trainer.fit(module, ckpt_path=start)
        except SystemExit as stop:
            if not trainer.interrupted:
                raise
            # Lightning turns Ctrl-C into an exit, and ignores it from then on.
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from stop
        finally:
            module.stop_listening()
    if configuration.patience is not None and module.best is None:
        raise ArithmeticError("the validation loss was never finite; try a smaller lr or clip")
    if module.best is not None:
        model.load_state_dict(module.best[1])
    return module.progress


@torch.no_grad()
def answers(model: nn.Module, problem: Problem, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """(answer, y) of a split, batch by batch, in order, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    for x, lengths, y in DataLoader(problem.dataset(split), batch_size=JUDGED, collate_fn=together):  # type: ignore[arg-type]
        yield model(x.to(device), lengths).cpu(), y


def evaluate(model: nn.Module, problem: Problem) -> float:
    """The problem's error on its test split."""
    errors = [(float(problem.error(answer, y)), judged(y)) for answer, y in answers(model, problem, "test")]
    return sum(error * n for error, n in errors) / sum(n for _, n in errors)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's advice on workers, loggers and devices is for other uses than these short runs."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            yield
        finally:
            log.setLevel(level)
