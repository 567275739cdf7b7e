"""The pictures for papers: matplotlib, on given or new Axes; each function returns its Axes.

Lines have colour-blind-safe colours and different dashes, and are named at their ends; norms are on a logarithmic axis;
curves are medians over samples, bands go from 10 % to 90 %. Gradients over the lag have one of three axes, down to
10⁻⁸, 10⁻²⁰ or 10⁻⁶⁰, so that models and moments of training can be compared.
The records of `uv.flow` and of a diagnosis have these pictures as their `plot` method.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from unvanish import draw
from unvanish.diagnosis import Diagnosis, Verification
from unvanish.draw.axes import finish, label_ends
from unvanish.draw.pictures import Band
from unvanish.flow import (
    AdjointMap,
    Flow,
    GateStatistics,
    LayerFlow,
    LyapunovSpectrum,
    SourceGradients,
    StateTerms,
)

if TYPE_CHECKING:
    from unvanish.train.records import Comparison, GradientBreakdown, Reach, Run, TaskResult

Moment = Literal["before", "after"]


def reach(task: TaskResult, ax: Axes | None = None, moment: Moment = "before") -> Axes:
    """‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0 over the lag ℓ, in powers of ten: median over samples, band from 10 % to 90
    %."""
    low = draw.lowest(_band(found) for run in task.runs for found in (run.before, run.after))
    ax = draw.over_lag({run.title: _band(getattr(run, moment)) for run in task.runs}, ax, low=low)
    when = "before training" if moment == "before" else "after training"
    ax.set_title(f"{draw.label(task.title)}: the gradient over the lag, {when}", loc="left", fontsize=10)
    return ax


def cures(run: Run, ax: Axes | None = None) -> Axes:
    """‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0 over the lag ℓ before training, without and with each cure of a plain cell.

    Raises:
        ValueError: the run holds no cures: its cell was cured already.
    """
    if not run.cures:
        raise ValueError(f"run: {run.name!r} holds no cures; those of plain cells do")
    curves = {run.title: _band(run.before)} | {cure.title: _band(cure.reach) for cure in run.cures}
    ax = draw.over_lag(curves, ax)
    ax.set_title(f"{draw.label(run.title)}: without and with a cure, before training", loc="left", fontsize=10)
    return ax


def _band(reach: Reach) -> Band:
    return Band(reach.lag, reach.log_norm, reach.low, reach.high)


def learning(task: TaskResult, ax: Axes | None = None) -> Axes:
    """Validation error over updates of every trial, the first one's line bold, with the chance level and the error
    below which the task counts as solved."""
    ax = ax or draw.new_axes()
    for index, run in enumerate(task.runs):
        style = draw.line(index)
        for number, trial in enumerate(run.trials):
            ax.plot(
                trial.curve_update,
                trial.curve_error,
                color=style.colour,
                linestyle=style.dashes,
                linewidth=0.9 if number else 1.8,
                alpha=0.6 if number else 1.0,
                label="_" if number else draw.label(run.title),
            )
    for level, words in ((task.chance, "chance"), (task.solved_below, "solved below")):
        ax.axhline(level, color="0.4", linewidth=0.9, linestyle=":")
        ax.text(
            0.01, level, words, color="0.35", fontsize=7, va="bottom", transform=ax.get_yaxis_transform(), clip_on=True
        )
    if spans_decades(task):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    finish(ax, "optimizer updates", f"validation {task.metric}", legend=False)
    ax.set_title(f"{draw.label(task.title)}: who learns", loc="left", fontsize=10)
    return label_ends(ax)


def spans_decades(task: TaskResult) -> bool:
    """Whether a task's errors need a logarithmic axis: they span more than one power of ten, and none is 0."""
    errors = [
        task.chance,
        task.solved_below,
        *(error for run in task.runs for trial in run.trials for error in trial.curve_error),
    ]
    return min(errors) > 0 and max(errors) > 10 * min(errors)


def flow(record: Flow | LayerFlow, ax: Axes | None = None) -> Axes:
    """‖∂E/∂h_t‖, and ‖∂E/∂c_t‖ where there is a cell state, over t: median over samples, band from 10 % to 90 %."""
    return record.plot(ax)


