"""Too few units are named where copies with more learn what none of the unchanged width does, and only there."""

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import unvanish as uv
from tests.interventions_subjects import Last, RandomTargets, codes, outcome, recall, subject
from unvanish.diagnosis.interventions import Outcome, capacity, race
from unvanish.diagnosis.interventions.arm import Arm, Judgement
from unvanish.diagnosis.interventions.bar import Bar
from unvanish.diagnosis.interventions.candidates import AS_IS
from unvanish.diagnosis.interventions.capacity import WIDE, Widths, exceeds, more_units
from unvanish.diagnosis.interventions.material import Rows
from unvanish.diagnosis.interventions.optimizers import recipe


@pytest.fixture(autouse=True)
def few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the numbers of updates, not the clock, end each copy's training; on a machine at work elsewhere too."""
    monkeypatch.setattr(race, "MOST", 400)


def delayed_sum(samples: int, inputs: int, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """The sum of `inputs` channels, each as it was a step earlier than the one before, with alternating signs."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(samples, inputs + 2, inputs, generator=g)
    y = torch.stack([(-1) ** i * x[:, -1 - i, i] for i in range(inputs)]).sum(0)
    return x, (y + noise * torch.randn(samples, generator=g))[:, None]


def echo(samples: int, delay: int) -> tuple[Tensor, Tensor]:
    """Each step's answer is the input of `delay` steps before."""
    x = torch.randn(samples, 3 * delay, 1, generator=torch.Generator().manual_seed(6))
    return x, torch.cat([torch.zeros(samples, delay, 1), x[:, :-delay]], 1)


class Each(Last):
    """Reads every step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class FinalState(Last):
    """Starts from zeros of its own, and reads the final state of the layer on top."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(self.rnn.num_layers, len(x), self.rnn.hidden_size)
        return self.head(self.rnn(x, zeros)[1][-1])


class Loop(Last):
    """A loop of single steps."""

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.rnn(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


Case = tuple[Callable[[], nn.Module], tuple[Tensor, Tensor]]
NARROW: dict[str, Case] = {
    "LSTM of 1": (lambda: Last(nn.LSTM(4, 1, batch_first=True), 1), delayed_sum(768, 4)),
    "GRU of 2": (lambda: Last(nn.GRU(6, 2, batch_first=True), 1), delayed_sum(768, 6)),
    "RNN of 1": (lambda: Last(nn.RNN(4, 1, batch_first=True), 1), delayed_sum(768, 4)),
    "final state": (lambda: FinalState(nn.GRU(5, 1, num_layers=2, batch_first=True), 1), delayed_sum(768, 5)),
    "MGU": (lambda: Last(uv.nn.Recurrent(uv.cells.ZOO["mgu"](), 4, 1, batch_first=True), 1), delayed_sum(768, 4)),
    "our LSTM": (lambda: Last(uv.nn.LSTM(5, 1, batch_first=True), 1), delayed_sum(768, 5)),
    "loop of LSTM cells": (lambda: Loop(nn.LSTMCell(4, 1), 1), delayed_sum(768, 4)),
    "loop of GRU cells": (lambda: Loop(nn.GRUCell(5, 1), 1), delayed_sum(768, 5)),
    "echo": (lambda: Each(nn.GRU(1, 2, batch_first=True), 1), echo(512, 4)),
}
WIDE_ENOUGH: dict[str, Case] = {
    "one noisy input": (lambda: Last(nn.GRU(1, 2, batch_first=True), 1), delayed_sum(768, 1, noise=0.7)),
    "LSTM of 8": (lambda: Last(nn.LSTM(4, 8, batch_first=True), 1), delayed_sum(768, 4, noise=0.5)),
    "GRU of 8": (lambda: Last(nn.GRU(3, 8, batch_first=True), 1), delayed_sum(768, 3)),
    "GRU of 24": (lambda: Last(nn.GRU(6, 24, batch_first=True), 1), delayed_sum(768, 6)),
    "loop of GRU cells": (lambda: Loop(nn.GRUCell(2, 6), 1), delayed_sum(768, 2, noise=0.3)),
    "echo": (lambda: Each(nn.GRU(1, 8, batch_first=True), 1), echo(512, 2)),
}


def diagnosed(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Outcome:
    options = {"loss": mse_loss, "optimizer": fast, "budget": 300.0} | options
    return outcome(model, x, y, **options)


def copy_with(losses: list[float], bar: float = 1.0) -> Arm:
    """A copy whose loss was this after 0, 100, 200, … updates, and the bar's."""
    model = Last(nn.GRU(4, 2, batch_first=True), 3)
    x, y = recall(128, 3)
    data = Rows(subject(model, x, y, loss=cross_entropy), 128, 0)
    spread = 1 + 1e-3 * torch.arange(-4.0, 5)
    arm = Arm(AS_IS, data, recipe(None, model, 1e-3)[0], Bar(bar * spread), 0)
    arm.judgements = [Judgement(100 * i, loss * spread.flip(0), bar * spread) for i, loss in enumerate(losses)]
    arm.updates = 100 * (len(losses) - 1)
    return arm


def test_a_narrow_copy_that_learns_must_be_halved() -> None:
    narrow = copy_with([1.0, 0.7, 0.7, 0.7])
    assert narrow.learns
    assert exceeds(copy_with([1.0, 0.5, 0.3, 0.3]), narrow)
    assert not exceeds(copy_with([1.0, 0.5, 0.36, 0.36]), narrow)
    unlearnt = copy_with([1.0, 1.0, 1.0, 1.0])
    assert exceeds(copy_with([1.0, 0.9, 0.7, 0.7]), unlearnt)
    assert not exceeds(unlearnt, unlearnt)
    likelihood = copy_with([-1.0, -1.5, -1.5, -1.5], bar=-1.0)
    assert not exceeds(copy_with([-1.0, -2.0, -4.0, -4.0], bar=-1.0), likelihood)


def test_a_narrow_copy_that_still_falls_proves_nothing() -> None:
    wide = copy_with([1.0, 0.3, 0.2, 0.2])
    assert exceeds(wide, copy_with([1.0, 0.8, 0.7, 0.68]))
    assert not exceeds(wide, copy_with([1.0, 0.9, 0.8, 0.7]))


def test_the_best_other_candidate_must_be_exceeded_too() -> None:
    wide, poor, good = copy_with([1.0, 0.3, 0.2, 0.2]), copy_with([1.0] * 4), copy_with([1.0, 0.25, 0.25, 0.25])
    assert Widths((poor,), (wide,)).proved is wide
    assert Widths((poor, good), (wide,)).proved is None
    assert Widths((poor,), (poor,)).proved is None


def test_widths_are_not_compared_before_the_updates_that_the_first_copy_needed() -> None:
    model = Last(nn.GRU(4, 2, batch_first=True), 3)
    widen, arm = more_units(model, 0), copy_with([1.0, 1.0, 1.0])
    assert widen is not None
    silent: Callable[[str], None] = lambda sentence: None  # noqa: E731
    assert capacity.widths(arm, [], widen, float("inf"), arm.updates, silent, fewest=arm.updates + 1) is None
    compared = capacity.widths(arm, [], widen, time.perf_counter() + 20, arm.updates, silent, fewest=arm.updates)
    assert compared is not None
    assert compared.narrow == (arm,)


@pytest.mark.parametrize("case", NARROW)
def test_too_few_units_are_named_and_the_code_adds_some(case: str) -> None:
    build, (x, y) = NARROW[case]
    torch.manual_seed(0)
    model = build()
    before = copy.deepcopy(model.state_dict())
    found = diagnosed(model, x, y)
    assert codes(found) == ["needs_more_capacity"], found
    assert f"{WIDE} units" in found.findings[0].says
    assert found.findings[0].do == found.plan.code
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    names: dict[str, Any] = {"model": copy.deepcopy(model)}
    exec(found.plan.code, names)  # as a reader would paste it
    applied = found.plan.apply(model)
    assert torch.equal(names["model"](x[:5]), applied(x[:5]))
    assert torch.equal(found.plan.undo(applied)(x[:5]), copy.deepcopy(model)(x[:5]))
    assert found.plan.predicted is not None
    assert found.plan.predicted.after <= capacity.HALF * found.plan.predicted.before


@pytest.mark.parametrize("case", WIDE_ENOUGH)
def test_models_of_enough_units_are_healthy(case: str) -> None:
    build, (x, y) = WIDE_ENOUGH[case]
    torch.manual_seed(0)
    found = diagnosed(build(), x, y)
    assert codes(found) == ["healthy"], found
    assert not found.plan


def test_a_class_recalled_by_few_units_is_healthy_after_few_updates_of_more() -> None:
    torch.manual_seed(0)
    found = diagnosed(Last(nn.GRU(4, 4, batch_first=True), 3), *recall(512, 6), loss=cross_entropy)
    assert codes(found) == ["healthy"]


def test_targets_that_have_nothing_to_do_with_the_input_need_no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "MOST", 150)
    torch.manual_seed(0)
    found = diagnosed(Last(nn.GRU(4, 2, batch_first=True), 1), *RandomTargets("numbers")(512))
    assert "needs_more_capacity" not in codes(found)
    assert any(row.name.startswith(f"{WIDE} units") for row in found.tried)


def test_a_rate_that_is_far_too_small_is_not_called_a_lack_of_units() -> None:
    torch.manual_seed(0)
    model = Last(nn.GRU(4, 8, batch_first=True), 3)
    slow = torch.optim.Adam(model.parameters(), lr=1e-6)
    found = outcome(model, *recall(512, 5), optimizer=slow)
    assert codes(found) == ["learning_rate"]


@pytest.mark.parametrize(
    "rnn",
    [
        lambda: nn.GRU(3, 9),
        lambda: nn.LSTM(3, 4, proj_size=2),
        lambda: uv.cures.constrain_(nn.GRU(3, 2)),
        lambda: type("Own", (nn.GRU,), {})(3, 2),
        lambda: nn.Linear(3, 2),
    ],
)
def test_nothing_is_tried_where_layers_are_wide_or_cannot_be_widened(rnn: Callable[[], nn.Module]) -> None:
    assert more_units(rnn(), 0) is None


def test_a_wide_model_spends_nothing_on_more_units() -> None:
    torch.manual_seed(0)
    found = diagnosed(Last(nn.GRU(4, 16, batch_first=True), 1), *RandomTargets("numbers")(256), budget=6.0)
    assert not any("units" in row.name for row in found.tried)
