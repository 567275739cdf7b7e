"""How to train: everything for which `unvanish train` has an option, except the data and the machines."""

from dataclasses import dataclass
from typing import Any

from unvanish.train.configuration import Optimizer, Schedule, TrainingConfiguration
from unvanish.train.models import READS, Read, recipe

EPOCHS = 50
"""passes over the data where neither epochs nor steps are given"""


@dataclass(frozen=True)
class Settings:
    """A model and a training."""

    cell: str = "lstm-chrono"
    """a name out of `RECIPES`: the cell, and how its weights begin"""
    hidden: int = 48
    layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    """dropout between layers, on embedded symbols, and on the states that are read"""
    read: Read | None = None
    """states that the output is computed from: the "last", their "mean", or "all"; None: what suits the problem"""
    epochs: int | None = None
    """passes over the training samples; None, if `steps` is None too: 50 of the user's data, 600 updates of a task"""
    steps: int | None = None
    """optimizer updates, instead of epochs"""
    every: int | None = None
    """updates per round, which ends with validation and a checkpoint; None: one pass over the training samples, or a
    twentieth of all updates where these don't make a pass"""
    batch: int = 32
    """samples per update, over all processes"""
    lr: float = 1e-2
    clip: float = 1.0
    """global gradient norm"""
    optimizer: Optimizer = "adam"
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    patience: int | None = None
    """rounds without a better validation loss before training stops and the best weights are taken; 0: no stop, and
    the last weights; None: 10 on the user's data, 0 on a task"""
    omega: float = 0.0
    """weight of `cures.Omega`"""
    clip_recurrence: float | None = None
    """bound of the gradient inside the recurrence, see `cures.clip_recurrence_`"""
    tbptt: int | None = None
    """truncated backpropagation: from step n·tbptt to the step before passes no gradient, only the state"""
    checkpoint_every: int | None = None
    """keep one state in this many for the backward pass, and recompute the others"""
    seed: int = 0
    """of split, weights, order and dropout"""

    def __post_init__(self) -> None:
        recipe(self.cell)
        for name in ("hidden", "layers", "epochs", "tbptt", "checkpoint_every", "clip_recurrence"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share from 0 to below 1, got {self.dropout}")
        if self.read is not None and self.read not in READS:
            raise ValueError(f"read: expected one of {', '.join(READS)}, got {self.read!r}")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs, steps: expected one of them, got epochs {self.epochs} and steps {self.steps}")
        if self.patience is not None and self.patience < 0:
            raise ValueError(f"patience: expected 0 or more, got {self.patience}")
        self.configuration(1)

    def configuration(
        self, size: int, default_steps: int | None = None, default_patience: int | None = None
    ) -> TrainingConfiguration:
        """The configuration for this many training samples; the defaults replace settings that are None."""
        one_pass = -(-size // max(1, self.batch))
        steps = self.steps
        if steps is None:
            by_default = EPOCHS * one_pass if default_steps is None else default_steps
            steps = by_default if self.epochs is None else self.epochs * one_pass
        patience = default_patience if self.patience is None else self.patience or None
        return TrainingConfiguration(
            steps,
            self.batch,
            self.lr,
            self.clip,
            self.seed,
            every=one_pass if self.every is None and one_pass <= steps else self.every,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            patience=patience,
            omega=self.omega,
        )

    def shape(self) -> dict[str, Any]:
        """The settings that belong to a `Shape`."""
        names = ("cell", "hidden", "layers", "bidirectional", "dropout", "tbptt", "checkpoint_every", "clip_recurrence")
        return {name: getattr(self, name) for name in names}
