"""A comparison on the terminal: tables that fit 80 columns, and the verdict in words."""

from typing import TYPE_CHECKING

from unvanish.extras import extra
from unvanish.report import wording

if TYPE_CHECKING:
    from unvanish.train.records import Comparison, TaskResult

with extra("report"):
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

WIDE = 72
"""columns that the whole table takes; on a narrower terminal rate and half-life are left out, not cut off"""
_COLOUR = {"solved": "green", "partly": "yellow", "chance": "red"}


def print_comparison(comparison: "Comparison", console: Console) -> None:
    """One table and three sentences per task."""
    for task in comparison.tasks:
        console.print(_table(task, wide=console.width >= WIDE))
        for sentence in (wording.survival(task), wording.learning(task), wording.explanation(task)):
            console.print(sentence, markup=False, highlight=False)
        console.print()


def _table(task: "TaskResult", wide: bool) -> Table:
    title = f"{task.title}, {task.length} steps. {task.metric.capitalize()}, chance {task.chance:.3g}"
    table = Table(
        title=escape(title),
        caption=("rate: nats per step; half-life: steps, both before training; " if wide else "")
        + "reach: steps at which 1 % remains, before → after training",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("model", max_width=24 if wide else 14, overflow="ellipsis", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for name in ("rate", "half-life", "reach") if wide else ("reach",):
        table.add_column(name, justify="right", no_wrap=True)
    for run in task.runs:
        outcome = wording.outcome(task, run)
        table.add_row(
            escape(run.title),
            f"{run.test_error:.3g}",
            f"[{_COLOUR[outcome]}]{outcome}[/]",
            *((f"{run.before.rate:.3f}", wording.half_life(run.before)) if wide else ()),
            f"{run.before.reach} → {run.after.reach}",
        )
    return table
