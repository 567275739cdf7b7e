"""The training as Lightning sees it: rounds of updates, each determined by the seed and its number."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from unvanish.cures import Omega
from unvanish.extras import extra
from unvanish.train.configuration import OPTIMIZERS, TrainingConfiguration
from unvanish.train.models import SequenceModel
from unvanish.train.rounds import batches
from unvanish.train.tasks.task import IGNORED, Samples, Split

with extra("lab"):
    import lightning


class Problem(Protocol):
    """The problem to learn: a task, or the user's data."""

    shuffle: bool
    """whether a pass over the training samples has an order of its own"""
    carry: bool
    """whether an update continues from the final state of the previous one"""

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


@dataclass
class Progress:
    """The course of a training: the validation error during training."""

    update: list[int] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


Tell = Callable[[int, float | None], None]
"""(updates done, latest validation error)"""


class Supervised(lightning.LightningModule):
    """One round of updates is one epoch in Lightning: data, order and randomness follow from (seed, update)."""

    def __init__(
        self, model: SequenceModel, problem: Problem, configuration: TrainingConfiguration, tell: Tell
    ) -> None:
        super().__init__()
        self.model, self.problem, self.configuration, self.tell = model, problem, configuration, tell
        self.progress = Progress()
        self.best: tuple[float, dict[str, Tensor]] | None = None
        """(validation loss, weights) of the best round"""
        self._since_best = 0
        self._omega = Omega(model) if configuration.omega else None
        self._state: Any = None
        self._sums = torch.zeros(3, dtype=torch.float64)

    def train_dataloader(self) -> DataLoader:
        updates = self.configuration.updates(self.current_epoch)
        size, world = self.problem.size("train"), self.trainer.world_size
        chosen = list(
            batches(
                size,
                self.configuration.batch,
                updates,
                seed=self.configuration.seed,
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
        seed = np.random.SeedSequence([self.configuration.seed, self.current_epoch, self.trainer.global_rank])
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
        # Not through backward(): DDP has averaged the loss's gradients by now, and would miss these.
        weights = [w for w in self.model.recurrent.parameters() if w.requires_grad]
        penalty = self.configuration.omega * self._omega.penalty()
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
        if self.configuration.patience is None:
            if not math.isfinite(loss):  # with patience the best round's weights are taken, and it is none of them
                raise ArithmeticError(
                    f"the validation loss became {loss} at update {self.global_step}; try a smaller lr or clip"
                )
            return
        if loss < (math.inf if self.best is None else self.best[0]):
            self.best = loss, {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self._since_best = 0
        else:
            self._since_best += 1
            self.trainer.should_stop |= self._since_best >= self.configuration.patience

    def configure_optimizers(self) -> Any:
        made = OPTIMIZERS[self.configuration.optimizer]
        optimizer = made(
            self.model.parameters(), lr=self.configuration.lr, weight_decay=self.configuration.weight_decay
        )  # type: ignore[call-arg]
        if self.configuration.schedule == "constant":
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.configuration.steps)
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
        self.trainer.should_stop |= (
            self.configuration.patience is not None and self._since_best >= self.configuration.patience
        )


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
    """The number of answers in a batch's mean: its samples, or the classes that aren't `IGNORED`."""
    return len(y) if y.is_floating_point() else int((y != IGNORED).sum())
