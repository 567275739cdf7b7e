"""The display of a flow in a notebook: a table of the layers over a picture of the gradient remaining, layer × lag."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal, NamedTuple

import torch

from unvanish.draw import fraction, short, steps
from unvanish.flow.record import LayerFlow

CELLS = 100
"""the most cells of a strip"""
DARK = -8.0
"""power of ten of the peak at which a strip is empty"""
GROWN = 2.0
"""the gradient counts as growing if its peak is more than this many powers of ten above the first step it reaches"""
STRIP, LINE = 420, 120
"""widths of the strip and of the curve in the table, pixels"""
_FRAME = "max-width:52rem;overflow-x:auto;font:.9rem/1.5 system-ui,sans-serif"
_TABLE = "border-collapse:collapse;white-space:nowrap;font-variant-numeric:tabular-nums;background:none"
_CELL = "padding:.15rem .9rem .15rem 0;text-align:left;border:0"
_SMALL = "opacity:.75;font-size:.8rem"

Verdict = Literal["fades", "arrives", "grows", "no gradient", "not finite", "travels no step", "not judged"]


class Course(NamedTuple):
    """The median gradient norm of one layer on its way through time."""

    way: list[float]
    """log10 of the norm relative to the peak over the lag: steps from the peak, in the direction in which the gradient
    travels; −∞ where it is 0; empty where no gradient arrived, or not a finite one"""
    peak: float
    at: int
    """step of the peak"""
    above: int
    """the reach: steps from the peak over which the norm stays above 1 % of it"""
    grown: float
    """log10 of the peak relative to the first step that a gradient reached"""
    broken: int | None = None
    """the first step on its way at which some sample's norm is NaN or infinite"""

    @property
    def missing(self) -> str:
        """Why nothing can be said about the gradient's course, in words; "" where something can."""
        if self.broken is not None:
            return f"the gradient is NaN or infinite at t={self.broken}"
        return "" if self.way else "no gradient arrived"

    @property
    def lags(self) -> int:
        """The steps that the gradient travels after its peak; 0 where the peak is at the end."""
        return max(0, len(self.way) - 1)

    @property
    def still(self) -> bool:
        """Whether it arrives only at the last step of its way, as with a single step, and so travels over none."""
        return bool(self.way) and not self.lags and self.grown == 0


def course(record: LayerFlow) -> Course:
    """The course of ∂E/∂c_t where there is a cell state, of ∂E/∂h_t elsewhere."""
    norms = record.dh if record.dc is None else record.dc
    present = torch.arange(len(norms), device="cpu")[:, None] < record.lengths[None, :]
    if not norms.numel():
        return Course([], 0.0, 0, 0, 0.0)
    backwards = record.name.endswith(".reverse")
    broken = (present & ~norms.isfinite()).any(1).nonzero().flatten().tolist()
    if broken:
        at = broken[0 if backwards else -1]
        return Course([], math.nan, at, 0, 0.0, at)
    middle = torch.where(present, norms, torch.nan).nanmedian(1).values.nan_to_num(0.0)
    from_source = middle if backwards else middle.flip(0)
    start = int(from_source.argmax())
    at = start if backwards else len(middle) - 1 - start
    peak = float(middle[at])
    if peak == 0:
        return Course([], peak, at, 0, 0.0)
    powers = (from_source / peak).log10()
    source = int(powers.isfinite().nonzero()[0])
    way = powers[start:].tolist()
    above = next((lag for lag, power in enumerate(way) if power <= -2), len(way)) - 1
    return Course(way, peak, at, above, -float(powers[source]))


def verdict(record: LayerFlow, found: Course) -> Verdict:
    """What happens to the gradient on its way, from its norm alone."""
    if found.broken is not None:
        return "not finite"
    if not record.valid:
        return "not judged"
    if not found.way:
        return "no gradient"
    if found.still:
        return "travels no step"
    if found.grown > GROWN:
        return "grows"
    return "arrives" if found.above == found.lags else "fades"


def in_words(record: LayerFlow) -> str:
    """Reach and peak in a line."""
    found = course(record)
    if found.missing:
        return found.missing
    if len(record.dh) == 1:
        return f"{found.peak:.2g} at the only step"
    if found.still:
        return f"{found.peak:.2g} at t={found.at} alone, where its way ends"
    if not found.lags:
        return f"does not fade on its way; peak {found.peak:.2g} at t={found.at}, where it ends"
    return f"reach {_reach(found)}, peak {found.peak:.2g} at t={found.at}; {_rest(found)} remains at the end of its way"


