"""Axes, their ticks and their words."""

import math

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unvanish.draw.style import short


def new_axes(width: float = 6.4, height: float = 3.8) -> Axes:
    """Axes of a figure of their own, outside pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def figure_of(ax: Axes) -> Figure:
    """The figure that the axes lie in."""
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


def power(value: float, position: float | None = None) -> str:
    """A tick that stands for a power of ten; of a range so short that it has no whole ones, the number."""
    return f"$10^{{{value:g}}}$" if value and float(value).is_integer() else f"{10**value:.2g}"


def powers_of_ten(ax: Axes) -> None:
    """The y axis holds exponents."""
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
    """A name, not too long, that starts no formula with "$" and is not left out of the legend for its "_"."""
    name = short(name).replace("$", r"\$")
    return "\u200b" + name if name.startswith("_") else name
