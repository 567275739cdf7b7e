"""Will it learn? A short training of a copy, and how much of the target can be read from the state afterwards.

What arrives at the lag at this moment does not settle that: the weights move, and with them the reach. So a copy makes
`UPDATES` steps on the batch, and a linear read-out is asked what it finds in the states at which the error arrives:

    R = 1 − Σ‖y − ŷ(h)‖² / Σ‖y − ȳ‖²       ŷ: ridge regression, judged on samples it was not fitted on (4 folds)
    s = ln of the worst layer's survival at the lag (the median of samples), before the trial, kept in [−20, 0]
    chance = σ(w₀ + w_R R + w_s s)

Neither R nor s knows units: the loss is divided by the norm of its first gradient, and so may be scaled at will. The
weights w were fitted on one half of the grid in benchmarks/diagnosis.py; the chance is that of learning in its
setting (600 updates of Adam at 3e-3, batch 32), and carries that grid's base rate.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from unvanish.diagnosis.capture import Given, capture

UPDATES, BATCH, CLIP = 100, 32, 1.0
FOLDS, RIDGE, STEPS, CLASSES = 4, 1e-3, 6, 64
PER_FEATURE = 4
"""samples that a fold fits per feature, at least: with fewer a read-out tells of the samples, not of the state"""
WEIGHTS = (1.17, 3.04, 0.18)
"""w₀, w_R, w_s"""


class Odds(NamedTuple):
    """What the trial found, and the chance that follows."""

    readable: float
    """R"""
    survival: float
    """of the worst layer at the lag, before the trial"""

    @property
    def chance(self) -> float:
        """σ(w₀ + w_R R + w_s s)"""
        constant, by_readable, by_survival = WEIGHTS
        s = math.log(min(1.0, max(self.survival, math.exp(-20))))
        return 1 / (1 + math.exp(-(constant + by_readable * self.readable + by_survival * s)))


def readable_after(
    model: nn.Module, inputs: tuple[Any, ...], target: Tensor, loss: Callable[[Any, Any], Tensor], lr: float, seed: int
) -> float:
    """R in [0, 1] after the trial; 0 where it diverges.

    Raises:
        ValueError: the target is no tensor with one row per sample, or the samples are too few for the state's size.
    """
    twin = _trained(model, inputs, target, loss, lr, seed)
    if twin is None:
        return 0.0
    given, _ = capture(twin, inputs, lambda output: loss(output, target), seed)
    return max(0.0, *(_readable(g, target) for g in given))


def _trained(
    model: nn.Module, inputs: tuple[Any, ...], target: Tensor, loss: Callable[[Any, Any], Tensor], lr: float, seed: int
) -> nn.Module | None:
    """A copy after `UPDATES` of Adam on three quarters of the batch; None where the loss stops being finite."""
    twin = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.Adam(twin.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    samples, unit = target.shape[0] - target.shape[0] // FOLDS, None
    devices = {p.device for p in twin.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        torch.manual_seed(seed)
        for _ in range(UPDATES):
            rows = torch.randint(samples, (min(BATCH, samples),), generator=generator)
            few = tuple(_rows(x, rows, len(target)) for x in (*inputs, target))
            optimizer.zero_grad()
            value = loss(twin(*few[:-1]), few[-1])
            value.backward()
            norm = nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
            if not bool(norm.isfinite()) or not bool(value.isfinite()):
                return None
            if unit is None:
                unit = float(norm) or 1.0
            factor = 1 / max(unit, float(norm) / CLIP)
            for p in twin.parameters():
                if p.grad is not None:
                    p.grad.mul_(factor)
            optimizer.step()
    return twin


def _rows(x: Any, rows: Tensor, samples: int) -> Any:
    """These samples of an input; what has no axis of `samples` is for all of them."""
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        return pack_padded_sequence(padded[rows], lengths[rows], batch_first=True, enforce_sorted=False)
    if not isinstance(x, Tensor):
        return x
    axis = next((axis for axis in (0, 1) if axis < x.dim() and x.shape[axis] == samples), None)
    return x if axis is None else x.index_select(axis, rows.to(x.device))


def checked_target(given: list[Given], target: Any) -> Tensor:
    """The target, if a read-out can be fitted at all.

    Raises:
        ValueError: as `readable_after`.
    """
    samples = given[0].x.shape[1]
    if not isinstance(target, Tensor) or target.dim() == 0 or target.shape[0] != samples:
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"trial: expected the target as a tensor with one row for each of {samples} samples, got {got}"
        )
    features = min(g.error.shape[-1] for g in given) + 1
    least = math.ceil(PER_FEATURE * features * FOLDS / (FOLDS - 1))
    if samples < least:
        raise ValueError(
            f"trial: expected a batch of at least {least} samples for a state of {features - 1} units, got {samples}; "
            "hand in more, or leave the trial out"
        )
    return target


@torch.no_grad()
def _readable(given: Given, target: Tensor) -> float:
    """R of one recurrent module."""
    T = len(given.x)
    whole = bool((given.lengths == T).all())
    fed = given.x if whole else pack_padded_sequence(given.x, given.lengths, enforce_sorted=False)
    y, _ = given.layer(fed, given.hx)
    h = pad_packed_sequence(y, total_length=T)[0] if isinstance(y, PackedSequence) else y
    if h.shape[1] * (FOLDS - 1) < PER_FEATURE * FOLDS * (h.shape[-1] + 1):
        return 0.0
    left = total = 0.0
    for states, answers in _questions(h, (given.error != 0).any(-1), target):
        for fold in range(FOLDS):
            out = torch.arange(len(states), device=h.device) % FOLDS == fold
            residual, spread = _judged(states[~out], answers[~out], states[out], answers[out])
            left, total = left + residual, total + spread
    return max(0.0, 1 - left / total) if total > 0 else 0.0


def _questions(h: Tensor, made: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(states [B, F], answers [B, O]): one for each step that is answered, or one for all where the target has no
    steps: then the mean of the states at which error arrives."""
    steps = made.any(1).nonzero().flatten().tolist()
    by_step = target.dim() >= 2 and target.shape[1] == len(steps) > 1
    if not by_step:
        weight = made[..., None].to(h)
        yield _answered(
            (h * weight).sum(0) / weight.sum(0).clamp_min(1), target.flatten(1) if target.dim() > 1 else target
        )
        return
    for i in sorted({round(j * (len(steps) - 1) / (STEPS - 1)) for j in range(STEPS)}):
        yield _answered(h[steps[i]], target[:, i])


def _answered(states: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Classes as one-hot rows, of many the most frequent; samples with a class below 0, which losses ignore, go."""
    if target.is_floating_point():
        return states, target.to(states).reshape(len(target), -1)
    target = target.reshape(len(target), -1)
    keep = (target >= 0).all(-1)
    values, counts = target[keep].unique(return_counts=True)
    values = values[counts.argsort(descending=True)[:CLASSES]]
    return states[keep], (target[keep][..., None] == values).to(states).flatten(1)


def _judged(x: Tensor, y: Tensor, x_out: Tensor, y_out: Tensor) -> tuple[float, float]:
    """(Σ‖y − ŷ‖², Σ‖y − ȳ‖²) over the samples left out."""
    mean, spread = x.mean(0), x.std(0)
    spread = torch.where(spread > 0, spread, 1.0)
    x, x_out, centre = (x - mean) / spread, (x_out - mean) / spread, y.mean(0)
    gram = x.mT @ x + RIDGE * len(x) * torch.eye(x.shape[1]).to(x)
    fit = torch.linalg.solve(gram, x.mT @ (y - centre))
    return float((y_out - centre - x_out @ fit).square().sum()), float((y_out - centre).square().sum())