def card(layers: Mapping[str, LayerFlow], skipped: Mapping[str, str]) -> str:
    """Self-contained HTML; every name is escaped, none breaks in its middle."""
    heads = ("layer", "gradient over t", "reach", "at the far end", "verdict", "valid")
    head = "".join(f'<th style="{_CELL};font-weight:600">{name}</th>' for name in heads)
    courses = {name: course(record) for name, record in layers.items()}
    rows = "".join(_row(record, courses[name]) for name, record in layers.items())
    left = "".join(
        f"<li>{escape(name or 'the model')}: not recorded: {escape(why)}</li>" for name, why in skipped.items()
    )
    notes = f'<ul style="margin:.3rem 0 0;padding-left:1.2rem">{left}</ul>' if left else ""
    return (
        f'<div style="{_FRAME}"><table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"{_strips(layers, courses)}{notes}"
        f'<div style="{_SMALL}">Median over samples. Reach: steps back from the peak over which the norm stays above '
        "1 % of it. With an error at every step, the norm is that of a sum and says nothing about reach.</div>"
        "</div>"
    )


def _row(record: LayerFlow, found: Course) -> str:
    cells = (
        f"{escape(short(record.name))} ({escape(record.cell)})",
        _curve(record, found),
        _reach(found) if found.lags else "–",
        "–" if found.missing or found.still else _rest(found),
        verdict(record, found),
        "yes" if record.valid else escape(f"no: {short(record.problem or '', 60)}"),
    )
    return "<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells) + "</tr>"


def _curve(record: LayerFlow, found: Course) -> str:
    """The norm over t, as far as the gradient travels from its peak; a layer read in reverse runs to the right."""
    backwards = record.name.endswith(".reverse")
    T, lags = len(record.dh), _places(len(found.way), LINE // 2)
    points = " ".join(
        f"{LINE * ((found.at + lag) if backwards else (found.at - lag)) / max(1, T - 1):.1f},"
        f"{21 - 20 * _lightness(found.way[lag]):.1f}"
        for lag in lags
    )
    way = "read in reverse, from the first step to the last" if backwards else "from the last step to the first"
    says = found.missing or f"{_rest(found)} at the end of its way, {way}"
    return (
        f'<svg width="{LINE}" height="22" role="img" aria-label="{says}" style="display:block">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )


def _strips(layers: Mapping[str, LayerFlow], courses: Mapping[str, Course]) -> str:
    """Layer × lag, on one axis for all layers: filled by the logarithm of the norm."""
    most = max((len(found.way) for found in courses.values()), default=0)
    if most < 2:
        return ""
    rows = "".join(
        f'<tr><td style="{_CELL}">{escape(short(layers[name].name))}</td>'
        f'<td style="padding:0;border:0">{_strip(found, most)}</td></tr>'
        for name, found in courses.items()
        if found.way
    )
    axis = (
        f'<tr><td style="border:0"></td><td style="padding:0;border:0"><div style="{_SMALL};width:{STRIP}px;'
        f'display:flex;justify-content:space-between"><span>lag 0</span><span>filled: at its peak; empty: below '
        f"{fraction(DARK)} of it</span><span>{most - 1}</span></div></td></tr>"
    )
    return f'<table style="{_TABLE};margin-top:.5rem"><tbody>{rows}{axis}</tbody></table>'


def _strip(found: Course, most: int) -> str:
    """One row; the part beyond the layer's own steps has no frame."""
    places = _places(len(found.way), CELLS)
    own = STRIP * len(found.way) / most
    width = own / len(places)
    boxes = "".join(
        f'<rect x="{i * width:.1f}" width="{width + 0.3:.1f}" height="14" '
        f'fill-opacity="{0.9 * _lightness(found.way[lag]):.2f}"/>'
        for i, lag in enumerate(places)
    )
    says = f"reach {_reach(found)}" if found.lags else "largest at the end of its way"
    return (
        f'<svg width="{STRIP}" height="16" role="img" aria-label="{says}" fill="currentColor" '
        f'style="display:block">{boxes}<rect x=".5" y=".5" width="{own - 1:.1f}" height="14" fill="none" '
        f'stroke="currentColor" stroke-opacity=".5"/></svg>'
    )


def _lightness(power: float) -> float:
    return 1 - min(max(power / DARK, 0.0), 1.0)


def _places(length: int, most: int) -> Sequence[int]:
    """At most this many of the lags, including the first and the last."""
    return range(length) if length <= most else [round(i * (length - 1) / (most - 1)) for i in range(most)]


def _reach(found: Course) -> str:
    return f"{found.above} of {steps(found.lags)}"


def _rest(found: Course) -> str:
    """The fraction of the peak at the step that the gradient reaches last, in words."""
    if not found.lags:
        return "its peak"
    end = found.way[-1]
    if end == -math.inf:
        return "nothing"
    return "all of the peak" if end == 0 else f"{fraction(end)} of the peak"
