"""Long-lag tasks, with their papers and chance levels."""

from unvanish.train.tasks.adding import Adding, Multiplication
from unvanish.train.tasks.copy_memory import CopyMemory, VariableCopyMemory
from unvanish.train.tasks.digits import Digits, FullMNIST, FullPermutedMNIST, PermutedMNIST, SequentialMNIST
from unvanish.train.tasks.padded_digits import PaddedDigits
from unvanish.train.tasks.reber import EmbeddedReber
from unvanish.train.tasks.recall import DelayedRecall, NoiseFreeLag
from unvanish.train.tasks.task import Task
from unvanish.train.tasks.temporal_order import TemporalOrder, TemporalOrder3

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Adding,
        CopyMemory,
        VariableCopyMemory,
        TemporalOrder,
        TemporalOrder3,
        EmbeddedReber,
        Multiplication,
        NoiseFreeLag,
        DelayedRecall,
        Digits,
        PaddedDigits,
        SequentialMNIST,
        PermutedMNIST,
        FullMNIST,
        FullPermutedMNIST,
    )
}
"""Every task by name."""


def make_task(name: str, length: int | None = None, seed: int = 0) -> Task:
    """The task called `name`.

    Raises:
        ValueError: there is no such task, or it can't have this length or seed.
        MissingExtraError: its images are not installed.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](length, seed)


__all__ = ["TASKS", "Task", "make_task"]
