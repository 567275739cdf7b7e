"""The page's first picture as a still SVG, for readers without JavaScript: whose gradient remains over the lag."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from unvanish.draw import decades, line, short
from unvanish.report.story import alternatives
from unvanish.report.wording import power_of_ten

if TYPE_CHECKING:
    from unvanish.train.records import Run, TaskResult

LOWEST, HIGHEST = -60, 2
"""powers of ten: the axis of every picture of a gradient over the lag"""
REACHED, FLOAT32 = -2.0, math.log10(1.17549435e-38)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 360, 190, 60, 20, 40
APART = 17.0
"""the distance between the labels at the lines' ends"""


def still(task: TaskResult) -> Markup:
    """ln‖∂E_T/∂s_{T−ℓ}‖ over ℓ before training, each line labelled at its end, with the lines of 1 % and of float32's
    smallest number."""
    parts = [
        f'<svg class="still night" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(alternatives(task)["hero"])}">'
    ]
    parts += [
        _level(power, "tick") + _text(WIDTH - RIGHT + 6, _y(power) + 4, _power(power), "start", "soft")
        for power in range(LOWEST, HIGHEST, 10)
    ]
    parts += [
        _level(power, "bound") + _text(LEFT + 6, _y(power) + 14, words, "start", "soft halo")
        for power, words in ((REACHED, "1 %: reach"), (FLOAT32, "float32’s smallest number"))
    ]
    parts += [_curve(run, index) for index, run in enumerate(task.runs)]
    ends = sorted((_end(run), index) for index, run in enumerate(task.runs))
    place = -math.inf
    for y, index in ends:
        place = max(y, place + APART)
        run = task.runs[index]
        words = f"{short(run.title, 22)}  {power_of_ten(run.before.log_norm[-1])}"
        parts.append(_text(LEFT - 8, place + 4, words, "end", "label", f"--c:var(--s{index % 8})"))
    lag = task.runs[0].before.lag[-1]
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 12, "error at the last step", "end", "soft"))
    parts.append(_text(LEFT, HEIGHT - 12, f"{lag} steps before", "start", "soft"))
    return Markup("".join(parts) + "</svg>")


def _y(power: float) -> float:
    inside = min(max(power, LOWEST), HIGHEST)
    return TOP + (HIGHEST - inside) / (HIGHEST - LOWEST) * (HEIGHT - TOP - BOTTOM)


def _end(run: Run) -> float:
    last = decades(run.before.log_norm)[-1]
    return _y(LOWEST if last is None else last)


def _curve(run: Run, index: int) -> str:
    lag = run.before.lag
    x = [WIDTH - RIGHT - step / max(1, lag[-1]) * (WIDTH - LEFT - RIGHT) for step in lag]
    points = [
        f"{px:.0f},{_y(power):.1f}"
        for px, power in zip(x, decades(run.before.log_norm), strict=True)
        if power is not None
    ]
    style = f"--c:var(--s{index % 8})"
    return (
        f'<polyline class="curve" style="{style}" stroke-dasharray="{line(index).dash}" points="{" ".join(points)}"/>'
    )


def _level(power: float, kind: str) -> str:
    where = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(power):.1f}" y2="{_y(power):.1f}"'
    return f'<g class="{kind}"><line class="{kind}" {where}/></g>'


def _text(x: float, y: float, words: str, anchor: str, kind: str, style: str = "") -> str:
    where = f'x="{x:.0f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}" style="{style}"'
    return f"<text {where}>{escape(words)}</text>"


def _power(power: int) -> str:
    return "1" if power == 0 else power_of_ten(power * math.log(10))
