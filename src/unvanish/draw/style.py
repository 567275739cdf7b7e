"""One palette for all pictures: Okabe & Ito's colours, told apart by dash and marker too, so they survive greyscale
print."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Line(NamedTuple):
    """How one model, layer or curve is drawn everywhere."""

    colour: str
    dash: str
    """Plotly's name"""
    dashes: str | tuple[int, tuple[int, ...]]
    """matplotlib's"""


LINES = (
    Line("#D55E00", "solid", "-"),
    Line("#009E73", "dash", (0, (6, 2))),
    Line("#0072B2", "dot", (0, (1, 1.2))),  # type: ignore[arg-type]
    Line("#CC79A7", "dashdot", (0, (6, 2, 1, 2))),
    Line("#E69F00", "longdash", (0, (10, 3))),
    Line("#56B4E9", "longdashdot", (0, (10, 3, 1, 3))),
    Line("#7F7F7F", "solid", "-"),
    Line("#B8A900", "dash", (0, (4, 4))),
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
    """A name that leaves room for the picture."""
    return name if len(name) <= most else name[: most - 1] + "…"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fraction(power: float) -> str:
    """A power of ten in words: "1", "1 %", "10⁻⁸", "exactly 0"."""
    if power == -math.inf:
        return "exactly 0"
    if -3 < power <= 0:
        return "1" if power == 0 else f"{100 * 10**power:.2g} %"
    return f"10{str(round(power)).translate(_SUPERSCRIPTS)}"
