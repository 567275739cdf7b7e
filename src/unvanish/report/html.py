"""The report: one self-contained page, opens offline, made from records alone."""

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from unvanish.draw import LINES, LN10, decades, line, short
from unvanish.flow.files import write_atomically
from unvanish.report import verdict
from unvanish.report.plot import spans_decades
from unvanish.train.records import Comparison, GradientBreakdown, Reach, TaskResult


def write_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Does the gradient survive, who learns, why, what to do, how was this measured: one HTML file.

    Raises:
        OSError: the file can't be written.
    """
    data = {task.name: _task_data(task) for task in comparison.tasks}
    palette = [{"colour": style.colour, "dash": style.dash} for style in LINES]
    page = _render(
        "comparison.html.j2",
        comparison=comparison,
        verdict=verdict,
        colour=line,
        data=_script_safe({"palette": palette, "tasks": data}),
    )
    write_atomically(Path(path), page.encode())


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("unvanish.report", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["code"] = _code
    from plotly.offline import get_plotlyjs

    assets = files("unvanish.report") / "assets"
    return environment.get_template(template).render(
        plotly=get_plotlyjs(),
        css=(assets / "report.css").read_text("utf-8"),
        js=(assets / "report.js").read_text("utf-8"),
        **values,
    )


def _code(text: str) -> Markup:
    """Text, escaped, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _script_safe(data: Any) -> str:
    """JSON that can stand inside a script element: no "<" that could end it, no line separators that JavaScript reads
    as ends."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _task_data(task: TaskResult) -> dict[str, Any]:
    return {
        "metric": task.metric,
        "chance": task.chance,
        "logError": spans_decades(task),
        "solvedBelow": task.solved_below,
        "runs": [
            {
                "title": short(run.title),
                "colour": line(index).colour,
                "dash": line(index).dash,
                "update": run.curve_update,
                "error": run.curve_error,
                "moments": [_moment(m) for m in (run.before, *run.during, run.after)],
                "breakdown": [_breakdown(a) for a in run.breakdown],
                "cures": [{"title": short(cure.title), "moment": _moment(cure.reach)} for cure in run.cures],
            }
            for index, run in enumerate(task.runs)
        ],
    }


def _moment(reach: Reach) -> dict[str, Any]:
    return {
        "update": reach.update,
        "lag": reach.lag,
        "middle": decades(reach.log_norm),
        "low": decades(reach.low),
        "high": decades(reach.high),
    }


def _breakdown(a: GradientBreakdown) -> dict[str, Any]:
    return {
        "steps": a.steps,
        "share": a.share,
        "subgradient": _powers(a.subgradient),
        "partialSums": _powers(a.partial_sums),
        "tau": a.time_constants,
        "sources": a.sources,
        "map": [_powers(row) for row in a.map],
    }


def _powers(log_norm: list[float | None]) -> list[float | None]:
    return [None if value is None else round(value / LN10, 4) for value in log_norm]
