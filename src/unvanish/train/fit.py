"""Train a model on a task for a fixed budget of updates."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from unvanish.train.tasks import Task


@dataclass(frozen=True)
class Budget:
    """What every model gets."""

    steps: int
    """optimizer updates"""
    batch: int
    lr: float
    clip: float
    """global gradient norm"""
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


@dataclass
class Progress:
    """How training went: the validation error along the way."""

    update: list[int] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


class _Supervised(lightning.LightningModule):
    def __init__(
        self, model: nn.Module, task: Task, budget: Budget, progress: Progress, tell: Callable[..., None]
    ) -> None:
        super().__init__()
        self.model, self.task, self.budget, self.progress, self.tell = model, task, budget, progress, tell
        self._errors: list[tuple[float, int]] = []

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.task.loss(self.model(x), y)
        if not loss.isfinite():
            raise ArithmeticError(
                f"the training loss became {loss.item()} at update {self.global_step}; try a smaller lr or clip"
            )
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tell(self.global_step, self.progress.error[-1] if self.progress.error else None)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        x, y = batch
        self._errors.append((float(self.task.error(self.model(x), y)), len(y)))

    def on_validation_epoch_end(self) -> None:
        self.progress.update.append(self.global_step)
        self.progress.error.append(_mean(self._errors))
        self._errors.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.budget.lr)


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
    model: nn.Module,
    task: Task,
    budget: Budget,
    *,
    at: dict[int, Callable[[int], None]] | None = None,
    tell: Callable[[int, float | None], None] = lambda update, error: None,
) -> Progress:
    """Adam on the task's loss for `budget.steps` updates, the global gradient norm clipped; validation 20 times along
    the way.

    Args:
        model: answers `[B, T, I]` with what the task's loss takes.
        task: where samples come from.
        budget: what it may use.
        at: update → called with the update once it is done.
        tell: called after each update with the latest validation error.

    Raises:
        ArithmeticError: the loss became NaN or infinite.
    """
    progress = Progress()
    every = max(1, budget.steps // 20)
    train = task.dataset("train")
    size = task.size("train")
    generator = torch.Generator().manual_seed(budget.seed)
    endless = size >= budget.steps * budget.batch
    sampler = SequentialSampler(train) if endless else RandomSampler(train, generator=generator)  # type: ignore[arg-type]
    with _quiet():
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=budget.steps,
            max_epochs=-1,
            val_check_interval=every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=budget.clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_At(set(at), lambda update: at[update](update))] if at else [],
        )
        trainer.fit(
            _Supervised(model, task, budget, progress, tell),
            DataLoader(train, batch_size=min(budget.batch, size), sampler=sampler, drop_last=True),
            DataLoader(task.dataset("validation"), batch_size=256),
        )
    return progress


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> float:
    """The task's error on its test split."""
    model.eval()
    loader = DataLoader(task.dataset("test"), batch_size=256)
    return _mean([(float(task.error(model(x), y)), len(y)) for x, y in loader])


def _mean(errors: list[tuple[float, int]]) -> float:
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
