"""Train a model for a budget of updates, on Lightning: measured in rounds, resumable, on one process or many."""

import logging
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from unvanish.cures import Omega
from unvanish.train.checkpoints import SaveEachRound, SealedCheckpointIO, newest
from unvanish.train.models import SequenceModel
from unvanish.train.rounds import batches
from unvanish.train.tasks.base import IGNORED, Samples, Split

Optimizer = Literal["adam", "adamw", "sgd", "rmsprop"]
Schedule = Literal["constant", "cosine"]
OPTIMIZERS: dict[Optimizer, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    # The decay of Tieleman & Hinton's lecture and of the papers on long lags; torch's own default is 0.99.
    "rmsprop": partial(torch.optim.RMSprop, alpha=0.9),
}
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""what the launchers set: torchrun, Lightning's own, SLURM"""


class Problem(Protocol):
    """What is learnt: a task, or the user's data."""

    shuffle: bool
    """whether a pass over the training samples has an order of its own"""
    carry: bool
    """whether an update goes on from the state in which the one before left the network"""

    def size(self, split: Split) -> int:
        """Samples in a split."""
        ...

    def dataset(self, split: Split) -> Dataset[Samples]:
        """The samples of a split."""
        ...

    def loss(self, answer: Tensor, y: Tensor) -> Tensor:
        """What training minimises, mean over the batch."""
        ...

    def error(self, answer: Tensor, y: Tensor) -> Tensor:
        """What is reported, mean over the batch."""
        ...


