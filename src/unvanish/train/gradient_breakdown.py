"""Why the gradient survives or vanishes in a trained model: the data of the report's pictures."""

from copy import deepcopy

import torch
from torch import Tensor

from unvanish import flow
from unvanish.nn.modules import layer_directions
from unvanish.train.models import SequenceModel
from unvanish.train.records import GradientBreakdown
from unvanish.train.tasks import Task
from unvanish.train.tasks.task import IGNORED

POINTS = 200
"""steps kept of each curve at most"""
SOURCES = 30
"""error sources of the map at most"""


def break_down(model: SequenceModel, task: Task, update: int, probes: int) -> GradientBreakdown:
    """Terms, subgradients, time constants and the adjoint map of a model's layer, in float64.

    The error is the task's own at the last step; in the map a random one at each source.
    """
    double = deepcopy(model).double().train(False)
    layer = double.recurrent
    x, y = ending_together(task, probes)
    with torch.enable_grad(), flow.watch(double, partial=True) as record:
        states, _ = layer(x)
        (task.loss(double.head(states[:, -1]), y) * len(y)).backward()
    own = record["recurrent.l0"]
    last = torch.zeros(states.shape[1], states.shape[0], states.shape[2], dtype=torch.float64)
    last[-1] = 1.0
    terms = flow.decompose(layer, x, error=last)
    found = flow.adjoint_map(layer, x, sources=min(SOURCES, x.shape[1]))
    T = x.shape[1]
    steps = sorted({round(i * (T - 1) / (POINTS - 1)) for i in range(POINTS)}) if T > POINTS else list(range(T))
    carries = layer_directions(layer)[0].cell.carries
    assert own.dweight is not None
    assert own.partial is not None
    arrived = terms.log_total.roll(-1, 0)  # ln‖δ_{t+1}‖; of the last two steps' the first is no sum of terms
    arrived[-2:] = torch.nan
    kept = {term.title: term.log_norm - arrived for term in terms.terms.values()}
    return GradientBreakdown(
        update=update,
        steps=steps,
        share={term.title: _plain(term.share.nanmedian(1).values[steps]) for term in terms.terms.values()},
        kept={title: _plain(v.nanmedian(1).values[steps]) for title, v in kept.items()},
        kept_in_all=_plain((terms.log_total - arrived).nanmedian(1).values[steps]),
        subgradient=_plain(own.dweight[steps].log()),
        partial_sums=_plain(own.partial[steps].log()),
        last_steps=steps_holding(own.dweight, 0.99),
        time_constants=_plain(flow.gate_statistics(layer, x).time_constant) if carries else None,
        sources=list(found.sources),
        map=[_plain(row) for row in found.log_norms.median(2).values[:, steps]],
    )


def ending_together(task: Task, most: int) -> tuple[Tensor, Tensor]:
    """(x `[B, T, I]` in float64, y of the last step) of those among the first validation samples that end at the most
    common last step."""
    x, y = task.samples("validation", range(most))
    x = x.double()
    if task.answers == 1:
        return x, y.double() if y.is_floating_point() else y
    steps = (y != IGNORED).sum(1)
    end = int(steps.mode().values)
    return x[steps == end, : x.shape[1] - y.shape[1] + end], y[steps == end, end - 1]


def steps_holding(dweight: Tensor, share: float) -> int:
    """The least n for which the last n steps hold this share of Σ_t ‖g_t‖; 0 where all are zero."""
    from_the_end = dweight.flip(0).cumsum(0)
    total = float(from_the_end[-1])
    return int((from_the_end < share * total).sum()) + 1 if total > 0 else 0


def _plain(values: Tensor) -> list[float | None]:
    """The number to five digits; None where it is missing or infinite."""
    return [
        float(f"{v:.5g}") if ok else None for v, ok in zip(values.tolist(), values.isfinite().tolist(), strict=True)
    ]
