"""The report: one self-contained page, opens offline, made from records alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from unvanish.draw import LINES, decades, steps
from unvanish.draw.preview import Preview, PreviewCurve, before_and_after
from unvanish.flow.files import write_page
from unvanish.report import story, wording
from unvanish.report.page_data import task_data
from unvanish.report.still_picture import still

if TYPE_CHECKING:
    from unvanish.train.records import Comparison

SCRIPTS = ("frame", "hero", "parts", "cell", "training", "update", "page")
"""in the order in which they run"""
LIFT = 0.35
"""how far the palette is moved towards white on a dark ground"""


def write_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write the report as one HTML file: which gradients survive, which models learn, why, what to do, how it was
    measured. Next to it, the card of the first task, 1200 × 630, as PNG and SVG ("report-card.png").

    Raises:
        OSError: the file can't be written.
    """
    page = _render(
        "comparison.html.j2",
        comparison=comparison,
        wording=wording,
        story=story,
        still=still,
        drawing=Markup(_asset("lstm.svg")),
        data=_script_safe({"tasks": [task_data(task) for task in comparison.tasks]}),
    )
    write_page(path, page, comparison_preview(comparison))


def comparison_preview(comparison: Comparison) -> Preview:
    """The card of the page: how far the plain network's gradient reaches in the first task, and the cure's."""
    task = comparison.tasks[0]
    plain, best = story.forgetful(task), story.enduring(task)
    runs = [run for run in (plain, best) if run is not None] or task.runs[:1]
    reached, compared = [run.before.reach for run in runs], len(runs) == 2
    result = before_and_after(*reached) if compared else f"reach {reached[0]} of {steps(runs[0].before.lag[-1])}"
    curves = [PreviewCurve(r.title, decades(r.before.log_norm), pale=compared and r is plain) for r in runs]
    return Preview(task.title, result, f"{story.headline(task)} {story.lead(task)}", curves)


def live_page(folder: str) -> str:
    """The page of `unvanish live`, which asks its server for the records again and again."""
    return _render("live.html.j2", scripts=("frame", "live"), folder=folder, data="{}")


def _render(template: str, *, scripts: Sequence[str] = SCRIPTS, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("unvanish.report", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["code"] = _code
    program = "".join(_asset(f"js/{name}.js") for name in scripts)
    return environment.get_template(template).render(
        d3=_asset("d3.min.js"),
        css=_asset("report.css").replace("LIGHT", palette(0.0)).replace("DARK", palette(LIFT)),
        js=f'"use strict";(() => {{\n{program}}})();',
        **values,
    )


def palette(lift: float) -> str:
    """The colours of the lines as CSS variables, moved towards white by a share."""
    return "".join(f"--s{index}: {lighter(style.colour, lift)}; " for index, style in enumerate(LINES))


def lighter(colour: str, share: float) -> str:
    """A colour "#rrggbb", moved towards white by a share."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(v + share * (255 - v)):02x}" for v in channels)


def _asset(name: str) -> str:
    return (files("unvanish.report") / "assets" / name).read_text("utf-8")


def _code(text: str) -> Markup:
    """Text, escaped, with the parts between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _script_safe(data: Any) -> str:
    """JSON that is safe inside a script element: no "<" that could end it, and none of the line separators that end a
    line in JavaScript."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
