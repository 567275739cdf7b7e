"""The kinds of picture, each a function of arrays that draws on given or new axes and returns them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from unvanish.draw.axes import figure_of, finish, label, label_ends, new_axes, power, powers_of_ten, round_steps
from unvanish.draw.style import LN10, decades, line

LAG = "lag ℓ (steps before the error)"
LOWEST, TOP = (-8.0, -20.0, -60.0), 2.0
"""powers of ten of the gradient over the lag: the axis begins at the first that no curve falls below, else at the last,
so that pictures can be compared"""
SPAN = 16
"""powers of ten from the brightest to the darkest colour of a map, whatever its values"""
RELATIVE = r"$\|\partial E_T/\partial s_{T-\ell}\|$ relative to lag 0"


class Norms(NamedTuple):
    """The norms of one state's gradient."""

    name: str
    """the layer's name; curves of one layer share a colour"""
    symbol: str
    """the state's symbol: h, c"""
    values: np.ndarray
    """[T, B]"""
    lengths: np.ndarray
    """[B]"""


class Band(NamedTuple):
    """A curve over the lag, natural logarithms."""

    lag: Sequence[int]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def norms_over_time(found: Sequence[Norms], ax: Axes | None = None) -> Axes:
    """Norms over the step, on a logarithmic axis: median over samples, band from 10 % to 90 %; for a single layer with
    a line at 1 % of the largest."""
    ax = ax or new_axes()
    names = list(dict.fromkeys(norm.name for norm in found))
    seen: set[str] = set()
    largest = 0.0
    for norm in found:
        steps = np.arange(len(norm.values))
        present = (steps[:, None] < norm.lengths[None, :]) & (norm.values > 0)
        low, middle, high = _quantiles(np.where(present, norm.values, np.nan))
        colour, dashes = line(names.index(norm.name)).colour, (0, (4, 2)) if norm.name in seen else "-"
        seen.add(norm.name)
        ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        text = rf"{label(norm.name)}  $\|\partial E/\partial {norm.symbol}_t\|$"
        ax.plot(steps, middle, color=colour, linestyle=dashes, linewidth=1.8, label=text)
        largest = np.fmax(largest, np.nanmax(middle, initial=0.0))
    ax.set_yscale("log")
    if len(names) == 1 and largest > 0:
        ax.axhline(0.01 * largest, color="0.4", linewidth=0.8, linestyle=":")
        ax.text(0, 0.01 * largest, " 1 % of the largest", color="0.35", fontsize=7, va="top")
    return label_ends(finish(ax, "step t", "norm of the gradient", legend=False))


def over_lag(
    curves: Mapping[str, Sequence[float] | Band],
    ax: Axes | None = None,
    mark: float = 0.01,
    low: float | None = None,
) -> Axes:
    """‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0 over the lag ℓ, in powers of ten, from natural logarithms.

    Args:
        curves: name → `[T]`, shifted to 0 at lag 0; or a band, drawn without a shift.
        ax: where to draw.
        mark: the fraction of the gradient that counts as reached, at which a line is drawn.
        low: the power of ten where the axis begins; None: `lowest` of these curves.
    """
    ax = ax or new_axes()
    low, high = lowest(curves.values()) if low is None else low, TOP
    for index, (name, curve) in enumerate(curves.items()):
        style = line(index)
        how: Any = {"color": style.colour, "linestyle": style.dashes, "linewidth": 1.8, "label": label(name)}
        if isinstance(curve, Band):
            values, below, above = (np.array(decades(v), dtype=float) for v in curve[1:])
            ax.fill_between(curve.lag, below, above, color=style.colour, alpha=0.15, linewidth=0)
            ax.plot(curve.lag, values, **how)
        else:
            values = np.array(decades(curve), dtype=float)
            values -= values[0] if len(values) else 0
            ax.plot(values, **how)
        high = max(high, float(np.nanmax(values, initial=high)))
    ax.set_ylim(low, math.ceil(high))
    ax.axhline(math.log10(mark), color="0.4", linewidth=0.8, linestyle=":")
    ax.text(0, math.log10(mark), f" {100 * mark:g} %", color="0.35", fontsize=7, va="top")
    finish(ax, LAG, RELATIVE, legend=False)
    powers_of_ten(ax)
    return label_ends(ax)


