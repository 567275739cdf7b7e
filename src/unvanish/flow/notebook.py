"""How a flow shows itself in a notebook: a table of the layers, each with its curve, over strips of what remains."""

import math
from collections.abc import Mapping
from html import escape
from typing import NamedTuple

import torch

from unvanish.draw import short, steps
from unvanish.flow.record import LayerFlow

CELLS = 60
"""of a strip, at most"""
DARK = -8.0
"""power of ten of the peak at which a strip is empty"""
_FRAME = "max-width:52rem;overflow-x:auto;font:.9rem/1.5 system-ui,sans-serif"
_TABLE = "border-collapse:collapse;white-space:nowrap;font-variant-numeric:tabular-nums;background:none"
_CELL = "padding:.15rem .9rem .15rem 0;text-align:left;border:0"


class Course(NamedTuple):
    """The median gradient norm of one layer over its steps."""

    powers: list[float]
    """log10 of the norm relative to the peak, per step; −∞ where it is 0"""
    peak: float
    at: int
    """step of the peak"""
    above: int
    """steps from the peak, in the direction in which the gradient travels, over which the norm stays above 1 % of it"""
    end: float
    """log10 of what remains at the step that the gradient reaches last"""


def course(record: LayerFlow) -> Course:
    """The course of ∂E/∂c_t where there is a cell state, of ∂E/∂h_t elsewhere."""
    norms = record.dh if record.dc is None else record.dc
    present = torch.arange(len(norms))[:, None] < record.lengths[None, :]
    if not norms.numel():
        return Course([], 0.0, 0, 0, -math.inf)
    middle = torch.where(present, norms, torch.nan).nanmedian(1).values.nan_to_num(0.0)
    at = int(middle.argmax())
    peak = float(middle[at])
    if not 0 < peak < math.inf:
        return Course([-math.inf] * len(middle), peak, at, 0, -math.inf)
    powers = (middle / peak).log10().tolist()
    way = powers[at:] if record.name.endswith(".reverse") else powers[at::-1]
    above = next((lag for lag, power in enumerate(way) if power <= -2), len(way)) - 1
    return Course(powers, peak, at, above, way[-1])


def in_words(record: LayerFlow) -> str:
    """Peak and how far the norm stays above 1 % of it, in a line."""
    found = course(record)
    if not found.peak > 0:
        return "no gradient arrived"
    return f"peak {found.peak:.2g} at t={found.at}; above 1 % of it for {steps(found.above)} back; {_rest(found)}"


def card(layers: Mapping[str, LayerFlow], skipped: Mapping[str, str]) -> str:
    """Self-contained HTML; every name is escaped, none breaks in its middle."""
    heads = ("layer", "cell", "gradient over t", "above 1 % of its peak", "at the far end", "valid")
    head = "".join(f'<th style="{_CELL};font-weight:600">{name}</th>' for name in heads)
    rows = "".join(_row(record) for record in layers.values())
    left = "".join(
        f"<li>{escape(name or 'the model')}: not recorded: {escape(why)}</li>" for name, why in skipped.items()
    )
    notes = f'<ul style="margin:.3rem 0 0;padding-left:1.2rem">{left}</ul>' if left else ""
    return (
        f'<div style="{_FRAME}"><table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"{notes}"
        '<div style="opacity:.75;font-size:.8rem">Median over samples. Filled: the norm is at its peak; empty: below '
        "10⁻⁸ of it. Where an error enters at every step this is the sum of all, and says nothing about reach.</div>"
        "</div>"
    )


def _row(record: LayerFlow) -> str:
    found = course(record)
    cells = (
        escape(short(record.name)),
        escape(record.cell),
        _strip(found),
        f"{found.above} of {steps(max(0, len(found.powers) - 1))}",
        _rest(found),
        "yes" if record.valid else escape(f"no: {short(record.problem or '', 60)}"),
    )
    return "<tr>" + "".join(f'<td style="{_CELL}">{cell}</td>' for cell in cells) + "</tr>"


def _strip(found: Course) -> str:
    """Cells filled by the logarithm of the norm, and its curve over them."""
    T = len(found.powers)
    places = range(T) if T <= CELLS else [round(i * (T - 1) / (CELLS - 1)) for i in range(CELLS)]
    shares = [1 - min(max(found.powers[t] / DARK, 0.0), 1.0) for t in places]
    width = 240 / max(1, len(shares))
    boxes = "".join(
        f'<rect x="{i * width:.1f}" width="{width:.1f}" height="22" fill-opacity="{0.55 * share:.2f}"/>'
        for i, share in enumerate(shares)
    )
    points = " ".join(f"{(i + 0.5) * width:.1f},{21 - 20 * share:.1f}" for i, share in enumerate(shares))
    says = f"{steps(found.above)} above 1 % of the peak"
    return (
        f'<svg width="240" height="22" role="img" aria-label="{says}" fill="currentColor" style="display:block">{boxes}'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )


def _rest(found: Course) -> str:
    if found.end == -math.inf:
        return "nothing remains"
    kept = 10**found.end
    return f"{kept:.2g} of it remains" if found.end > -3 else f"10^{found.end:.0f} of it remains"
