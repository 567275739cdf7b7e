"""Progress of several trainings: what is happening in a line, and a bar for each."""

from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Bars(Progress):
    """Rich's bars under a line of text."""

    line = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.line:
            yield Text(self.line, style="dim", no_wrap=True, overflow="ellipsis")
        yield from super().get_renderables()


class TrainingBars:
    """A line that says what is happening, and one bar per training, with the latest validation error and the time left.

    Where the output is no terminal, each line is printed as it comes.
    """

    def __init__(self, console: Console) -> None:
        self._progress = _Bars(
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
        self._progress.line = ""
        self._progress.stop()

    def say(self, text: str) -> None:
        """What is happening from now on."""
        if self._progress.console.is_terminal:
            self._progress.line = text
        else:
            self._progress.console.print(text, markup=False, highlight=False)

    def update(self, label: str, done: int, total: int, error: float | None) -> None:
        """An update has been done by the training of this label."""
        if label not in self._bars:
            self._bars[label] = self._progress.add_task(label, total=total, error="")
        shown = "" if error is None else f"error {error:.3f}"
        self._progress.update(self._bars[label], completed=done, error=shown)
