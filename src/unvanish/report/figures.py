"""The pictures for papers: matplotlib, on Axes that are given or made."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from unvanish.flow.record import Flow, LayerFlow
from unvanish.report.style import decades, line
from unvanish.train.records import Comparison, TaskResult

Moment = Literal["before", "after"]


def new_axes(width: float = 6.4, height: float = 3.8) -> Axes:
    """Axes of a figure of their own, outside pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def plot_reach(task: TaskResult, ax: Axes | None = None, moment: Moment = "before") -> Axes:
    """‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0 over the lag ℓ, in powers of ten: median over samples, band from 10 % to 90
    %."""
    ax = ax or new_axes()
    for index, run in enumerate(task.runs):
        reach, style = getattr(run, moment), line(index)
        middle, low, high = (np.array(decades(v), dtype=float) for v in (reach.log_norm, reach.low, reach.high))
        ax.fill_between(reach.lag, low, high, color=style.colour, alpha=0.15, linewidth=0)
        ax.plot(reach.lag, middle, color=style.colour, linestyle=style.dashes, linewidth=1.8, label=run.title)
    _finish(ax, "lag ℓ (steps before the error)", r"$\|\partial E_T/\partial s_{T-\ell}\|$ relative to lag 0")
    ax.yaxis.set_major_formatter(lambda value, _: f"$10^{{{value:g}}}$")
    when = "before training" if moment == "before" else "after training"
    ax.set_title(f"{task.title}: the error's way back, {when}", loc="left", fontsize=10)
    return ax


def plot_learning(task: TaskResult, ax: Axes | None = None) -> Axes:
    """Validation error over updates, with the chance level and the error below which the task counts as solved."""
    ax = ax or new_axes()
    for index, run in enumerate(task.runs):
        style = line(index)
        ax.plot(
            run.curve_update,
            run.curve_error,
            color=style.colour,
            linestyle=style.dashes,
            linewidth=1.8,
            label=run.title,
        )
    ax.axhline(task.chance, color="0.4", linewidth=0.9, label="chance")
    ax.axhline(task.solved_below, color="0.4", linewidth=0.9, linestyle=":", label="solved below")
    ax.set_yscale("log")
    _finish(ax, "optimizer updates", f"validation {task.metric}")
    ax.set_title(f"{task.title}: who learns", loc="left", fontsize=10)
    return ax


def plot_flow(flow: Flow | LayerFlow, ax: Axes | None = None) -> Axes:
    """‖∂E/∂h_t‖, and ‖∂E/∂c_t‖ where there is a cell state, over t: median over samples, band from 10 % to 90 %."""
    ax = ax or new_axes()
    layers = [flow] if isinstance(flow, LayerFlow) else list(flow.values())
    for index, layer in enumerate(layers):
        for norm, dashes, label in ((layer.dh, "-", "h"), (layer.dc, (0, (4, 2)), "c")):
            if norm is None:
                continue
            present = np.arange(len(norm))[:, None] < layer.lengths.numpy()[None, :]
            values = np.where(present & (norm.numpy() > 0), norm.numpy(), np.nan)
            low, middle, high = _quantiles(values)
            colour, t = line(index).colour, np.arange(len(norm))
            ax.fill_between(t, low, high, color=colour, alpha=0.15, linewidth=0)
            ax.plot(
                t,
                middle,
                color=colour,
                linestyle=dashes,
                linewidth=1.8,
                label=rf"{layer.name}  $\|\partial E/\partial {label}_t\|$",
            )
    ax.set_yscale("log")
    _finish(ax, "step t", "error gradient norm")
    return ax


def plot_decay(curves: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0 over the lag ℓ, in powers of ten.

    Args:
        curves: layer → `[T]` the natural logarithm, as `GradientFlow` and `AdjointMap.over_lag` give it.
    """
    ax = ax or new_axes()
    for index, (name, curve) in enumerate(curves.items()):
        style = line(index)
        values = np.array(decades((curve - curve[0]).tolist()), dtype=float)
        ax.plot(values, color=style.colour, linestyle=style.dashes, linewidth=1.8, label=name)
    _finish(ax, "lag ℓ (steps before the error)", r"$\|\partial E_T/\partial s_{T-\ell}\|$ relative to lag 0")
    ax.yaxis.set_major_formatter(lambda value, _: f"$10^{{{value:g}}}$")
    return ax


def flow_html(flow: Flow, path: str | os.PathLike[str]) -> None:
    """`plot_flow`, interactive, in one self-contained file."""
    from unvanish.report.html import write_flow

    write_flow(flow, Path(path))


def save_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """PNG and SVG of every task's reach before and after training, and of its learning curves."""
    written = []
    for task in comparison.tasks:
        pictures = {
            "reach-before": plot_reach(task, moment="before"),
            "reach-after": plot_reach(task, moment="after"),
            "learning": plot_learning(task),
        }
        for name, ax in pictures.items():
            for kind in ("png", "svg"):
                path = folder / f"{task.name}-{name}.{kind}"
                _figure(ax).savefig(path, dpi=150)
                written.append(path)
    return written


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def _quantiles(values: np.ndarray) -> Any:
    """10, 50 and 90 % of each row; NaN where a row has no sample."""
    out = np.full((3, len(values)), np.nan)
    some = ~np.isnan(values).all(1)
    if some.any():
        out[:, some] = np.nanquantile(values[some], [0.1, 0.5, 0.9], axis=1)
    return out


def _finish(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
