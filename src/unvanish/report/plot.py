"""The pictures for papers: matplotlib, on Axes that are given or made; each function returns its Axes.

Colour-blind-safe, told apart by dash too; norms on a logarithmic axis; medians over samples, bands from 10 % to 90 %.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor

from unvanish.diagnosis import Diagnosis, Verification
from unvanish.diagnosis.measure import FRACTION
from unvanish.flow import (
    AdjointMap,
    Flow,
    GateStatistics,
    LayerFlow,
    LyapunovHistory,
    SourceGradients,
    StateTerms,
)
from unvanish.report.style import LINES, LN10, decades, line, short, spans_decades
from unvanish.train.records import Anatomy, Comparison, Reach, Run, TaskResult

Moment = Literal["before", "after"]


def _power(value: float, position: float | None = None) -> str:
    """A tick that stands for a power of ten; of a range so short that it has no whole ones, the number."""
    return f"$10^{{{value:g}}}$" if value and float(value).is_integer() else f"{10**value:.2g}"


def _powers_of_ten(ax: Axes) -> None:
    """The y axis holds exponents."""
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(_power)


def new_axes(width: float = 6.4, height: float = 3.8) -> Axes:
    """Axes of a figure of their own, outside pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def reach(task: TaskResult, ax: Axes | None = None, moment: Moment = "before") -> Axes:
    """‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0 over the lag ℓ, in powers of ten: median over samples, band from 10 % to 90
    %."""
    ax = ax or new_axes()
    _decays([(run.title, getattr(run, moment)) for run in task.runs], ax)
    when = "before training" if moment == "before" else "after training"
    ax.set_title(f"{_text(task.title)}: the error's way back, {when}", loc="left", fontsize=10)
    return ax


def cures(run: Run, ax: Axes | None = None) -> Axes:
    """‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0 over the lag ℓ before training, without and with each cure of a plain cell.

    Raises:
        ValueError: the run holds no cures: its cell was cured already.
    """
    if not run.cures:
        raise ValueError(f"run: {run.name!r} holds no cures; those of plain cells do")
    ax = ax or new_axes()
    _decays([(run.title, run.before), *((cure.title, cure.reach) for cure in run.cures)], ax)
    ax.set_title(f"{_text(run.title)}: without and with a cure, before training", loc="left", fontsize=10)
    return ax


def _decays(found: Sequence[tuple[str, Reach]], ax: Axes) -> None:
    for index, (title, reach) in enumerate(found):
        style = line(index)
        middle, low, high = (np.array(decades(v), dtype=float) for v in (reach.log_norm, reach.low, reach.high))
        ax.fill_between(reach.lag, low, high, color=style.colour, alpha=0.15, linewidth=0)
        ax.plot(reach.lag, middle, color=style.colour, linestyle=style.dashes, linewidth=1.8, label=_text(title))
    _finish(ax, "lag ℓ (steps before the error)", r"$\|\partial E_T/\partial s_{T-\ell}\|$ relative to lag 0")
    _powers_of_ten(ax)


def learning(task: TaskResult, ax: Axes | None = None) -> Axes:
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
            label=_text(run.title),
        )
    ax.axhline(task.chance, color="0.4", linewidth=0.9, label="chance")
    ax.axhline(task.solved_below, color="0.4", linewidth=0.9, linestyle=":", label="solved below")
    if spans_decades(task):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    _finish(ax, "optimizer updates", f"validation {task.metric}")
    ax.set_title(f"{_text(task.title)}: who learns", loc="left", fontsize=10)
    return ax


def flow(record: Flow | LayerFlow, ax: Axes | None = None) -> Axes:
    """‖∂E/∂h_t‖, and ‖∂E/∂c_t‖ where there is a cell state, over t: median over samples, band from 10 % to 90 %."""
    ax = ax or new_axes()
    layers = [record] if isinstance(record, LayerFlow) else list(record.values())
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
                label=rf"{_text(layer.name)}  $\|\partial E/\partial {label}_t\|$",
            )
    ax.set_yscale("log")
    _finish(ax, "step t", "error gradient norm")
    return ax


