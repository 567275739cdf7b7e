"""One training of `cures.py`: the cells, the cures, the samples, and what is measured of a training."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import unvanish as uv
from unvanish import cures, flow
from unvanish import nn as layers
from unvanish.train.models import SequenceModel
from unvanish.train.tasks import Task, make_task

TASKS = ("adding", "temporal-order", "delayed-recall", "digits-padded", "noise-free")
LAGS, RATES, SEEDS = (50, 25, 100), (1e-2, 3e-3), (0, 1, 2)
HIDDEN, BATCH, UPDATES, EVERY, JUDGED = 32, 32, 600, 25, 256
GOAL = 0.5
"""share of the best constant answer's error; below it in two validations in a row a task counts as learnt"""
CELLS: dict[str, Callable[..., Any]] = {
    "LSTM": layers.LSTM,
    "GRU": layers.GRU,
    "tanh-RNN": layers.RNN,
    "IndRNN": partial(layers.Recurrent, uv.cells.ZOO["indrnn"]()),
}


class Case(NamedTuple):
    """One training of the grid."""

    lag: int
    rate: float
    seed: int
    task: str
    cell: str
    cure: str


class Trial:
    """A model, and what a cure changes about its training."""

    def __init__(self, case: Case, task: Task, x: Tensor) -> None:
        torch.manual_seed(case.seed)
        self.case, self.task, self.x = case, task, x[:BATCH]
        self.layer = CELLS[case.cell](task.inputs, HIDDEN, batch_first=True)
        self.model = SequenceModel(self.layer, task.outputs, task.answers)
        self.helper: nn.Module | None = None
        """trained along"""
        self.around: AbstractContextManager[Any] = nullcontext()
        """in which a training pass runs"""
        self.states: Callable[[Tensor], Tensor] = lambda x: self.model.recurrent(x)[0]
        self.auxiliary: Callable[[Tensor, Tensor], Tensor] | None = None
        """of (states, x), added to the loss"""
        self.after_backward: Callable[[], Any] = lambda: None
        self.with_optimizer: Callable[[torch.optim.Optimizer], Any] = lambda optimizer: None

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        states = self.states(x)
        task, read = self.task, states[:, -1] if self.task.answers == 1 else states[:, -self.task.answers :]
        loss = task.loss(self.model.head(read), y)
        return loss if self.auxiliary is None else loss + self.auxiliary(states, x)

    def pretrain(self, penalty: Callable[[Tensor], Tensor], updates: int) -> None:
        """On inputs alone."""
        optimizer = torch.optim.Adam(self.layer.parameters(), lr=3e-3)
        for _ in range(updates):
            optimizer.zero_grad()
            penalty(self.x[:8]).backward()
            optimizer.step()


def clipper(trial: Trial) -> None:
    trial.after_backward = cures.GradientClipper(trial.model.parameters(), quantile=0.5, maximum=1.0).clip_


def carry_rate(trial: Trial) -> None:
    cures.carry_bias.carry_biases(trial.model, "CarryRate")
    trial.with_optimizer = lambda optimizer: cures.CarryRate(optimizer, trial.model, 0.1)


