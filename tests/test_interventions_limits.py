"""Interventions keep to their budget and evidence, leave everything as it was, and say what they could not do."""

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.interventions_subjects import Last, RandomTargets, codes, drawn, gru, outcome, recall, subject
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.interventions import arm, bar, conclude, head, race, run
from unvanish.diagnosis.interventions.material import GROUPS

SETUP = 60
"""evaluations of the loss before the clock of the budget starts: judging the groups once, and the first update"""


@pytest.fixture(autouse=True)
def few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the numbers of updates, not the clock, end each copy's training."""
    monkeypatch.setattr(race, "MOST", 150)
    monkeypatch.setattr(conclude, "UPDATES", 150)


def test_random_targets_of_few_samples_accuse_nobody() -> None:
    x, y = RandomTargets("classes")(64)
    found = outcome(gru(2), x, y)
    assert codes(found) == []
    assert "only 44 samples" in " ".join(found.notes) or "only 48 samples" in " ".join(found.notes)


def test_few_samples_are_judged_on_themselves_and_it_is_said() -> None:
    found = outcome(gru(), *recall(8, 5))
    assert set(codes(found)) <= {"healthy"}
    assert "too few to hold any out" in found.notes[0]


def test_a_step_is_judged_on_its_next_draws() -> None:
    model = gru()
    found = run(subject(model, step=drawn(5)), budget=60.0)
    assert codes(found) == ["healthy"]
    assert "unseen" in found.findings[0].says


def test_a_step_that_draws_nothing_is_said_to_be_one_batch() -> None:
    x, y = recall(64, 5)
    found = run(subject(gru(), step=lambda m: cross_entropy(m(x), y)), budget=60.0)
    assert set(codes(found)) <= {"healthy"}
    assert "one fixed batch" in found.notes[0]


def test_no_budget_tries_nothing_and_says_so() -> None:
    found = outcome(gru(), *recall(256, 5), budget=0.0)
    assert (found.findings, found.tried) == ((), ())
    assert "budget=0" in found.notes[0]


def test_an_update_that_is_too_slow_for_the_budget_tries_nothing_and_says_what_would_do() -> None:
    found = outcome(gru(), *recall(256, 200), budget=0.02)
    assert found.tried == ()
    assert "nothing was tried: one update takes" in found.notes[0]


@pytest.mark.parametrize("seconds", [0.01, 0.1, 0.5])
def test_the_budget_holds_however_long_an_update_takes(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the user's loss moves: each evaluation of it takes so many seconds."""
    now = [0.0]
    for part in (race, arm, bar, head):
        monkeypatch.setattr(part, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(answer: Tensor, y: Tensor) -> Tensor:
        now[0] += seconds
        return cross_entropy(answer, y)

    budget = 60.0
    run(subject(gru(2), *RandomTargets("classes")(256), loss=slow), budget=budget)
    one_judgement = 3 * GROUPS * seconds
    assert now[0] < budget + one_judgement + SETUP * seconds


def test_a_first_update_that_only_warms_up_is_not_taken_for_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for part in (race, arm, bar, head):
        monkeypatch.setattr(part, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def warming(answer: Tensor, y: Tensor) -> Tensor:
        now[0] += 0.001 if now[0] else 50.0
        return cross_entropy(answer, y)

    found = run(subject(gru(), *recall(256, 5), loss=warming), budget=60.0)
    assert codes(found) == ["healthy"]


@pytest.mark.parametrize("classes", [True, False])
def test_targets_that_are_all_the_same_leave_nothing_to_learn(classes: bool) -> None:
    x, y = recall(64, 5)
    same, loss = (torch.zeros_like(y), cross_entropy) if classes else (torch.full((64, 3), 0.7), mse_loss)
    found = outcome(gru(), x, same, loss=loss)
    assert codes(found) == ["not_learnable_from_input"]
    assert "Every sample has the same target" in found.findings[0].says
    assert (found.tried, found.plan.steps) == ((), ())
    same[0] += 1
    assert "Every sample has the same target" not in str(outcome(gru(), x, same, loss=loss).findings)


def test_candidates_that_the_budget_does_not_reach_are_not_said_to_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "ROUNDS", (1e-9, 1.0))
    found = outcome(gru(2), *RandomTargets("classes")(256))
    assert codes(found) == []
    assert [t.name for t in found.tried] == ["as it is"]
    assert "other candidates had too few updates (0 in all)" in " ".join(found.notes)


def test_what_is_proved_exactly_comes_before_any_training() -> None:
    proved = Finding("samples_mixed", "error", "", "Samples are mixed.", "1 of 8 moved.", "")
    found = outcome(gru(), *recall(256, 5), exact=[proved])
    assert found.tried == ()
    assert "samples_mixed" in found.notes[0]


def test_model_gradients_mode_and_random_numbers_stay_as_they_are() -> None:
    model, (x, y) = gru(dropout=0.1).eval(), recall(256, 5)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    options = copy.deepcopy(optimizer.state_dict())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002 (the user's)
    expected = (random.random(), np.random.rand(), torch.rand(3))  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    outcome(model, x, y, optimizer=optimizer)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert bool((model.head.weight.grad == 1).all())
    assert not model.training
    assert optimizer.state_dict() == options
    assert torch.equal(torch.rand(3), expected[2])
    assert (random.random(), np.random.rand()) == expected[:2]  # noqa: NPY002


def test_the_same_numbers_of_updates_give_the_same_losses() -> None:
    tried = [outcome(gru(dropout=0.1), *recall(256, 5)).tried for _ in range(2)]
    assert tried[0] == tried[1]


def test_progress_says_what_is_tried() -> None:
    said: list[str] = []
    outcome(gru(), *recall(256, 5), progress=said.append)
    assert any(sentence.startswith("as it is: ") for sentence in said)


def test_a_model_whose_copy_cannot_be_trained_is_said_to_be_so() -> None:
    class Raises(Last):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("no training today")
            return super().forward(x)

    found = outcome(Raises(nn.GRU(4, 16, batch_first=True), 3), *recall(256, 5))
    assert codes(found) == []
    assert "no training today" in " ".join(found.notes)


@pytest.mark.parametrize(("budget", "error"), [("60", TypeError), (-1.0, ValueError), (float("nan"), ValueError)])
def test_a_budget_is_seconds(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="budget"):
        outcome(gru(), *recall(256, 5), budget=budget)


def test_the_table_of_what_was_tried_is_a_dataframe() -> None:
    table = outcome(gru(), *recall(256, 5)).to_dataframe()
    assert list(table.columns) == ["name", "updates", "loss", "bar", "learns", "failed"]
    assert len(table) == 1
