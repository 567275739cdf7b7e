"""A task of the suite, with the same interface as the user's data."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from unvanish.train.fit import evaluate
from unvanish.train.models import SequenceModel, Shape
from unvanish.train.problems import DataProblem, Judgement
from unvanish.train.settings import Settings
from unvanish.train.tasks import make_task
from unvanish.train.tasks.task import Generated, Split, Task


class TaskProblem(DataProblem):
    """A task from `TASKS`, with a length and a seed."""

    kind = "task"
    patience = None
    steps = 600

    def __init__(self, task: Task) -> None:
        self.task, self.length, self.shuffle, self.carry = task, task.length, task.shuffle, task.carry
        self.metric = task.metric

    def begin(self, settings: Settings) -> Shape:
        task = self.task
        if settings.epochs is not None and isinstance(task, Generated):
            raise ValueError(f"epochs: the samples of {task.name} are drawn without end; expected steps instead")
        if settings.read == "all" or (task.answers > 1 and (settings.bidirectional or settings.read == "mean")):
            raise ValueError(
                f"read, bidirectional: {task.name} is answered at the end (steps answered: {task.answers}), got "
                f"read={settings.read!r} and bidirectional={settings.bidirectional}"
            )
        read = settings.read or "last"
        return Shape(**settings.shape(), inputs=task.inputs, outputs=task.outputs, read=read, answers=task.answers)

    def size(self, split: Split) -> int:
        return self.task.size(split)

    def dataset(self, split: Split) -> Dataset:
        return self.task.dataset(split)

    def loss(self, answer: Tensor, y: Tensor) -> Tensor:
        return self.task.loss(answer, y)

    def error(self, answer: Tensor, y: Tensor) -> Tensor:
        return self.task.error(answer, y)

    def judge(self, model: SequenceModel) -> Judgement:
        return {"model": {self.metric: evaluate(model, self.task)}, "chance": {self.metric: self.task.chance}}

    def keep(self) -> dict[str, Any]:
        return {"task": {"name": self.task.name, "length": self.task.length, "seed": self.task.seed}}

    @classmethod
    def of(cls, config: dict[str, Any]) -> "TaskProblem":
        """The task that a model was trained on."""
        task = config["task"]
        return cls(make_task(task["name"], task["length"], task["seed"]))

    def tensors(self) -> Iterator[Tensor]:
        return iter(self.task.samples("validation", [0]))
