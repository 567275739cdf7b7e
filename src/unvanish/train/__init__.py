"""Tasks and training."""

from unvanish.train.compare import DEFAULT_CELLS, DEFAULT_TASKS, compare, environment
from unvanish.train.data import DataError, Sequences, read_csv
from unvanish.train.models import RECIPES
from unvanish.train.records import Comparison, Reach, Run, TaskResult
from unvanish.train.supervised import Settings, Trained, train_on
from unvanish.train.tasks import TASKS

__all__ = [
    "DEFAULT_CELLS",
    "DEFAULT_TASKS",
    "RECIPES",
    "TASKS",
    "Comparison",
    "DataError",
    "Reach",
    "Run",
    "Sequences",
    "Settings",
    "TaskResult",
    "Trained",
    "compare",
    "environment",
    "read_csv",
    "train_on",
]