def decay(curves: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """‖∂E_T/∂s_{T−ℓ}‖ relative to lag 0 over the lag ℓ, in powers of ten.

    Args:
        curves: layer → `[T]` the natural logarithm, as `GradientFlow` and `AdjointMap.over_lag` give it.
    """
    ax = ax or new_axes()
    for index, (name, curve) in enumerate(curves.items()):
        style = line(index)
        values = np.array(decades((curve - curve[0]).tolist()), dtype=float)
        ax.plot(values, color=style.colour, linestyle=style.dashes, linewidth=1.8, label=_text(name))
    _finish(ax, "lag ℓ (steps before the error)", r"$\|\partial E_T/\partial s_{T-\ell}\|$ relative to lag 0")
    _powers_of_ten(ax)
    return ax


def adjoint_map(record: AdjointMap | Anatomy, sample: int | None = None, ax: Axes | None = None) -> Axes:
    """‖∂E_k/∂s_t‖ of every source k over the step t: a heat map, or up to eight sources as curves.

    Args:
        record: the map, or the anatomy of a comparison's run.
        sample: which one to show; None: the median over samples, which is all that an anatomy has.
        ax: where to draw.

    Raises:
        IndexError: there is no such sample.
        ValueError: a sample is asked for of an anatomy.
    """
    if isinstance(record, Anatomy):
        if sample is not None:
            raise ValueError(f"sample: an anatomy holds medians over samples alone; leave it out, got {sample}")
        return _map_of(record, ax)
    values = record.log_norms.median(2).values if sample is None else record.log_norms[:, :, sample]
    powers = np.ma.masked_invalid(values.numpy() / LN10)
    label = rf"$\|\partial E_k/\partial {record.state}_t\|$"
    if len(record.sources) <= len(LINES):
        ax = ax or new_axes()
        for index, k in enumerate(record.sources):
            style = line(index)
            ax.plot(powers[index], color=style.colour, linestyle=style.dashes, linewidth=1.8, label=f"k = {k}")
        _powers_of_ten(ax)
        _finish(ax, "step t", label)
        return ax
    return _heat_map(np.arange(powers.shape[1]), np.array(record.sources), powers, label, ax)


def _map_of(record: Anatomy, ax: Axes | None) -> Axes:
    powers = np.ma.masked_invalid(np.array(record.map, dtype=float) / LN10)
    label = r"$\|\partial E_k/\partial s_t\|$"
    return _heat_map(np.array(record.steps), np.array(record.sources), powers, label, ax)


def _heat_map(steps: np.ndarray, sources: np.ndarray, powers: Any, label: str, ax: Axes | None) -> Axes:
    ax = ax or new_axes(5.6, 4.4)
    t, k = (np.append(v, 2 * v[-1] - v[-2] if len(v) > 1 else v[-1] + 1) for v in (steps, sources))
    image = ax.pcolormesh(t, k, powers, cmap="cividis", rasterized=True)
    bar = _figure(ax).colorbar(image, ax=ax, format=_power, ticks=MaxNLocator(8, integer=True))
    bar.set_label(label)
    ax.set_xlabel("step t")
    ax.set_ylabel("error source k")
    return ax


def terms(record: StateTerms | Anatomy, ax: Axes | None = None) -> Axes:
    """Each path's share of the error that comes back to step t, the median over samples; they sum to 1."""
    ax = ax or new_axes()
    if isinstance(record, Anatomy):
        steps, shares = record.steps, {name: np.array(v, dtype=float) for name, v in record.share.items()}
    else:
        shares = {name: term.share.nanmedian(1).values.numpy() for name, term in record.terms.items()}
        steps = range(len(next(iter(shares.values()))))
    for index, (name, share) in enumerate(shares.items()):
        style = line(index)
        ax.plot(
            steps, share, color=style.colour, linestyle=style.dashes, linewidth=1.8, label=_text(name.replace("_", " "))
        )
    ax.axhline(0, color="0.4", linewidth=0.8)
    _finish(ax, "step t", "share of the error that comes back")
    return ax


def memory(record: GateStatistics | Anatomy, bins: int = 20, ax: Axes | None = None) -> Axes:
    """How many units forget by 1/e in how many steps: the time constants that the carry gate implies.

    Raises:
        ValueError: the cell has no gate that carries its state.
    """
    ax = ax or new_axes()
    counts, edges = _time_constants(record, bins) if isinstance(record, Anatomy) else record.histogram(bins)
    counts, edges = np.asarray(counts), np.asarray(edges)
    ax.stairs(counts, edges, fill=True, color=line(2).colour, alpha=0.75)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(_steps_between(edges[0], edges[-1])))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(ax, "time constant τ (steps)", "units", legend=False)
    return ax