def truncated(trial: Trial) -> None:
    def states(x: Tensor) -> Tensor:
        walk = cures.TruncatedBPTT(x, x.shape[1] // 2, batch_first=True)
        parts = []
        for piece in walk:
            part, state = trial.layer(piece.x, piece.state)
            parts.append(part)
            walk.hand_on(state)
        return torch.cat(parts, 1)

    trial.states = states


def reconstruction(trial: Trial) -> None:
    aux = cures.Reconstruction(HIDDEN, trial.task.inputs, length=10, batch_first=True)
    trial.helper, trial.auxiliary = aux, lambda states, x: 0.5 * aux(states, x)


def omega(trial: Trial) -> None:
    penalty = cures.Omega(trial.model)
    trial.around, trial.after_backward = penalty, lambda: penalty.penalty().backward()


def flossing(trial: Trial) -> None:
    trial.pretrain(cures.GradientFlossing(trial.layer, n=HIDDEN // 4, every=5), 30)


def local_stability(trial: Trial) -> None:
    trial.pretrain(cures.LocalStability(trial.layer), 100)


def critical(trial: Trial) -> None:
    target = {"LSTM": 0.7, "GRU": 0.8}.get(trial.case.cell, 1.0)
    cures.critical_(trial.layer, trial.x, target=target)


def identity(trial: Trial) -> None:
    if trial.case.cell == "tanh-RNN":
        trial.layer = layers.RNN(trial.task.inputs, HIDDEN, batch_first=True, nonlinearity="relu")
        trial.model.recurrent = trial.layer
    cures.identity_(trial.layer)


def replaced(trial: Trial, by: str, max_lag: int | None = None) -> None:
    trial.model = cures.replace_(uv.restore(trial.model), by)  # type: ignore[assignment]
    if max_lag:
        cures.chrono_(trial.model, max_lag)
    uv.accelerate(trial.model)


def in_place(trial: Trial, cure: Callable[[nn.Module], nn.Module]) -> None:
    trial.model = cure(trial.model)  # type: ignore[assignment]


CURES: dict[str, Callable[[Trial], None]] = {
    "as it is": lambda t: None,
    "forget_bias_(1)": lambda t: in_place(t, cures.forget_bias_),
    "forget_bias_(ln T)": lambda t: in_place(t, lambda m: cures.forget_bias_(m, math.log(t.case.lag))),
    "chrono_(T)": lambda t: in_place(t, lambda m: cures.chrono_(m, t.case.lag)),
    "uniform_gate_": lambda t: in_place(t, cures.uniform_gate_),
    "rescue_(T − 1)": lambda t: cures.rescue_(t.layer, t.x, t.case.lag - 1) and None,
    "CarryRate(0.1)": carry_rate,
    "orthogonal_": lambda t: in_place(t, cures.orthogonal_),
    "identity_ (relu)": identity,
    "spectral_radius_(1)": lambda t: in_place(t, cures.spectral_radius_),
    "critical_": critical,
    "LocalStability": local_stability,
    "GradientFlossing": flossing,
    "Omega": omega,
    "constrain_ orthogonal": lambda t: in_place(t, cures.constrain_),
    "constrain_ spectral": lambda t: in_place(t, lambda m: cures.constrain_(m, "spectral")),
    "GradientClipper": clipper,
    "clip_recurrence_(1)": lambda t: in_place(t, lambda m: cures.clip_recurrence_(m, 1.0)),
    "h_detach_(0.25)": lambda t: in_place(t, lambda m: cures.h_detach_(m, 0.25)),
    "TruncatedBPTT(T/2)": truncated,
    "Reconstruction": reconstruction,
    "zoneout_(0.1)": lambda t: in_place(t, lambda m: cures.zoneout_(m, 0.1)),
    "recurrent_dropout_(0.1)": lambda t: in_place(t, lambda m: cures.recurrent_dropout_(m, 0.1)),
    "layer_norm_": lambda t: in_place(t, cures.layer_norm_),
    "replace_ by LSTM": lambda t: replaced(t, "lstm"),
    "replace_ by GRU": lambda t: replaced(t, "gru"),
    "replace_ by GRU, chrono_(T)": lambda t: replaced(t, "gru", t.case.lag),
}


@cache
def material(name: str, lag: int, seed: int) -> tuple[Task, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(task, training samples for every update, those it is judged on): the same for all cells and cures."""
    task = make_task(name, lag, seed)
    return task, task.samples("train", range(UPDATES * BATCH)), task.samples("validation", range(JUDGED))


def reach(trial: Trial) -> int:
    """The largest lag at which the median over samples of ‖∂E_T/∂x_{T−ℓ}‖, E_T a random error at the last state, is
    above 1 % of its value at lag 0: one figure for every cell and cure, those included whose steps are not traced."""
    model = trial.model
    was_training, dtype = model.training, next(model.parameters()).dtype
    model.double().train(False)
    x = trial.x.double().requires_grad_()
    last = model.recurrent(x)[0][:, -1]
    error = torch.randn(last.shape, generator=torch.Generator().manual_seed(0), dtype=last.dtype)
    (dx,) = torch.autograd.grad((last * error).sum(), x)
    model.to(dtype).train(was_training)
    norms = dx.norm(dim=-1).log().median(0).values.flip(0)
    if not norms[0].isfinite() or bool((norms.isnan() | (norms == math.inf)).any()):
        return 0
    return flow.decay(norms).reach


@cache
def refusals() -> dict[tuple[str, str], str]:
    """(cell, cure) → why the cure does not fit the cell."""
    found = {}
    task = make_task(TASKS[0], 8, 0)
    x, _ = task.samples("train", range(BATCH))
    for cell, cure in product(CELLS, CURES):
        case = Case(8, 1e-2, 0, TASKS[0], cell, cure)
        try:
            CURES[cure](Trial(case, task, x))
        except (TypeError, ValueError) as why:
            found[cell, cure] = str(why)
        except ArithmeticError:
            pass  # it fits, and could not be carried out on these weights
    return found


FAILED = {"learnt_at": None, "diverged": True, "reach_before": None, "reach_after": None}


def train(case: Case) -> dict[str, Any]:
    """One training, and what came of it."""
    start = time.process_time()
    task, (x, y), judged = material(case.task, case.lag, case.seed)
    trial = Trial(case, task, x)
    found: dict[str, Any] = case._asdict()
    try:
        CURES[case.cure](trial)
    except ArithmeticError:
        # It fits the cell, and could not be carried out on these weights: that is a failure.
        return found | FAILED | {"seconds": round(time.process_time() - start, 1)}
    found["reach_before"] = reach(trial)
    parameters = [*trial.model.parameters(), *(trial.helper.parameters() if trial.helper else ())]
    optimizer = torch.optim.Adam(parameters, lr=case.rate, fused=True)
    trial.with_optimizer(optimizer)
    below = 0
    found |= {"learnt_at": None, "diverged": False}
    for update in range(1, UPDATES + 1):
        here = slice((update - 1) * BATCH, update * BATCH)
        optimizer.zero_grad()
        with trial.around:
            loss = trial.loss(x[here], y[here])
            loss.backward()
        if not loss.isfinite():
            found["diverged"] = True
            break
        try:
            trial.after_backward()
        except ArithmeticError:
            found["diverged"] = True
            break
        optimizer.step()
        if update % EVERY == 0:
            below = below + 1 if error(trial.model, task, *judged) < GOAL * task.chance else 0
            if below == 2:
                found["learnt_at"] = update - EVERY
                break
    found["reach_after"] = None if found["diverged"] else reach(trial)
    return found | {"seconds": round(time.process_time() - start, 1)}


@torch.no_grad()
def error(model: SequenceModel, task: Task, x: Tensor, y: Tensor) -> float:
    model.eval()
    found = float(task.error(model(x), y))
    model.train()
    return found if math.isfinite(found) else math.inf
