"""Showing what was measured: pure functions of records; never touches a model.

`unvanish.report.plot`, also `uv.plot`, has the pictures for papers.
"""

from unvanish.report import plot
from unvanish.report.html import write_comparison
from unvanish.report.plot import save_figures
from unvanish.report.text import print_comparison

__all__ = ["plot", "print_comparison", "save_figures", "write_comparison"]
