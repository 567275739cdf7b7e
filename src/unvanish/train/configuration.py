"""How a training is configured, and where it runs."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch

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
"""environment variables set by the launchers: torchrun, Lightning's own, SLURM"""


@dataclass(frozen=True)
class TrainingConfiguration:
    """Updates, batch, optimizer and penalties of a training."""

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
    """the schedule of the learning rate: constant, or a half cosine down to 0"""
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
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 or more, and less than 2^63, got {self.seed}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule: expected one of {', '.join(get_args(Schedule))}, got {self.schedule!r}")

    @property
    def round(self) -> int:
        """Updates per round."""
        return self.every or max(1, self.steps // 20)

    def updates(self, number: int) -> range:
        """The updates of a round; the last round may be shorter."""
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
        """Whether this is the process that writes and prints."""
        return self.processes == 1 or all(os.environ.get(name, "0") == "0" for name in RANKS)
