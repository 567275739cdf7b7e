"""The numbers that the page's pictures are drawn from: powers of ten, rounded, thinned where a curve is dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unvanish.draw import LN10, decades, line, short
from unvanish.report.story import alternatives, story
from unvanish.report.wording import fate, power_of_ten

if TYPE_CHECKING:
    from unvanish.train.records import BiasReach, GradientBreakdown, Reach, Rescue, Run, TaskResult

POINTS = 80
"""the most points of a curve that is one of many"""


def task_data(task: TaskResult) -> dict[str, Any]:
    """One task, as `report.js` reads it."""
    lag = task.runs[0].before.lag[-1]
    return {
        "title": task.title,
        "metric": task.metric,
        "steps": task.settings["steps"],
        "lag": lag,
        "length": task.length,
        "chance": task.chance,
        "solvedBelow": task.solved_below,
        "runs": [_run(run, index, task) for index, run in enumerate(task.runs)],
        "bias": [_bias(found) for found in task.forget_bias],
        "alt": alternatives(task),
    }


def _run(run: Run, index: int, task: TaskResult) -> dict[str, Any]:
    first = run.trials[0]
    return {
        "title": short(run.title, 24),
        "series": index % 8,
        "dash": line(index).dash,
        "before": _powers(run.before.log_norm),
        "after": _powers(run.after.log_norm),
        "fate": fate(run.before),
        "kept": power_of_ten(run.before.log_norm[-1]),
        "moments": [_moment(moment) for moment in run.moments],
        "curves": [{"seed": t.seed, "update": t.curve_update, "error": _digits(t.curve_error)} for t in run.trials],
        "first": {"update": first.curve_update, "error": _digits(first.curve_error)},
        "breakdown": [_breakdown(found) for found in run.breakdown],
        "rescue": None if run.rescue is None else _rescue(run.rescue),
        "story": story(task, run),
    }


def _moment(reach: Reach) -> dict[str, Any]:
    lag, middle = _thin(reach.lag), _powers(_thin(reach.log_norm))
    return {"update": reach.update, "reach": reach.reach, "lag": lag, "middle": middle}


def _bias(found: BiasReach) -> dict[str, Any]:
    lag, middle = _thin(found.reach.lag), _powers(_thin(found.reach.log_norm))
    return {"bias": found.bias, "reach": found.reach.reach, "lag": lag, "middle": middle}


def _breakdown(found: GradientBreakdown) -> dict[str, Any]:
    return {
        "steps": found.steps,
        "kept": {name: _tens(values) for name, values in found.kept.items()},
        "all": _tens(found.kept_in_all),
        "subgradient": _tens(found.subgradient),
        "partial": _tens(found.partial_sums),
        "lastSteps": found.last_steps,
    }


def _rescue(found: Rescue) -> dict[str, Any]:
    lag, middle = _thin(found.reach.lag), _powers(_thin(found.reach.log_norm))
    return {
        "gate": found.gate,
        "before": found.before,
        "after": found.after,
        "lag": lag,
        "middle": middle,
        "reach": found.reach.reach,
    }


def _thin(values: Sequence[Any]) -> list[Any]:
    """At most `POINTS` of them, the first and the last included."""
    last = len(values) - 1
    if last < POINTS:
        return list(values)
    return [values[round(i * last / (POINTS - 1))] for i in range(POINTS)]


def _powers(log_norm: Sequence[float]) -> list[float | None]:
    return [None if value is None else round(value, 3) for value in decades(log_norm)]


def _tens(log_norm: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value / LN10, 3) for value in log_norm]


def _digits(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