def decay(curves: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0 over the lag ℓ, in powers of ten.

    Args:
        curves: layer → `[T]` the natural logarithm, as `GradientFlow` and `AdjointMap.over_lag` give it.
    """
    return draw.over_lag({name: curve.tolist() for name, curve in curves.items()}, ax)


def adjoint_map(record: AdjointMap | GradientBreakdown, sample: int | None = None, ax: Axes | None = None) -> Axes:
    """‖∂E_k/∂s_t‖ of every source k over the step t: a heat map, or up to eight sources as curves.

    Args:
        record: the map, or the breakdown of a comparison's run.
        sample: the index of the sample to show; None: the median over samples, the only choice for a breakdown.
        ax: where to draw.

    Raises:
        IndexError: there is no such sample.
        ValueError: a sample is given for a breakdown.
    """
    if isinstance(record, AdjointMap):
        return record.plot(ax, sample)
    if sample is not None:
        raise ValueError(f"sample: a breakdown holds medians over samples alone; leave it out, got {sample}")
    log_norms = np.array(record.map, dtype=float)
    return draw.heat_map(record.steps, record.sources, log_norms, r"$\|\partial E_k/\partial s_t\|$", ax)


def terms(record: StateTerms | GradientBreakdown, ax: Axes | None = None) -> Axes:
    """Each path's share of the gradient that arrives at step t, the median over samples; shares sum to 1."""
    if isinstance(record, StateTerms):
        return record.plot(ax)
    return draw.lines(record.share, record.steps, "step t", "share of the gradient that comes back", ax, zero=True)


def memory(record: GateStatistics | GradientBreakdown, bins: int = 20, ax: Axes | None = None) -> Axes:
    """The distribution of the units' time constants, the steps in which a unit forgets by 1/e as its carry implies, on
    an axis from 1 step to 10·T.

    Raises:
        ValueError: the cell carries nothing.
    """
    if isinstance(record, GateStatistics):
        counts, edges = record.histogram(bins)
        return draw.histogram(np.asarray(counts), np.asarray(edges), record.steps, ax)
    return draw.histogram(*_time_constants(record, bins), record.steps[-1] + 1, ax)


def _time_constants(record: GradientBreakdown, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The histogram of a breakdown's units, bins of equal width in ln τ as `GateStatistics.histogram` has them."""
    if record.time_constants is None:
        raise ValueError("record: of a plain RNN, which has no gate that carries its state")
    tau = np.clip([value for value in record.time_constants if value is not None], 1e-3, 1e9)
    if not len(tau):
        raise ValueError("record: no unit has a time constant")
    return np.histogram(tau, np.geomspace(tau.min(), tau.max() if tau.max() > tau.min() else 10 * tau.min(), bins + 1))


def subgradients(record: LayerFlow | GradientBreakdown, ax: Axes | None = None) -> Axes:
    """‖g_t‖ of the T subgradients of ∂E/∂W = Σ_t g_t, and, where recorded, ‖Σ_{s ≥ t} g_s‖.

    Raises:
        ValueError: the record has no subgradients, because it is of marked states.
    """
    names, y = (r"$\|g_t\|$", r"$\|\Sigma_{s \geq t} g_s\|$"), "norm of the weight's gradient"
    if not isinstance(record, LayerFlow):
        both = (record.subgradient, record.partial_sums)
        curves = {
            name: [None if v is None else v / draw.LN10 for v in values]
            for name, values in zip(names, both, strict=True)
        }
        return draw.per_step(curves, record.steps, "step t", y, ax)
    if record.dweight is None:
        raise ValueError(f"record: {record.name!r} is of marked states, which have no weights")
    both = zip(names, (record.dweight, record.partial), strict=True)
    found = {name: v for name, v in both if v is not None}
    positive = {name: np.where(v.numpy() > 0, v.numpy(), np.nan) for name, v in found.items()}
    return draw.lines(positive, range(len(record.dweight)), "step t", y, ax, log=True)  # type: ignore[arg-type]


def sources(record: SourceGradients, ax: Axes | None = None) -> Axes:
    """‖∂E_k/∂W‖ of each error source, their partial sums ‖S_n‖, and the longest path's term alone."""
    return record.plot(ax)


def lyapunov(record: LyapunovSpectrum, ax: Axes | None = None) -> Axes:
    """The estimates of the Lyapunov exponents over the steps, as they converge."""
    return record.plot(ax)


def diagnosis(record: Diagnosis | Verification, ax: Axes | None = None) -> Axes:
    """The gradient over the lag in every layer, with its verdict; for a verification, before and after."""
    return record.plot(ax)


def save_figures(comparison: Comparison, folder: str | os.PathLike[str]) -> list[Path]:
    """PNG and SVG of every task's reach before and after training, of its learning curves, and of the cures."""
    written = []
    for task in comparison.tasks:
        pictures = {
            "reach-before": reach(task, moment="before"),
            "reach-after": reach(task, moment="after"),
            "learning": learning(task),
        } | {f"{run.name}-cures": cures(run) for run in task.runs if run.cures}
        for name, ax in pictures.items():
            for kind in ("png", "svg"):
                path = Path(folder) / f"{task.name}-{name}.{kind}"
                draw.figure_of(ax).savefig(path, dpi=150)
                written.append(path)
    return written
