"""The samples that copies are trained and judged on: rows of the user's batch, fresh draws of a step, or all of it.

A copy memorises a small batch within a hundred updates (coin-flip targets fall to a quarter of their loss), so it is
judged on samples that its training has not seen. They come in groups: the user's loss is one number per call, and a
standard error over samples needs several.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unvanish.diagnosis.structure import tensors
from unvanish.diagnosis.subject import Subject
from unvanish.nn.modules import evaluating

BATCH = 32
"""the most samples of one update"""
LEAST = 32
"""samples from which some can be held out"""
HELD_OUT = 0.3
GROUPS, GROUP = 16, 4
"""the most groups of held-out samples, and the fewest samples of one group"""
MOST = 512
"""samples that are judged on, and as many that a constant is fitted on besides"""
PAIRINGS = 24
"""random pairings of held-out answers and targets"""
DRAWS = 16
"""fresh batches that a step is judged on"""


class Material(Protocol):
    """A source of losses, to train and to judge by."""

    subject: Subject

    @property
    def unseen(self) -> bool:
        """Whether copies are judged on samples that none of them trains on."""
        ...

    @property
    def trained_on(self) -> int | None:
        """Samples to train on; None: as many as are drawn."""
        ...

    def loss(self, model: nn.Module, update: int) -> Tensor:
        """Of the samples of one update; the same for every copy."""
        ...

    def judged(self, model: nn.Module) -> Tensor:
        """`[G]` losses of the groups that copies are judged on, without a graph."""
        ...

    def fitted(self, model: nn.Module) -> Tensor:
        """The loss that a constant answer is fitted on."""
        ...

    def informed(self, model: nn.Module) -> float:
        """How much better the answers fit their own samples' targets than those of others, in standard deviations over
        random pairings; 0 where targets can't be exchanged."""
        ...


