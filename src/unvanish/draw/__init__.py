"""Pictures from arrays: matplotlib axes, a notebook card, and (`page`, `strips`) self-contained pages.

Belongs here: how numbers with names become axes, strips and pages, in one style.
Does not: anything that depends on a record, a layer or a model; the caller passes the numbers.
"""

from unvanish.draw.axes import figure_of, label, new_axes
from unvanish.draw.card import card
from unvanish.draw.pictures import heat_map, histogram, lines, lowest, norms_over_time, over_lag, per_step
from unvanish.draw.style import LINES, LN10, Line, decades, fraction, line, short, steps

__all__ = [
    "LINES",
    "LN10",
    "Line",
    "card",
    "decades",
    "figure_of",
    "fraction",
    "heat_map",
    "histogram",
    "label",
    "line",
    "lines",
    "lowest",
    "new_axes",
    "norms_over_time",
    "over_lag",
    "per_step",
    "short",
    "steps",
]
