"""Strips: one small chart per row on common axes, as SVG that stretches with the page while its labels do not."""

import math
from collections.abc import Sequence
from html import escape
from typing import Literal, NamedTuple

from unvanish.draw.html_parts import Tone

POINTS = 300
"""the most points of a curve, so that a page stays small"""
WIDTH, HEIGHT = 1000, 100
"""the size of a chart, in its own units"""
ROOM = 1.08
"""the length of the axis relative to the longest bar, so that the line at its end is visible"""


class Curve(NamedTuple):
    """Powers of ten over x."""

    name: str
    """shown in the key"""
    kind: Literal["main", "second", "ghost"]
    x: Sequence[float]
    y: Sequence[float]
    """−∞ where the value is exactly 0, NaN where there is none"""


class Strip(NamedTuple):
    """One row."""

    name: str
    value: str
    """the result, at the end of the row's heading"""
    tone: Tone
    says: str
    """the result in a sentence, for readers who can't see the picture"""
    curves: Sequence[Curve]
    mark: float | None = None
    """x at which a line is drawn"""


class Bar(NamedTuple):
    """A value against a limit."""

    name: str
    result: str
    """in words, beside the name"""
    value: float
    limit: float
    tone: Tone


class Axes(NamedTuple):
    """The axes shared by all rows."""

    x: tuple[float, float]
    y: tuple[float, float]
    """powers of ten; a curve ends where it leaves the range for good, and runs along the edge where it comes back"""
    x_name: str
    ticks: Sequence[tuple[float, str]]
    """(power of ten, label)"""
    guide: float | None = None
    """power of ten at which a dotted line is drawn"""


def strips(rows: Sequence[Strip], axes: Axes, caption: str) -> str:
    """The figure as HTML."""
    body = "\n".join(_strip(row, axes) for row in rows)
    curves = {curve.name: curve.kind for row in rows for curve in row.curves}
    key = "".join(
        f'<span><svg viewBox="0 0 10 2" preserveAspectRatio="none" aria-hidden="true"><path class="curve {kind}" '
        f'd="M0 1H10"/></svg>{escape(name)}</span>'
        for name, kind in curves.items()
    )
    return (
        f'<figure>\n<p class="key">{key}</p>\n{body}\n<div class="axis" aria-hidden="true">{_steps(axes)}</div>\n'
        f'<p class="axisname">{escape(axes.x_name)}</p>\n<figcaption>{escape(caption)}</figcaption>\n</figure>'
    )


def bars(rows: Sequence[Bar], caption: str) -> str:
    """Bars from 0 on one axis as HTML; only the rows' text if a value or limit is negative, so that no bar fits."""
    finite = [v for row in rows for v in (row.value, row.limit) if math.isfinite(v)]
    most = ROOM * max(finite, default=0.0)
    drawn = most > 0 and min(finite) >= 0
    body = "\n".join(
        f'<div class="strip {row.tone}">{_head(row.name, row.result)}{_bar(row, most) if drawn else ""}</div>'
        for row in rows
    )
    return f"<figure>\n{body}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _bar(row: Bar, most: float) -> str:
    length, limit = (WIDTH * v / most if math.isfinite(v) else 0.0 for v in (row.value, row.limit))
    return (
        f'<div class="plot low"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{row.name}: {row.result}; the line is at {row.limit:.4g}")}">'
        f'<rect class="frame" width="{WIDTH}" height="{HEIGHT}"/>'
        f'<rect class="bar" y="20" width="{max(length, 3):.1f}" height="60"/>'
        f'<path class="limit" d="M{limit:.1f} 0V{HEIGHT}"/></svg></div>'
    )


def _head(name: str, value: str) -> str:
    return f'<div class="head"><span>{escape(name)}</span><span class="tag">{escape(value)}</span></div>'


def _strip(row: Strip, axes: Axes) -> str:
    bottom, top = axes.y
    levels = [(_height(power, axes), label) for power, label in axes.ticks if bottom <= power <= top]
    drawn = [f'<rect class="frame" width="{WIDTH}" height="{HEIGHT}"/>']
    drawn += [f'<path class="grid" d="M0 {y:.1f}H{WIDTH}"/>' for y, _ in levels]
    if axes.guide is not None:
        drawn.append(f'<path class="guide" d="M0 {_height(axes.guide, axes):.1f}H{WIDTH}"/>')
    if row.mark is not None:
        drawn.append(f'<path class="mark" d="M{_along(row.mark, axes):.1f} 0V{HEIGHT}"/>')
    drawn += [_curve(curve, axes) for curve in row.curves]
    labels = "".join(
        f'<span class="tick" style="top:{y:.1f}%" aria-hidden="true">{label}</span>' for y, label in levels
    )
    return (
        f'<div class="strip {row.tone}">{_head(row.name, row.value)}\n<div class="plot">{labels}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(row.says)}">'
        f"{''.join(drawn)}</svg></div></div>"
    )


def _curve(curve: Curve, axes: Axes) -> str:
    points = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if not math.isnan(y)]
    bottom, top = axes.y
    inside = [place for place, (_, y) in enumerate(points) if bottom <= y <= top]
    if not inside:
        return ""
    points = points[max(inside[0] - 1, 0) : inside[-1] + 2]
    line = " ".join(f"{_along(x, axes):.1f},{_height(y, axes):.1f}" for x, y in _thinned(points))
    ends = f"{_along(points[-1][0], axes):.1f},{HEIGHT} {_along(points[0][0], axes):.1f},{HEIGHT}"
    area = f'<polygon class="area" points="{line} {ends}"/>' if curve.kind == "main" else ""
    return f'{area}<polyline class="curve {curve.kind}" points="{line}"/>'


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lowest and the highest of each group of neighbours, so that no peak is lost."""
    if len(points) <= POINTS:
        return points
    size = math.ceil(2 * len(points) / POINTS)
    out = [points[0]]
    for start in range(0, len(points), size):
        group = points[start : start + size]
        out += sorted({min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])})
    return [*out, points[-1]]


def _along(x: float, axes: Axes) -> float:
    low, high = axes.x
    return WIDTH * (x - low) / (high - low) if high > low else 0.0


def _height(power: float, axes: Axes) -> float:
    low, high = axes.y
    return HEIGHT * (high - min(max(power, low), high)) / (high - low)


def _steps(axes: Axes) -> str:
    low, high = axes.x
    places = dict.fromkeys([low, *(round(low + k * (high - low) / 4) for k in (1, 2, 3)), high])
    return "".join(f'<span style="left:{_along(x, axes) / WIDTH:.1%}">{x:g}</span>' for x in places)
