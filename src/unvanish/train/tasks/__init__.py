"""Long-lag tasks, each in its own file with its paper and chance level."""

from collections.abc import Callable

from unvanish.train.tasks.adding import Adding
from unvanish.train.tasks.base import Task
from unvanish.train.tasks.digits import Digits

TASKS: dict[str, Callable[[int | None, int], Task]] = {"adding": Adding, "digits": Digits}


def make_task(name: str, length: int | None = None, seed: int = 0) -> Task:
    """The task called `name`.

    Raises:
        ValueError: there is no such task, or it can't have this length.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](length, seed)


__all__ = ["TASKS", "Task", "make_task"]
