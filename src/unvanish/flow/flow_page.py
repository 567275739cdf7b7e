"""A flow as a page: the gradient's norm at every step of every layer."""

import math
from dataclasses import replace
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
    missing: str
    """why there is nothing to draw, in words; "" where there is something"""
    broken: bool
    """whether that is because a norm is NaN or infinite"""

    @property
    def left(self) -> float:
        """The fraction of the peak that remains at the end."""
        return max(curve[self.end] for curve in self.states.values()) - self.peak


def flow_page(flow: Flow) -> str:
    """The page of one flow."""
    courses = [_layer_norms(record) for record in flow.layers.values()]
    backwards = any(c.record.name.endswith(".reverse") for c in courses)
    way = "from the last step to the first" + (", in reversed layers from the first to the last" * backwards)
    reached = _by_rest(courses)
    drawn = {c.record.name for c in reached[:DRAWN]}
    notes = [f"{c.record.name}: not valid: {c.record.problem}" for c in courses if c.record.problem is not None]
    notes += [f"{c.record.name}: {c.missing}." for c in courses if c.missing]
    notes += [f"{name or 'the model'}: not recorded: {why}" for name, why in flow.skipped.items()]
    return page(
        "Gradient flow through time, by unvanish",
        top("Gradient flow through time", _headline(courses)),
        paragraph(f"The norm of the gradient at each step of each recurrent layer. It travels {way}."),
        _pictures([c for c in courses if c.record.name in drawn], len(reached)),
        section("Layers", _table(courses), name="layers"),
        section("Not recorded, or not to be trusted", listed(notes, kind="note"), name="notes"),
        paragraph(
            "Norms: median over the samples. Residual: ‖Σₜ gₜ − autograd's ∂E/∂W‖ / ‖autograd's‖, the record's own "
            "checksum, estimated with a standard error of at most 18 %.",
            "note",
        ),
    )


def flow_preview(flow: Flow) -> Preview:
    """The card of the page, on which the layer whose gradient fades soonest comes first."""
    found = [(record.name, course(record)) for record in flow.layers.values() if record.valid]
    drawn = sorted((f for f in found if f[1].lags), key=lambda f: (f[1].above + 1) / (f[1].lags + 1))
    drawn += [f for f in found if f[1].way and not f[1].lags]
    courses = [_layer_norms(record) for record in flow.layers.values()]
    says, about = _headline(courses), "Gradient flow through time"
    if any(c.record.valid and c.broken for c in courses):
        return Preview(about, "not finite", says, ())
    if not drawn:
        return Preview(about, "no gradient" if found or not courses else "not valid", says, ())
    curves = [PreviewCurve(name, c.way) for name, c in drawn]
    # Where the gradient is largest at the end of its way, as under an error at every step, nothing is left to reach.
    fading = [c for _, c in drawn if c.above < c.lags]
    if fading:
        return Preview(about, f"reach {fading[0].above} of {steps(fading[0].lags)}", says, curves)
    alone = all(len(record.dh) == 1 for record in flow.layers.values())
    return Preview(about, "one step" if alone else "fades in no layer", says, curves)


def _by_rest(courses: list[_LayerNorms]) -> list[_LayerNorms]:
    """The layers at which a gradient arrived, the one with the least remaining first."""
    return sorted((c for c in courses if not c.missing), key=lambda c: c.left)


def _headline(courses: list[_LayerNorms]) -> str:
    """The result in a sentence, from valid records alone."""
    valid = [c for c in courses if c.record.valid]
    if courses and not valid:
        return "No record can be trusted; the reasons stand at the end of the page."
    broken = next((c for c in valid if c.broken), None)
    if broken is not None:
        return f"In {broken.record.name} {broken.missing}."
    reached = _by_rest(valid)
    if not reached:
        return "No gradient arrived in any recorded layer."
    several = [c for c in reached if len(c.record.dh) > 1]
    if not several:
        return "Every recorded layer has one step, so no gradient travels through time."
    c = several[0]
    if c.at == c.end:
        return f"No layer's gradient fades on its way: that of {c.record.name} is largest at its end, step {c.end}."
    further = steps(abs(c.at - c.end))
    verb = "is left" if c.left == -math.inf else "remains"
    return f"Of the gradient's peak in {c.record.name}, {_remaining(c)} {verb} {further} further back in time."


def _remaining(c: _LayerNorms) -> str:
    return "nothing" if c.left == -math.inf else fraction(c.left)


def _layer_norms(record: LayerFlow) -> _LayerNorms:
    norms = {"h": record.dh, **({} if record.dc is None else {"c": record.dc})}
    states = {symbol: _median(values, record.lengths) for symbol, values in norms.items()}
    end = len(record.dh) - 1 if record.name.endswith(".reverse") else 0
    found = [course(record), course(replace(record, dc=None))]
    broken = [c for c in found if c.broken is not None]
    if broken or not any(c.way for c in found):
        return _LayerNorms(record, states, -math.inf, 0, end, (broken or found)[0].missing, bool(broken))
    over_time = [max(values) for values in zip(*states.values(), strict=True)]
    peak = max(over_time)
    return _LayerNorms(record, states, peak, over_time.index(peak), end, "", False)


def _median(norms: Tensor, lengths: Tensor) -> list[float]:
    if not norms.numel():
        return [-math.inf] * len(norms)
    present = torch.arange(len(norms), device="cpu")[:, None] < lengths[None, :]
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
        Curve(f"‖∂E/∂{symbol}ₜ‖", kinds[symbol], range(len(values)), [v - c.peak for v in values])  # type: ignore[arg-type]
        for symbol, values in c.states.items()
    ]
    backwards = " (read in reverse)" if c.record.name.endswith(".reverse") else ""
    says = f"{c.record.name}: the gradient's norm is largest at step {c.at}, {10**c.peak:.2g}"
    if len(c.record.dh) == 1:
        value, says = "one step", f"{c.record.name}: one step, at which the gradient's norm is {10**c.peak:.2g}."
    elif all(v == -math.inf for values in c.states.values() for t, v in enumerate(values) if t != c.end):
        value, says = (
            "travels no step",
            f"{c.record.name}: a gradient arrives at step {c.end} alone, the end of its way.",
        )
    elif c.at == c.end:
        value, says = "largest at its end", f"{says}, which is the end of its way."
    else:
        value = f"{_remaining(c)} of the peak at step {c.end}"
        says = f"{says}; {value}."
    return Strip(f"{c.record.name} ({c.record.cell}){backwards}", value, "", says, curves, c.at)


def _table(courses: list[_LayerNorms]) -> str:
    rows = [
        [
            c.record.name,
            c.record.cell,
            str(len(c.record.dh)),
            str(c.record.dh.shape[1]),
            "" if c.missing else f"{10**c.peak:.2g} at step {c.at}",
            "" if c.missing or c.at == c.end else f"{_remaining(c)} at step {c.end}",
            "" if math.isnan(c.record.residual) else f"{c.record.residual:.1e}",
        ]
        for c in courses
    ]
    return table(("layer", "cell", "steps", "samples", "peak", "remaining", "residual"), rows)
