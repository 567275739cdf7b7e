"""Do the states contain the target? A linear read-out of a trained copy's states, judged on held-out rows.

    R = 1 − Σ‖y − ŷ(h)‖² / Σ‖y − ȳ‖²       ŷ: ridge regression fitted on the rows that the copy was trained on

h is the last state of a recurrent module, or the mean over its steps; with a target per step, the state of that step.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from unvanish.diagnosis.interventions.arm import Arm
from unvanish.diagnosis.interventions.material import Rows
from unvanish.diagnosis.interventions.score import SURE
from unvanish.diagnosis.structure import mapped, tensors
from unvanish.nn.modules import RecurrentModule, evaluating

HOLDS = 0.5
"""R from which the states count as containing the target"""
PER_FEATURE = 4
"""the fewest rows per feature to fit: with fewer, a read-out reflects the rows, not the state"""
RIDGE = 1e-2
STEPS, CLASSES = 6, 64
MOST = 512
"""rows to fit on"""


class Readout(NamedTuple):
    """The result of a linear read-out of the states."""

    readable: float
    """R on held-out rows: at most 1; 0 or less where it finds nothing"""
    error: float
    """standard error of R over held-out rows"""
    where: str
    """the module whose states give the best read-out"""
    enough: bool
    """whether there were enough rows for a low R to be meaningful"""

    @property
    def holds(self) -> bool:
        """Whether the states contain the target, by more than chance."""
        return self.readable > max(HOLDS, SURE * self.error)


class Question(NamedTuple):
    """States and the targets to read from them, to fit on and to judge by."""

    x: Tensor
    """`[N, H]`"""
    y: Tensor
    """`[N, K]`"""
    x_out: Tensor
    y_out: Tensor

    def read_out(self) -> tuple[float, float]:
        """(R, its standard error) of ridge regression."""
        return _judged(*self)


def read_out(arm: Arm, seed: int) -> Readout | None:
    """The best read-out over the recurrent modules of a trained copy; None where there is no state or no target."""
    found: list[Readout] = []
    for path, question in _asked(arm, seed, _questions):
        readable, error = question.read_out()
        enough = len(question.x) >= PER_FEATURE * (question.x.shape[1] + 1)
        found.append(Readout(readable, error, path, enough))
    return max(found, key=lambda r: r.readable) if found else None


def head_questions(arm: Arm, seed: int) -> dict[str, Question]:
    """Path → what a head behind this recurrent module could read: its last state or, with a target per step, the
    states of some steps together. Modules whose output goes into other recurrent modules are left out."""
    return dict(_asked(arm, seed, _last_or_all))


Ask = Callable[[Tensor, Tensor, Tensor, Tensor], Iterator[Question]]


def _asked(arm: Arm, seed: int, ask: Ask) -> Iterator[tuple[str, Question]]:
    rows = arm.material
    if not isinstance(rows, Rows):
        return
    held, train = torch.cat(list(rows.groups)), rows.train[:MOST]
    y_train, y_held = (_answers(rows.targets(at), len(at)) for at in (train, held))
    if y_train is None or y_held is None:
        return
    with rows.subject.rng(seed):
        s_train, s_held = _states(arm.model, rows, train), _states(arm.model, rows, held)
        last = _last(arm.model, rows, train[:8], list(s_train)) if ask is _last_or_all else s_train
    for path, states in s_train.items():
        if path in s_held and path in last:
            for question in ask(states, y_train, s_held[path], y_held):
                yield path, question


def _states(model: nn.Module, rows: Rows, at: Tensor) -> dict[str, Tensor]:
    """Path → `[B, T, H]` states of torch's recurrent modules and cells that have one row per sample."""
    calls: dict[str, list[Tensor]] = {}
    whole: dict[str, Tensor] = {}

    def listen(path: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            y: Any = out[0] if isinstance(out, tuple) and not isinstance(out, PackedSequence) else out
            if isinstance(module, nn.RNNCellBase):
                calls.setdefault(path, []).append(y.detach())
                return
            if isinstance(y, PackedSequence):
                padded, lengths = pad_packed_sequence(y, batch_first=True)
                last = padded[torch.arange(len(padded)), lengths - 1]
                y = torch.cat([padded, last[:, None].to(padded)], 1)
            elif y.dim() == 3 and not getattr(module, "batch_first", False):
                y = y.transpose(0, 1)
            if y.dim() == 3 and len(y) == len(at):
                whole[path] = y.detach()

        return module.register_forward_hook(hook)

    kinds = RecurrentModule
    handles = [listen(path, m) for path, m in model.named_modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad(), evaluating(model):
            rows.loss_of(model, at)
    finally:
        for handle in handles:
            handle.remove()
    stepped = {p: torch.stack(c, 1) for p, c in calls.items() if all(t.shape == (len(at), c[0].shape[-1]) for t in c)}
    return {p: y.double() for p, y in (whole | stepped).items() if bool(y.isfinite().all())}


def _answers(target: Any, samples: int) -> Tensor | None:
    if not isinstance(target, Tensor) or target.dim() == 0 or target.dtype == torch.bool:
        return None
    if target.shape[0] != samples:
        target = target.transpose(0, 1) if target.dim() > 1 and target.shape[1] == samples else target
    return target.detach() if target.shape[0] == samples else None


def _last(model: nn.Module, rows: Rows, at: Tensor, paths: list[str]) -> set[str]:
    """Recurrent modules whose outputs do not affect the input of any other one."""

    def given(changed: str) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {path: [] for path in paths if path != changed}

        def note(module: nn.Module, args: Any, path: str) -> None:
            found[path] += tensors(args)

        def change(module: nn.Module, args: Any, out: Any) -> Any:
            return mapped(out, lambda t: 0.5 * t + 0.1)

        handles = [model.get_submodule(path).register_forward_pre_hook(partial(note, path=path)) for path in found]
        if changed in paths:
            handles.append(model.get_submodule(changed).register_forward_hook(change))
        try:
            with torch.no_grad(), evaluating(model), rows.subject.rng(0):
                rows.loss_of(model, at)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def same(was: list[Tensor], now: list[Tensor]) -> bool:
        return len(was) == len(now) and all(torch.equal(a, b) for a, b in zip(was, now, strict=True))

    before = given("no module")
    return {path for path in paths if all(same(before[other], now) for other, now in given(path).items())}


def _per_step(x: Tensor, y: Tensor, x_out: Tensor, y_out: Tensor) -> list[int]:
    """Some of the steps, where there is a target for each; none otherwise."""
    T = min(x.shape[1], x_out.shape[1])
    if y.dim() >= 2 and y.shape[1] == T > 1 and y_out.shape[1] == T:
        return sorted({round(j * (T - 1) / (STEPS - 1)) for j in range(STEPS)})
    return []


def _last_or_all(x: Tensor, y: Tensor, x_out: Tensor, y_out: Tensor) -> Iterator[Question]:
    steps = _per_step(x, y, x_out, y_out)
    if steps:
        yield from _fitting(*(t[:, steps].flatten(0, 1) for t in (x, y, x_out, y_out)))
    else:
        yield from _fitting(x[:, -1], y, x_out[:, -1], y_out)


def _questions(x: Tensor, y: Tensor, x_out: Tensor, y_out: Tensor) -> Iterator[Question]:
    """The read-out for each way to read."""
    steps = _per_step(x, y, x_out, y_out)
    if steps:
        for t in steps:
            yield from _fitting(x[:, t], y[:, t], x_out[:, t], y_out[:, t])
        return
    yield from _fitting(x[:, -1], y, x_out[:, -1], y_out)
    yield from _fitting(x.mean(1), y, x_out.mean(1), y_out)


def _fitting(x: Tensor, y: Tensor, x_out: Tensor, y_out: Tensor) -> Iterator[Question]:
    """Classes as one-hot rows, of many the most frequent; samples with a class below 0, which losses ignore, go."""
    if y.is_floating_point():
        yield Question(x, y.double().reshape(len(y), -1), x_out, y_out.double().reshape(len(y_out), -1))
        return
    y, y_out = y.reshape(len(y), -1), y_out.reshape(len(y_out), -1)
    keep, keep_out = (y >= 0).all(-1), (y_out >= 0).all(-1)
    if int(keep.sum()) < 8 or int(keep_out.sum()) < 8:
        return
    values, counts = y[keep].unique(return_counts=True)
    values = values[counts.argsort(descending=True)[:CLASSES]]
    yield Question(
        x[keep],
        (y[keep][..., None] == values).double().flatten(1),
        x_out[keep_out],
        (y_out[keep_out][..., None] == values).double().flatten(1),
    )


def _judged(x: Tensor, y: Tensor, x_out: Tensor, y_out: Tensor) -> tuple[float, float]:
    """(R, its standard error) on the rows held out."""
    mean, spread = x.mean(0), x.std(0)
    spread = torch.where(spread > 1e-9, spread, 1.0)
    x, x_out, centre = (x - mean) / spread, (x_out - mean) / spread, y.mean(0)
    gram = x.mT @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    fit = torch.linalg.solve(gram, x.mT @ (y - centre))
    return explained(x_out @ fit, y_out - centre)


def explained(answers: Tensor, y: Tensor) -> tuple[float, float]:
    """(R, its standard error) of answers `[N, K]` to y `[N, K]`, against 0."""
    gains = y.square().sum(1) - (y - answers).square().sum(1)
    total = float(y.square().sum(1).mean())
    if total == 0:
        return 0.0, 0.0
    return float(gains.mean()) / total, float(gains.std()) / math.sqrt(len(gains)) / total