def _time_constants(record: Anatomy, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The histogram of an anatomy's units, bins of equal width in ln τ as `GateStatistics.histogram` has them."""
    if record.time_constants is None:
        raise ValueError("record: of a plain RNN, which has no gate that carries its state")
    tau = np.clip([value for value in record.time_constants if value is not None], 1e-3, 1e9)
    if not len(tau):
        raise ValueError("record: no unit has a time constant")
    return np.histogram(tau, np.geomspace(tau.min(), tau.max() if tau.max() > tau.min() else 10 * tau.min(), bins + 1))


def _steps_between(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, few enough to be read: 1, 2, 5 times powers of ten, or powers alone."""
    decades_ = math.log10(high / low)
    if decades_ < 1:
        return [float(v) for v in MaxNLocator(5).tick_values(low, high)]
    digits = (1, 2, 5) if decades_ < 3 else (1,)
    whole = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**power for power in whole for digit in digits]


def subgradients(record: LayerFlow | Anatomy, ax: Axes | None = None) -> Axes:
    """‖g_t‖ of the T subgradients of ∂E/∂W = Σ_t g_t, and, where recorded, ‖Σ_{s ≥ t} g_s‖.

    Raises:
        ValueError: the record has none: it is of marked states.
    """
    own, total = r"$\|g_t\|$", r"$\|\sum_{s \geq t} g_s\|$"
    ax = ax or new_axes()
    if isinstance(record, Anatomy):
        for index, (label, log_norm) in enumerate(((own, record.subgradient), (total, record.partial))):
            style, powers = line(index), np.array(log_norm, dtype=float) / LN10
            ax.plot(record.steps, powers, color=style.colour, linestyle=style.dashes, linewidth=1.8, label=label)
        _powers_of_ten(ax)
        _finish(ax, "step t", "norm of the weight's gradient")
        return ax
    if record.dweight is None:
        raise ValueError(f"record: {record.name!r} is of marked states, which have no weights")
    curves = [(record.dweight, own)]
    if record.partial is not None:
        curves.append((record.partial, total))
    for index, (norm, label) in enumerate(curves):
        style, values = line(index), norm.numpy()
        values = np.where(values > 0, values, np.nan)
        ax.plot(values, color=style.colour, linestyle=style.dashes, linewidth=1.8, label=label)
    ax.set_yscale("log")
    _finish(ax, "step t", "norm of the weight's gradient")
    return ax


def sources(record: SourceGradients, ax: Axes | None = None) -> Axes:
    """‖∂E_k/∂W‖ of each error source, their partial sums ‖S_n‖, and the longest path's term alone."""
    ax = ax or new_axes()
    curves = (
        (record.log_norms, r"$\|\partial E_k/\partial W\|$"),
        (record.log_partial_sums, r"$\|S_k\|$"),
        (record.log_longest_path, "the first step's term alone"),
    )
    for index, (log_norm, label) in enumerate(curves):
        style, values = line(index), np.array(decades(log_norm.tolist()), dtype=float)
        ax.plot(record.sources, values, color=style.colour, linestyle=style.dashes, linewidth=1.8, label=label)
    _powers_of_ten(ax)
    _finish(ax, "error source k", "norm of the weight's gradient")
    return ax


def lyapunov(record: LyapunovHistory, ax: Axes | None = None) -> Axes:
    """How the estimates of the Lyapunov exponents settle over the steps."""
    ax = ax or new_axes()
    for i in range(record.history.shape[1]):
        style = line(i)
        ax.plot(
            record.history[:, i].numpy(), color=style.colour, linestyle=style.dashes, linewidth=1.4, label=f"λ{i + 1}"
        )
    ax.axhline(0, color="0.4", linewidth=0.8)
    _finish(ax, "steps read", "exponent (nats per step)")
    return ax


def diagnosis(record: Diagnosis | Verification, ax: Axes | None = None) -> Axes:
    """The error over the lag in every layer, with its verdict; of a verification before and after."""
    if isinstance(record, Verification):
        curves = {f"{name}, before: {d.verdict}": d for name, d in record.before.items()}
        curves |= {f"{name}, after: {d.verdict}": d for name, d in record.after.items()}
    else:
        curves = {f"{name}: {d.verdict}": d for name, d in record.items()}
    ax = decay({label: torch.tensor(d.curve) for label, d in curves.items()}, ax)
    ax.axhline(math.log10(FRACTION), color="0.4", linewidth=0.8, linestyle=":")
    return ax


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
                _figure(ax).savefig(path, dpi=150)
                written.append(path)
    return written


def _text(name: str) -> str:
    """A name, not too long, that starts no formula with "$" and is not left out of the legend for its "_"."""
    name = short(name).replace("$", r"\$")
    return "\u200b" + name if name.startswith("_") else name


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


def _finish(ax: Axes, x: str, y: str, legend: bool = True) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if legend:
        ax.legend(frameon=False, fontsize=8)
