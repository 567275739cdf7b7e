"""Showing what was measured: text, figures and pages, each a pure function of records.

Belongs here: sentences about a result, tables, figures (`unvanish.report.plot`, also `uv.plot`), pages, the live page.
Does not: measuring, training, or anything that touches a model; pictures from plain arrays are in `draw`.
"""

from typing import TYPE_CHECKING, Any

from unvanish.report import plot
from unvanish.report.html import write_comparison
from unvanish.report.plot import save_figures

if TYPE_CHECKING:
    from unvanish.report.text import print_comparison

__all__ = ["plot", "print_comparison", "save_figures", "write_comparison"]


def __getattr__(name: str) -> Any:
    """Import the terminal tables on demand: they need an extra that the figures do not."""
    if name == "print_comparison":
        from unvanish.report.text import print_comparison

        return print_comparison
    raise AttributeError(f"module 'unvanish.report' has no attribute {name!r}")
