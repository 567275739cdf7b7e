"""Tasks and training.

Belongs here: tasks, the user's own data, training, comparing, saving and exporting; needs the extra `lab`.
Does not: figures and pages of the results (`report`), the arguments of a command (`cli`).
"""

from unvanish.train.compare import DEFAULT_CELLS, DEFAULT_TASKS, compare, environment
from unvanish.train.configuration import Machines, TrainingConfiguration
from unvanish.train.data.sequences import Sequences
from unvanish.train.data.series import Series
from unvanish.train.data.table import DataError
from unvanish.train.estimators import Forecaster, SequenceClassifier, SequenceRegressor
from unvanish.train.export import export
from unvanish.train.fit import evaluate, fit
from unvanish.train.forecasting import Forecasting
from unvanish.train.from_file import read_data, read_problem
from unvanish.train.language import LanguageModel
from unvanish.train.learn import train_on
from unvanish.train.logs import make_loggers
from unvanish.train.models import RECIPES
from unvanish.train.problems import Classification, Regression
from unvanish.train.records import Comparison, Reach, Run, TaskResult
from unvanish.train.settings import Settings
from unvanish.train.task_problem import TaskProblem
from unvanish.train.tasks import TASKS, make_task
from unvanish.train.trained import Trained

__all__ = [
    "DEFAULT_CELLS",
    "DEFAULT_TASKS",
    "RECIPES",
    "TASKS",
    "Classification",
    "Comparison",
    "DataError",
    "Forecaster",
    "Forecasting",
    "LanguageModel",
    "Machines",
    "Reach",
    "Regression",
    "Run",
    "SequenceClassifier",
    "SequenceRegressor",
    "Sequences",
    "Series",
    "Settings",
    "TaskProblem",
    "TaskResult",
    "Trained",
    "TrainingConfiguration",
    "compare",
    "environment",
    "evaluate",
    "export",
    "fit",
    "make_loggers",
    "make_task",
    "read_data",
    "read_problem",
    "train_on",
]
