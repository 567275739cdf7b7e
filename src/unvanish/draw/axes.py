"""Axes, their ticks and their labels."""

import math
import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unvanish.draw.style import short

_END = "unvanish-line-end"
"""the tag of the labels at the lines' ends"""


def new_axes(width: float = 6.4, height: float = 3.8) -> Axes:
    """Axes of a figure of their own, outside pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def figure_of(ax: Axes) -> Figure:
    """The figure that contains the axes."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def finish(ax: Axes, x: str, y: str, legend: bool = True) -> Axes:
    """Labels, grid and legend; returns the axes."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if legend:
        ax.legend(frameon=False, fontsize=8)
    return ax


def label_ends(ax: Axes, apart: float = 0.055) -> Axes:
    """Names every labelled line at its right end, in its colour, in place of a legend; the x axis makes room inside the
    axes, and names that would overlap move apart by a fraction of the axes' height. Of more lines than have room some
    are named, from the first to the last."""
    for old in [text for text in ax.texts if text.get_gid() == _END]:
        old.remove()
    named = []
    for found in ax.get_lines():
        x, y = (np.asarray(v, dtype=float) for v in (found.get_xdata(), found.get_ydata()))
        present = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        if len(present) and not str(found.get_label()).startswith("_"):
            named.append((found, x[present[-1]], y[present[-1]]))
    if not named:
        return ax
    most = int(0.96 / apart)
    if len(named) > most:
        named = [named[round(k * (len(named) - 1) / (most - 1))] for k in range(most)]
    longest = max(_letters(str(found.get_label())) for found, _, _ in named)
    start, end = min(found.get_xdata()[0] for found, _, _ in named), max(x for _, x, _ in named)
    ax.set_xlim(start, end + ((end - start) or 1.0) * min(0.5, 0.03 + 0.017 * longest))
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [float(np.clip(to_axes.transform((x, y))[1], 0.02, 0.98)) for _, x, y in named]
    order = sorted(range(len(named)), key=heights.__getitem__)
    places, last, limit = dict.fromkeys(order, 0.0), -1.0, 0.98
    for index in order:
        places[index] = last = max(heights[index], last + apart)
    for index in reversed(order):
        places[index] = min(places[index], limit)
        limit = places[index] - apart
    x_text = to_axes.transform((end, 0.0 if ax.get_yscale() == "linear" else 1.0))[0] + 0.012
    for index, (found, _, _) in enumerate(named):
        ax.text(
            x_text,
            places[index],
            str(found.get_label()),
            color=found.get_color(),
            fontsize=8,
            va="center",
            transform=ax.transAxes,
            gid=_END,
        )
    return ax


def _letters(label: str) -> int:
    """The number of visible letters of a label, including formulas."""
    return len(re.sub(r"\\[a-zA-Z]+|\\\|", "x", label).translate(str.maketrans("", "", "${}_^\\")))


def power(value: float, position: float | None = None) -> str:
    """The label of a tick at a power of ten; in a range too short for whole powers, the number itself."""
    return f"$10^{{{value:g}}}$" if value and float(value).is_integer() else f"{10**value:.2g}"


def powers_of_ten(ax: Axes) -> None:
    """Label the y axis, whose values are exponents, with powers of ten."""
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(power)


def round_steps(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, few enough to be read: 1, 2, 5 times powers of ten, or powers alone."""
    decades = math.log10(high / low)
    if decades < 1:
        return [float(v) for v in MaxNLocator(5).tick_values(low, high)]
    digits = (1, 2, 5) if decades < 3 else (1,)
    whole = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**power for power in whole for digit in digits]


def label(name: str) -> str:
    """A name, shortened if too long, whose "$" starts no formula and whose "_" does not hide it from the legend."""
    name = short(name).replace("$", r"\$")
    return "\u200b" + name if name.startswith("_") else name
