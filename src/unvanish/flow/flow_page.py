"""A flow as a page: the gradient's norm at every step of every layer."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from unvanish.draw.html_parts import listed, page, paragraph, section, table, top
from unvanish.draw.preview import Preview, PreviewCurve
from unvanish.draw.strips import Axes, Curve, Strip, strips
from unvanish.draw.style import fraction, steps
from unvanish.flow.notebook import course
from unvanish.flow.record import Flow, LayerFlow

DRAWN = 12
"""layers in the picture, those with the smallest gradient at the far end first to be kept"""
SCALE = (-16.0, 0.5)
"""powers of ten of the picture, the same on every page"""
TICKS = (0.0, -4.0, -8.0, -12.0, -16.0)


class _LayerNorms(NamedTuple):
    """The gradient's norm over the steps of one layer: its median over the samples, powers of ten."""

    record: LayerFlow
    states: dict[str, list[float]]
    """symbol → per step; −∞ where it is exactly 0"""
    peak: float
    at: int
    """step of the peak"""
    end: int
    """the step that the gradient reaches last: the first, or the last of a layer that reads in reverse"""

    @property
    def left(self) -> float:
        """What of the peak remains at the end."""
        return max(curve[self.end] for curve in self.states.values()) - self.peak


def flow_page(flow: Flow) -> str:
    """The page of one flow."""
    courses = [_layer_norms(record) for record in flow.layers.values()]
    backwards = any(c.record.name.endswith(".reverse") for c in courses)
    way = "from the last step to the first" + (", in reversed layers from the first to the last" * backwards)
    reached = _by_rest(courses)
    drawn = {c.record.name for c in reached[:DRAWN]}
    notes = [f"{c.record.name}: not valid: {c.record.problem}" for c in courses if c.record.problem is not None]
    notes += [f"{c.record.name}: no gradient arrived." for c in courses if c.peak == -math.inf]
    notes += [f"{name or 'the model'}: not recorded: {why}" for name, why in flow.skipped.items()]
    return page(
        "Gradient flow through time, by unvanish",
        top("Gradient flow through time", _headline(reached)),
        paragraph(f"The norm of the gradient at each step of each recurrent layer. It travels {way}."),
        _pictures([c for c in courses if c.record.name in drawn], len(reached)),
        section("Layers", _table(courses), name="layers"),
        section("Not recorded, or not to be trusted", listed(notes, kind="note"), name="notes"),
        paragraph(
            "Norms: median over the samples. Residual: ‖Σ_t g_t − autograd's ∂E/∂W‖ / ‖autograd's‖, the record's own "
            "checksum.",
            "note",
        ),
    )


def flow_preview(flow: Flow) -> Preview:
    """The card of the page, on which the layer whose gradient fades soonest comes first."""
    found = [(record.name, course(record)) for record in flow.layers.values()]
    drawn = sorted((f for f in found if f[1].way), key=lambda f: (f[1].above + 1) / len(f[1].way))
    says = _headline(_by_rest([_layer_norms(record) for record in flow.layers.values()]))
    about = "Gradient flow through time"
    if not drawn:
        return Preview(about, "no gradient", says, ())
    curves = [PreviewCurve(name, c.way) for name, c in drawn]
    # Where the gradient is largest at the end of its way, as under an error at every step, nothing is left to reach.
    fading = [c for _, c in drawn if c.above < len(c.way) - 1]
    result = f"reach {fading[0].above} of {steps(len(fading[0].way) - 1)}" if fading else "fades in no layer"
    return Preview(about, result, says, curves)


def _by_rest(courses: list[_LayerNorms]) -> list[_LayerNorms]:
    """Those that a gradient arrived in, the one that keeps least first."""
    return sorted((c for c in courses if c.peak > -math.inf), key=lambda c: c.left)


def _headline(reached: list[_LayerNorms]) -> str:
    if not reached:
        return "No gradient arrived in any recorded layer."
    c = reached[0]
    if c.at == c.end:
        return f"No layer's gradient fades on its way: that of {c.record.name} is largest at its end, step {c.end}."
    further = steps(abs(c.at - c.end))
    return f"Of the gradient's peak in {c.record.name}, {_remaining(c)} remains {further} further back in time."


def _remaining(c: _LayerNorms) -> str:
    return "nothing" if c.left == -math.inf else fraction(c.left)


def _layer_norms(record: LayerFlow) -> _LayerNorms:
    norms = {"h": record.dh, **({} if record.dc is None else {"c": record.dc})}
    states = {symbol: _median(values, record.lengths) for symbol, values in norms.items()}
    over_time = [max(values) for values in zip(*states.values(), strict=True)]
    peak = max(over_time)
    end = len(over_time) - 1 if record.name.endswith(".reverse") else 0
    return _LayerNorms(record, states, peak, over_time.index(peak), end)


def _median(norms: Tensor, lengths: Tensor) -> list[float]:
    present = torch.arange(len(norms))[:, None] < lengths[None, :]
    middle = torch.where(present, norms.double(), torch.nan).nanmedian(1).values
    return middle.nan_to_num(0.0).log10().tolist()


def _pictures(courses: list[_LayerNorms], of: int) -> str:
    if not courses:
        return ""
    axes = Axes(
        (0.0, float(max(len(c.record.dh) for c in courses) - 1)),
        SCALE,
        "step t",
        [(power, fraction(power)) for power in TICKS],
    )
    more = f" {of - len(courses)} more layers are in the table alone." if of > len(courses) else ""
    return strips(
        [_strip(c) for c in courses],
        axes,
        f"Norms relative to the layer's largest, which is at the vertical line.{more}",
    )


def _strip(c: _LayerNorms) -> Strip:
    kinds = {"h": "main", "c": "second"}
    curves = [
        Curve(f"‖∂E/∂{symbol}_t‖", kinds[symbol], range(len(values)), [v - c.peak for v in values])  # type: ignore[arg-type]
        for symbol, values in c.states.items()
    ]
    backwards = " (read in reverse)" if c.record.name.endswith(".reverse") else ""
    value = "largest at its end" if c.at == c.end else f"{_remaining(c)} of the peak at step {c.end}"
    says = f"{c.record.name}: the gradient's norm is largest at step {c.at}, {10**c.peak:.2g}; {value}."
    return Strip(f"{c.record.name} ({c.record.cell}){backwards}", value, "", says, curves, c.at)


def _table(courses: list[_LayerNorms]) -> str:
    rows = [
        [
            c.record.name,
            c.record.cell,
            str(len(c.record.dh)),
            str(c.record.dh.shape[1]),
            f"{10**c.peak:.2g} at step {c.at}",
            f"{_remaining(c)} at step {c.end}" if c.peak > -math.inf and c.at != c.end else "",
            "" if math.isnan(c.record.residual) else f"{c.record.residual:.1e}",
        ]
        for c in courses
    ]
    return table(("layer", "cell", "steps", "samples", "peak", "remaining", "residual"), rows)