class Rows:
    """The user's batch, split: some rows to train on, the others to judge by.

    Args:
        subject: with the batch.
        samples: that it holds.
        seed: of the split and of the order of training.
        judges: how many judge, the first rows of the batch; None: some that are drawn.
    """

    unseen = True

    def __init__(self, subject: Subject, samples: int, seed: int, judges: int | None = None) -> None:
        self.subject, self.seed = subject, seed
        if judges is None:
            order, held = torch.randperm(samples, generator=_seeded(seed)), round(HELD_OUT * samples)
            held = min(max(GROUPS, held), MOST)
        else:
            order = torch.cat([torch.randperm(judges, generator=_seeded(seed)), torch.arange(judges, samples)])
            held = judges
        groups = max(1, min(GROUPS, held // GROUP))
        held -= held % groups
        self.groups = list(order[:held].chunk(groups))
        self.train = order[held:]
        self.trained_on = len(self.train)
        self.size = min(BATCH, max(self.trained_on // 2, 1))
        self._orders: dict[int, Tensor] = {}

    def loss(self, model: nn.Module, update: int) -> Tensor:
        per_epoch = self.trained_on // self.size
        epoch, place = divmod(update, per_epoch)
        if epoch not in self._orders:
            self._orders = {epoch: torch.randperm(self.trained_on, generator=_seeded(self.seed + 1 + epoch))}
        return self.loss_of(model, self.train[self._orders[epoch][place * self.size : (place + 1) * self.size]])

    def judged(self, model: nn.Module) -> Tensor:
        return _without_training(
            self.subject, model, [lambda rows=rows: self.loss_of(model, rows) for rows in self.groups]
        )

    def fitted(self, model: nn.Module) -> Tensor:
        # On all rows: a constant fitted on the held-out ones too makes the bar slightly too strict, not too lax.
        return self.loss_of(model, torch.cat([*self.groups, self.train[:MOST]]))

    def informed(self, model: nn.Module) -> float:
        if not tensors(self.subject.target):
            return 0.0
        rows = torch.cat(self.groups)
        inputs, generator = self.subject.rows(self.subject.inputs, rows), _seeded(self.seed)
        pairings = [torch.arange(len(rows)), *(torch.randperm(len(rows), generator=generator) for _ in range(PAIRINGS))]

        def paired(order: Tensor) -> Tensor:
            target = self.targets(rows)[order] if self.numbered else self.targets(rows[order])
            return self.subject.loss(model, inputs, target)

        losses = _without_training(self.subject, model, [lambda order=order: paired(order) for order in pairings])
        spread = float(losses[1:].std())
        return float(losses[1:].mean() - losses[0]) / spread if spread > 0 else 0.0

    @property
    def numbered(self) -> bool:
        """Whether the targets number the samples of their batch."""
        return _numbers_samples(self.subject.target)

    def loss_of(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Of these samples."""
        return self.subject.loss(model, self.subject.rows(self.subject.inputs, rows), self.targets(rows))

    def targets(self, rows: Tensor) -> Any:
        """These samples' targets. Those that number the samples of their batch (contrastive losses) are renumbered."""
        target = self.subject.target
        return target[: len(rows)] if self.numbered else self.subject.rows(target, rows)


class Draws:
    """A step that draws its own samples: each call is a fresh batch, so that its loss before an update is unseen."""

    unseen = True
    trained_on = None

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.seed = subject, seed

    def loss(self, model: nn.Module, update: int) -> Tensor:
        _seed(self.seed + 1 + update)
        return self.subject.loss(model)

    def judged(self, model: nn.Module) -> Tensor:
        def draw(number: int) -> Tensor:
            _seed(self.seed + 1_000_003 + number)
            return self.subject.loss(model)

        return _without_training(self.subject, model, [lambda n=n: draw(n) for n in range(DRAWS)])

    def fitted(self, model: nn.Module) -> Tensor:
        losses = []
        for number in range(DRAWS):
            _seed(self.seed + 2_000_003 + number)
            losses.append(self.subject.loss(model))
        return torch.stack(losses).mean()

    def informed(self, model: nn.Module) -> float:
        return 0.0


class Whole:
    """The whole batch, to train and to judge: too small to hold samples out, or not to be split."""

    unseen = False

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.trained_on = subject.samples

    def loss(self, model: nn.Module, update: int) -> Tensor:
        return self.subject.loss(model)

    def judged(self, model: nn.Module) -> Tensor:
        return _without_training(self.subject, model, [lambda: self.subject.loss(model)])

    def fitted(self, model: nn.Module) -> Tensor:
        return self.subject.loss(model)

    def informed(self, model: nn.Module) -> float:
        return 0.0


def material(subject: Subject, seed: int) -> tuple[Material, tuple[str, ...]]:
    """The strictest material that the subject allows, and notes on what it does not allow."""
    if subject.step is not None:
        draws = Draws(subject, seed)
        twin = subject.twin()
        with subject.rng(seed):
            losses = draws.judged(twin)
        if len(losses.unique()) > 1:
            return draws, ()
        return Whole(subject), (
            "every call of the step gave the same loss, so it uses one fixed batch: copies could not be judged on "
            "unseen samples; let the step draw a fresh batch",
        )
    samples = subject.samples
    if samples is None:
        return Whole(subject), (
            "no axis of the batch was recognised as the samples: copies could not be judged on unseen samples",
        )
    if samples < LEAST:
        return Whole(subject), (
            f"{samples} samples are too few to hold any out: copies could be judged only on what they were trained on; "
            "pass a batch of a few hundred",
        )
    rows = Rows(subject, samples, seed)
    try:
        with subject.rng(seed):
            rows.judged(subject.twin())
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        return Whole(subject), (
            "the loss could not be computed for a part of the batch, so copies could not be judged on unseen samples "
            f"({type(error).__name__}: {_first_line(error)})",
        )
    return rows, ()


def _without_training(subject: Subject, model: nn.Module, losses: list[Any]) -> Tensor:
    """The losses in eval mode; with batch norm also by the batch's own statistics, whichever is lower on the whole.

    A fresh running mean and variance do not reflect the data yet, and a model whose norms use them seems to ignore its
    input.
    """
    with torch.no_grad(), evaluating(model):
        found = torch.tensor([float(loss()) for loss in losses], dtype=torch.float64)
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if norms:
            with _batch_statistics(norms):
                own = torch.tensor([float(loss()) for loss in losses], dtype=torch.float64)
            if not bool(found.mean() <= own.mean()):
                found = own
    return found


@contextmanager
def _batch_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    kept = [{n: b.clone() for n, b in m.named_buffers(recurse=False)} for m in norms]
    try:
        for m in norms:
            m.training = True
        yield
    finally:
        for m, buffers in zip(norms, kept, strict=True):
            m.training = False
            for name, value in buffers.items():
                getattr(m, name).copy_(value)


def _numbers_samples(target: Any) -> bool:
    """Whether it is 0, 1, 2, …: the sample that belongs to each, not a class."""
    if not isinstance(target, Tensor) or target.dim() != 1 or target.is_floating_point() or len(target) < 2:
        return False
    return torch.equal(target.cpu().long(), torch.arange(len(target)))


def _seed(seed: int) -> None:
    """Every source that a step is likely to draw from; within `Subject.rng`, which restores them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the user's)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else "no message"
