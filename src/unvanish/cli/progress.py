"""Progress bars for several trainings."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from unvanish.train.tasks import Task


class TrainingBars:
    """One bar per model, with the latest validation error and the time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[error]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def tell(self, task: Task, cell: str, done: int, total: int, error: float | None) -> None:
        """An update has been done, by a cell on a task."""
        self.update(f"{task.name} {cell}", done, total, error)

    def update(self, label: str, done: int, total: int, error: float | None) -> None:
        """An update has been done by the training of this label."""
        if label not in self._bars:
            self._bars[label] = self._progress.add_task(label, total=total, error="")
        shown = "" if error is None else f"error {error:.3f}"
        self._progress.update(self._bars[label], completed=done, error=shown)
