"""Tasks and training."""

from unvanish.train.compare import DEFAULT_CELLS, DEFAULT_TASKS, compare, environment
from unvanish.train.models import RECIPES
from unvanish.train.records import Comparison, Reach, Run, TaskResult
from unvanish.train.tasks import TASKS

__all__ = [
    "DEFAULT_CELLS",
    "DEFAULT_TASKS",
    "RECIPES",
    "TASKS",
    "Comparison",
    "Reach",
    "Run",
    "TaskResult",
    "compare",
    "environment",
]
