"""One palette for all pictures: Okabe & Ito's colours, darkened to a contrast of at least 3 : 1 on white, with a
different dash for each, so that lines stay distinguishable in greyscale print."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Line(NamedTuple):
    """How one model, layer or curve is drawn everywhere."""

    colour: str
    dash: str
    """SVG's stroke-dasharray"""
    dashes: str | tuple[int, tuple[int, ...]]
    """matplotlib's"""


LINES = (
    Line("#C95500", "none", "-"),
    Line("#00805D", "7 3", (0, (6, 2))),
    Line("#0072B2", "2 3", (0, (1, 1.2))),  # type: ignore[arg-type]
    Line("#B3508A", "8 3 2 3", (0, (6, 2, 1, 2))),
    Line("#A06B00", "12 4", (0, (10, 3))),
    Line("#2A82B8", "12 4 2 4", (0, (10, 3, 1, 3))),
    Line("#6B6B6B", "none", "-"),
    Line("#7A7000", "5 5", (0, (4, 4))),
)
"""In order; beyond eight they repeat."""

LN10 = math.log(10)


def line(index: int) -> Line:
    """How the curve with this index is drawn."""
    return LINES[index % len(LINES)]


def decades(log_norm: Iterable[float]) -> list[float | None]:
    """Natural logarithms as powers of ten; None where the norm is exactly zero or unknown."""
    return [value / LN10 if math.isfinite(value) else None for value in log_norm]


def short(name: str, most: int = 40) -> str:
    """A name shortened to leave room for the picture."""
    return name if len(name) <= most else name[: most - 1] + "…"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def steps(number: int) -> str:
    """ "1 step", "9 steps"."""
    return f"{number} step" if number == 1 else f"{number} steps"


def fraction(power: float) -> str:
    """A power of ten in words: "1", "33 %", "0.31 %", "10⁻⁸", "exactly 0", "infinite", "unknown"."""
    if math.isnan(power):
        return "unknown"
    if math.isinf(power):
        return "exactly 0" if power < 0 else "infinite"
    if power == 0:
        return "1"
    if -3 < power < 1:
        percent = 100 * 10**power
        return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
    return f"10{str(round(power)).translate(_SUPERSCRIPTS)}"