@dataclass(frozen=True)
class Budget:
    """What a training may use."""

    steps: int
    """optimizer updates"""
    batch: int
    """samples per update, over all processes"""
    lr: float
    clip: float
    """global gradient norm"""
    seed: int
    every: int | None = None
    """updates per round, which ends with validation and a checkpoint; None: a twentieth of the updates"""
    optimizer: Optimizer = "adam"
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    """of the learning rate: constant, or a half cosine down to 0"""
    patience: int | None = None
    """rounds without a better validation loss before training stops; None: it uses all updates"""
    omega: float = 0.0
    """weight of Pascanu's Ω, added to the loss"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr", "clip", "every", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("weight_decay", "omega"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule: expected one of {', '.join(get_args(Schedule))}, got {self.schedule!r}")

    @property
    def round(self) -> int:
        """Updates per round."""
        return self.every or max(1, self.steps // 20)

    def updates(self, number: int) -> range:
        """The updates of a round; the last round takes what is left."""
        return range(number * self.round, min((number + 1) * self.round, self.steps))


@dataclass(frozen=True)
class Machines:
    """Where a training runs."""

    devices: int = 1
    """processes per node"""
    nodes: int = 1
    accelerator: str = "cpu"
    """as Lightning names them: cpu, gpu, auto, …"""

    def __post_init__(self) -> None:
        for name in ("devices", "nodes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        launched = os.environ.get("WORLD_SIZE", "")
        if launched not in ("", str(self.processes)):
            raise ValueError(
                f"devices, nodes: {launched} processes were launched, got devices {self.devices} and nodes {self.nodes}"
            )

    @property
    def processes(self) -> int:
        """In all."""
        return self.devices * self.nodes

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.processes == 1 or all(os.environ.get(name, "0") == "0" for name in RANKS)


@dataclass
class Progress:
    """How training went: the validation error along the way."""

    update: list[int] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


Tell = Callable[[int, float | None], None]
"""(updates done, latest validation error)"""


class Supervised(lightning.LightningModule):
    """One round of updates is one epoch of Lightning's: data, order and randomness follow from (seed, update)."""

    def __init__(self, model: SequenceModel, problem: Problem, budget: Budget, tell: Tell) -> None:
        super().__init__()
        self.model, self.problem, self.budget, self.tell = model, problem, budget, tell
        self.progress = Progress()
        self.best: tuple[float, dict[str, Tensor]] | None = None
        """(validation loss, weights) of the best round"""
        self._since_best = 0
        self._omega = Omega(model) if budget.omega else None
        self._state: Any = None
        self._sums = torch.zeros(3, dtype=torch.float64)

    def train_dataloader(self) -> DataLoader:
        updates = self.budget.updates(self.current_epoch)
        size, world = self.problem.size("train"), self.trainer.world_size
        chosen = list(
            batches(
                size,
                self.budget.batch,
                updates,
                seed=self.budget.seed,
                shuffle=self.problem.shuffle,
                rank=self.trainer.global_rank,
                world=world,
            )
        )
        return DataLoader(self.problem.dataset("train"), batch_sampler=chosen, collate_fn=together)

    def val_dataloader(self) -> DataLoader:
        size, world = self.problem.size("validation"), self.trainer.world_size
        # Lightning wants a batch in every process: too few samples are judged by all, with the same mean.
        mine = range(self.trainer.global_rank, size, world) if size >= world else range(size)
        groups = [list(mine[i : i + 256]) for i in range(0, len(mine), 256)]
        return DataLoader(self.problem.dataset("validation"), batch_sampler=groups, collate_fn=together)

    def on_train_start(self) -> None:
        begun = self.all_gather(torch.tensor(self.global_step, device=self.device))
        assert isinstance(begun, Tensor)
        if begun.unique().numel() > 1:
            raise ValueError(
                f"checkpoints: the processes found them at updates {begun.tolist()}; put them where all machines see "
                "the same files"
            )

    def on_train_epoch_start(self) -> None:
        # A state of its own for each round, so that a checkpoint need not hold the generator's.
        seed = np.random.SeedSequence([self.budget.seed, self.current_epoch, self.trainer.global_rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        self._state = None

    def training_step(self, batch: tuple[Tensor, Tensor | None, Tensor], batch_idx: int) -> Tensor:
        x, lengths, y = batch
        if self._omega is not None:
            self._omega.__enter__()
        answer, state = self.model.step(x, lengths, self._state)
        if self.problem.carry:
            self._state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        loss = self.problem.loss(answer, y)
        if not loss.isfinite():
            raise ArithmeticError(
                f"the training loss became {loss.item()} at update {self.global_step}; try a smaller lr or clip"
            )
        if self.trainer.loggers:
            self.log("train_loss", loss, sync_dist=self.trainer.world_size > 1, batch_size=len(y))
        return loss

    def on_after_backward(self) -> None:
        if self._omega is None:
            return
        self.stop_listening()
        # Not through backward(): DDP has averaged the loss's gradients by now, and would not hear of these.
        weights = [w for w in self.model.recurrent.parameters() if w.requires_grad]
        penalty = self.budget.omega * self._omega.penalty()
        for w, d in zip(weights, torch.autograd.grad(penalty, weights, allow_unused=True), strict=True):
            if d is not None:
                mean = self.trainer.strategy.reduce(d, reduce_op="mean")
                w.grad = mean if w.grad is None else w.grad + mean  # type: ignore[assignment]

    def stop_listening(self) -> None:
        """Take Ω's hooks off the model."""
        if self._omega is not None:
            self._omega.__exit__(None, None, None)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tell(self.global_step, self.progress.error[-1] if self.progress.error else None)

    def validation_step(self, batch: tuple[Tensor, Tensor | None, Tensor], batch_idx: int) -> None:
        x, lengths, y = batch
        answer = self.model(x, lengths)
        loss, error, n = float(self.problem.loss(answer, y)), float(self.problem.error(answer, y)), judged(y)
        self._sums += torch.tensor([loss * n, error * n, n], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(self._sums.to(self.device), reduce_op="sum")
        assert isinstance(sums, Tensor)
        loss, error = (sums[:2] / sums[2]).tolist()
        self._sums = torch.zeros_like(self._sums)
        self.progress.update.append(self.global_step)
        self.progress.error.append(error)
        if self.trainer.loggers:
            self.log_dict({"validation_loss": loss, "validation_error": error}, rank_zero_only=True)
        if self.budget.patience is None:
            return
        if loss < (math.inf if self.best is None else self.best[0]):
            self.best = loss, {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self._since_best = 0
        else:
            self._since_best += 1
            self.trainer.should_stop |= self._since_best >= self.budget.patience

    def configure_optimizers(self) -> Any:
        made = OPTIMIZERS[self.budget.optimizer]
        optimizer = made(self.model.parameters(), lr=self.budget.lr, weight_decay=self.budget.weight_decay)  # type: ignore[call-arg]
        if self.budget.schedule == "constant":
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.budget.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["unvanish"] = {
            "update": self.progress.update,
            "error": self.progress.error,
            "best": self.best,
            "since_best": self._since_best,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["unvanish"]
        self.progress.update[:], self.progress.error[:] = kept["update"], kept["error"]
        self.best, self._since_best = kept["best"], kept["since_best"]
        # It was to stop just then.
        self.trainer.should_stop |= self.budget.patience is not None and self._since_best >= self.budget.patience


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
    budget: Budget,
    *,
    at: dict[int, Callable[[int], None]] | None = None,
    tell: Tell = lambda update, error: None,
    callbacks: Sequence[lightning.Callback] = (),
    checkpoints: Path | None = None,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
    machines: Machines | None = None,
) -> Progress:
    """Minimise the problem's loss for the updates of the budget, the global gradient norm clipped; validate at the
    end of each round. With `patience` the model ends with the weights of its best round, else with the last.

    Args:
        model: answers what the problem's loss takes.
        problem: where samples come from.
        budget: what it may use.
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
    if budget.batch % machines.processes:
        raise ValueError(f"batch: expected a multiple of the {machines.processes} processes, got {budget.batch}")
    module = Supervised(model, problem, budget, tell)
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
        # Its own way to requeue would save in the middle of a round.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    on_interrupt = signal.getsignal(signal.SIGINT)
    with _quiet(), torch.random.fork_rng():
        try:
            trainer = lightning.Trainer(
                accelerator=machines.accelerator,
                devices=machines.devices,
                num_nodes=machines.nodes,
                strategy="ddp" if several else "auto",
                plugins=plugins,
                max_steps=budget.steps,
                max_epochs=-1,
                num_sanity_val_steps=0,
                reload_dataloaders_every_n_epochs=1,
                use_distributed_sampler=False,
                gradient_clip_val=budget.clip,
                logger=list(loggers),
                log_every_n_steps=min(10, budget.round),
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
            # Lightning makes Ctrl-C an exit, and is deaf to it from then on.
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from stop
        finally:
            module.stop_listening()
    if budget.patience is not None and module.best is None:
        raise ArithmeticError("the validation loss was never finite; try a smaller lr or clip")
    if module.best is not None:
        model.load_state_dict(module.best[1])
    return module.progress


@torch.no_grad()
def answers(model: nn.Module, problem: Problem, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """(answer, y) of a split, batch by batch, in order."""
    model.eval()
    for x, lengths, y in DataLoader(problem.dataset(split), batch_size=256, collate_fn=together):  # type: ignore[arg-type]
        yield model(x, lengths), y


def evaluate(model: nn.Module, problem: Problem) -> float:
    """The problem's error on its test split."""
    errors = [(float(problem.error(answer, y)), judged(y)) for answer, y in answers(model, problem, "test")]
    return sum(error * n for error, n in errors) / sum(n for _, n in errors)


def together(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x padded, lengths or None where all are equal, y, padded with `IGNORED` where every step is answered)"""
    x, y = zip(*samples, strict=True)
    lengths = [len(sample) for sample in x]
    if len(set(lengths)) == 1:
        return torch.stack(x), None, torch.stack(y)
    equal = len({v.shape for v in y}) == 1
    together = torch.stack(y) if equal else pad_sequence(list(y), batch_first=True, padding_value=IGNORED)
    return pad_sequence(list(x), batch_first=True), torch.tensor(lengths), together


def judged(y: Tensor) -> int:
    """How many answers a batch's mean is of: its samples, or the classes that aren't `IGNORED`."""
    return len(y) if y.is_floating_point() else int((y != IGNORED).sum())


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