def lowest(curves: Iterable[Sequence[float] | Band]) -> float:
    """The power of ten where an axis for these curves begins, one of `LOWEST`."""
    least = 0.0
    for curve in curves:
        values = decades(curve.middle if isinstance(curve, Band) else curve)
        first = (values[0] if values else None) or 0.0
        least = min([least, *(-math.inf if value is None else value - first for value in values)])
    return next((low for low in LOWEST if low <= least), LOWEST[-1])


def per_step(
    curves: Mapping[str, Sequence[float | None]],
    x: Sequence[int],
    x_label: str,
    y_label: str,
    ax: Axes | None = None,
) -> Axes:
    """Curves of powers of ten."""
    ax = lines(curves, x, x_label, y_label, ax)
    powers_of_ten(ax)
    return ax


def lines(
    curves: Mapping[str, Sequence[float | None]],
    x: Sequence[int],
    x_label: str,
    y_label: str,
    ax: Axes | None = None,
    zero: bool = False,
    log: bool = False,
    width: float = 1.8,
) -> Axes:
    """Curves over x; `zero` draws a line at 0, `log` makes the y axis logarithmic."""
    ax = ax or new_axes()
    for index, (name, values) in enumerate(curves.items()):
        style = line(index)
        ax.plot(
            x,
            np.array(values, dtype=float),
            color=style.colour,
            linestyle=style.dashes,
            linewidth=width,
            label=name if name.startswith("$") else label(name),
        )
    if zero:
        ax.axhline(0, color="0.4", linewidth=0.8)
    if log:
        ax.set_yscale("log")
    return label_ends(finish(ax, x_label, y_label, legend=False))


def heat_map(
    steps: Sequence[int] | np.ndarray, sources: Sequence[int], log_norms: Any, y_label: str, ax: Axes | None = None
) -> Axes:
    """ln‖∂E_k/∂s_t‖ `[K, T]` of every source k over the step t, as colours of powers of ten: the largest value is the
    brightest, values `SPAN` powers below it or more are the darkest."""
    ax = ax or new_axes(5.6, 4.4)
    powers = np.ma.masked_invalid(np.array(log_norms, dtype=float) / LN10)
    edges = (np.asarray(v) for v in (steps, sources))
    t, k = (np.append(v, 2 * v[-1] - v[-2] if len(v) > 1 else v[-1] + 1) for v in edges)
    top = math.ceil(float(powers.max())) if powers.count() else 0
    image = ax.pcolormesh(t, k, powers, cmap="cividis", vmin=top - SPAN, vmax=top, rasterized=True)
    bar = figure_of(ax).colorbar(image, ax=ax, format=power, ticks=MaxNLocator(8, integer=True), extend="min")
    bar.set_label(y_label)
    ax.set_xlabel("step t")
    ax.set_ylabel("error source k")
    return ax


def histogram(counts: np.ndarray, edges: np.ndarray, steps: int, ax: Axes | None = None) -> Axes:
    """The distribution of the units' time constants, on a logarithmic axis from 1 step to 10·T, at least 100, the same
    for every model; values outside are counted at its ends. T, the length of the sequences in steps, is marked."""
    ax, longest = ax or new_axes(), max(100.0, 10.0 * steps)
    ax.axvline(steps, color="0.4", linewidth=0.8, linestyle=":")
    ax.text(steps, 0.99, " T", color="0.35", fontsize=7, va="top", transform=ax.get_xaxis_transform())
    ax.stairs(counts, np.clip(edges, 1.0, longest), fill=True, color=line(2).colour, alpha=0.75)
    ax.set_xscale("log")
    ax.set_xlim(1.0, longest)
    ax.xaxis.set_major_locator(FixedLocator(round_steps(1.0, longest)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, "time constant τ (steps)", "units", legend=False)


def _quantiles(values: np.ndarray) -> Any:
    """10, 50 and 90 % of each row; NaN where a row has no sample."""
    out = np.full((3, len(values)), np.nan)
    some = ~np.isnan(values).all(1)
    if some.any():
        out[:, some] = np.nanquantile(values[some], [0.1, 0.5, 0.9], axis=1)
    return out
