"""The preview picture for links to a page: 1200 × 630, the result in large type over its curves."""

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from unvanish.draw.axes import power
from unvanish.draw.style import Line, line

WIDTH, HEIGHT = 1200, 630
"""pixels, the size that link previews are made for"""
EDGE = 60
"""pixels left free on each side"""
SCALE = (-8.0, 0.5)
"""powers of ten, the same on every card"""
CURVES = 4
"""the most curves on a card, beginning with the first"""
LETTERS = 400
"""more letters than any line has room for; the rest of a longer text is not laid out"""
PALE = Line("#767676", "none", "-")
"""the curve that the others are compared with"""
_DPI = 96
"""SVG's pixels per inch, so that both formats have the same size"""


class PreviewCurve(NamedTuple):
    """The fraction of the gradient remaining, over the lag."""

    name: str
    """shown at the end of the line"""
    powers: Sequence[float | None]
    """powers of ten relative to lag 0, from lag 0 on; None or −∞ where nothing remains"""
    pale: bool = False
    """whether the others are compared with this curve, which is drawn grey and thin"""


class Preview(NamedTuple):
    """The content of the card."""

    about: str
    """the model or task"""
    result: str
    """in large type: "reach 9 → 199" """
    says: str
    """the result in a sentence"""
    curves: Sequence[PreviewCurve]


def before_and_after(was: int, now: int) -> str:
    """ "reach 9 → 199", in steps."""
    return f"reach {was} → {now}"


def preview_paths(page: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The paths of a page's PNG and SVG: "page.html" → "page-card.png", "page-card.svg"."""
    path = Path(page)
    return path.with_name(f"{path.stem}-card.png"), path.with_name(f"{path.stem}-card.svg")


def preview_figure(card: Preview) -> Figure:
    """The card as a figure; every text is shortened until it fits."""
    figure = Figure(figsize=(WIDTH / _DPI, HEIGHT / _DPI), dpi=_DPI, facecolor="white")
    figure.set_layout_engine("none")  # every place is given; a user's constrained layout would warn
    FigureCanvasAgg(figure)
    _words(figure, card.about, 1, 52, 20, "0.35")
    _words(figure, card.result, 1, 92, 60, "black", weight="bold")
    _words(figure, card.says, 2, 188, 23, "0.2")
    if card.curves:
        _draw(figure, card.curves[:CURVES])
    _words(figure, "unvanish", 1, HEIGHT - 34, 13, "0.4")
    return figure


def preview_files(card: Preview) -> tuple[bytes, bytes]:
    """The card as PNG and as SVG; the SVG's letters are outlines, so that it looks the same without our font."""
    figure, made = preview_figure(card), []
    title = f"{card.about}: {card.result}. {card.says}"
    for kind in ("png", "svg"):
        image = BytesIO()
        about = {"Title": title} if kind == "png" else {"Title": title, "Date": None}
        with rc_context({"svg.fonttype": "path", "svg.hashsalt": "unvanish"}):
            figure.savefig(image, format=kind, dpi=_DPI, metadata=about)
        made.append(image.getvalue())
    return made[0], made[1]


def _words(
    figure: Figure, text: str, lines: int, top: float, points: float, colour: str, weight: str = "normal"
) -> None:
    """Draw text from the left edge, broken between words into at most this many lines; longer text ends in "…"."""
    drawn = figure.text(
        EDGE / WIDTH, 1 - top / HEIGHT, "", fontsize=points, color=colour, weight=weight, va="top", parse_math=False
    )

    def fits(candidate: str) -> bool:
        drawn.set_text(candidate)
        return drawn.get_window_extent().width <= WIDTH - 2 * EDGE

    drawn.set_text(fitted(text[: lines * LETTERS], lines, fits))


def fitted(text: str, lines: int, fits: Callable[[str], bool]) -> str:
    """Text in at most this many lines, each of which `fits`: broken between words, shortened by "…" if necessary."""
    words, done = text.split(), []
    while words and len(done) < lines:
        taken = _most(len(words), lambda n: fits(" ".join(words[:n])))  # noqa: B023
        if (len(done) == lines - 1 and taken < len(words)) or not taken:
            whole = " ".join(words)
            keep = _most(len(whole), lambda n: fits(f"{whole[:n].rstrip()}…"))  # noqa: B023
            return "\n".join([*done, f"{whole[:keep].rstrip()}…"])
        done.append(" ".join(words[:taken]))
        words = words[taken:]
    return "\n".join(done)


def _most(number: int, fits: Callable[[int], bool]) -> int:
    """The largest n ≤ number that fits, by bisection: every shorter text fits too."""
    return bisect_left(range(1, number + 1), True, key=lambda n: not fits(n))


def _draw(figure: Figure, curves: Sequence[PreviewCurve]) -> None:
    room, end = 250, max(len(c.powers) for c in curves) - 1
    ax = figure.add_axes((110 / WIDTH, 90 / HEIGHT, (WIDTH - 110 - room) / WIDTH, 250 / HEIGHT))
    ax.set_xlim(0, max(end, 1))
    ax.set_ylim(*SCALE)
    ax.set_yticks([0, -2, -4, -6, -8], [power(p) for p in (0, -2, -4, -6, -8)])
    ax.axhline(-2, color="0.4", linewidth=1, linestyle=":")
    ax.text(max(end, 1), -2.1, "1 % ", color="0.35", fontsize=11, va="top", ha="right")
    ax.set_xlabel("steps back from the error", fontsize=12)
    ax.tick_params(labelsize=11)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    heights, coloured = [], [curve for curve in curves if not curve.pale]
    for curve in curves:
        style = PALE if curve.pale else line(coloured.index(curve))
        values = np.array([np.nan if p is None or p == -np.inf else p for p in curve.powers], dtype=float)
        ax.plot(values, color=style.colour, linestyle=style.dashes, linewidth=2 if curve.pale else 4, clip_on=True)
        seen = np.flatnonzero(np.isfinite(values))
        last = float(np.clip(values[seen[-1]], *SCALE)) if len(seen) else SCALE[0]
        heights.append((last, curve.name, style.colour))
    _names(ax, heights, room)


def _names(ax: Axes, heights: list[tuple[float, str, str]], room: float) -> None:
    """Draw names to the right of the picture, at the heights where their lines end, moved apart where they overlap."""
    gap, place = 0.9, -np.inf
    placed = []
    for height, name, colour in sorted(heights):
        place = max(height, place + gap)
        placed.append((place, name, colour))
    over = max(0.0, place - SCALE[1])
    for height, name, colour in placed:
        text = ax.annotate(
            "", (1, height - over), xycoords=ax.get_yaxis_transform(), xytext=(10, 0), textcoords="offset points",
            fontsize=14, color=colour, va="center", parse_math=False, annotation_clip=False,
        )  # fmt: skip

        def fits(candidate: str, text: Annotation = text) -> bool:
            text.set_text(candidate)
            return text.get_window_extent().width <= room - EDGE

        text.set_text(fitted(name[:LETTERS], 1, fits))
