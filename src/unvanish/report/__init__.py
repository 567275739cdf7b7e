"""Showing what was measured: pure functions of records; never touches a model."""

from unvanish.report.figures import plot_flow, plot_learning, plot_reach, save_figures
from unvanish.report.html import write_comparison, write_flow
from unvanish.report.text import print_comparison

__all__ = [
    "plot_flow",
    "plot_learning",
    "plot_reach",
    "print_comparison",
    "save_figures",
    "write_comparison",
    "write_flow",
]
