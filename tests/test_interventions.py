"""Interventions find the planted cause, by the loss of copies on samples that they were not trained on."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import unvanish as uv
from tests.interventions_subjects import Last, RandomTargets, codes, gru, outcome, recall
from unvanish.diagnosis.interventions import conclude, race


@pytest.fixture(autouse=True)
def few_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the numbers of updates, not the clock, end each copy's training."""
    monkeypatch.setattr(race, "MOST", 150)
    monkeypatch.setattr(conclude, "UPDATES", 150)


def test_a_model_that_learns_is_healthy_and_nothing_else_is_tried() -> None:
    found = outcome(gru(), *recall(256, 5))
    assert codes(found) == ["healthy"]
    assert [t.name for t in found.tried] == ["as it is"]
    assert not found.plan
    assert "held-out samples" in found.findings[0].proof


@pytest.mark.parametrize("how", ["instance", "function"])
def test_a_rate_that_is_far_too_small_is_named_and_the_plan_has_a_usual_one(how: str) -> None:
    model = gru()
    given = (
        torch.optim.Adam(model.parameters(), lr=1e-6) if how == "instance" else (lambda p: torch.optim.Adam(p, lr=1e-6))
    )
    found = outcome(model, *recall(256, 5), optimizer=given)
    assert codes(found) == ["learning_rate"]
    assert re.search(r"lr=0\.0(01|03|1)\b", found.plan.code)
    assert found.plan.predicted is not None
    assert found.plan.predicted.after < 0.7 * found.plan.predicted.bar < found.plan.predicted.before


def test_a_short_reach_is_named_where_a_cure_of_reach_makes_the_loss_fall() -> None:
    torch.manual_seed(0)
    model = Last(nn.LSTM(4, 16, batch_first=True), 3)
    found = outcome(model, *recall(256, 60))
    assert codes(found) == ["reach_too_short"]
    assert "uv.cures." in found.plan.code
    cured = found.plan.apply(copy.deepcopy(model))
    assert codes(outcome(cured, *recall(256, 60))) == ["healthy"]


def test_a_plain_rnn_that_forgets_is_replaced_or_made_orthogonal() -> None:
    torch.manual_seed(0)
    rnn = uv.cures.spectral_radius_(nn.RNN(4, 16, batch_first=True), 0.4)
    assert codes(outcome(Last(rnn, 3), *recall(256, 60))) == ["reach_too_short"]


def test_a_stack_that_learns_with_fewer_layers_is_too_deep() -> None:
    torch.manual_seed(0)
    model = Last(nn.RNN(4, 16, num_layers=12, batch_first=True), 3)
    with torch.no_grad():
        for p in model.rnn.parameters():
            p.mul_(0.3)
    drawn = torch.get_rng_state()
    found = outcome(model, *recall(256, 3))
    assert torch.equal(torch.get_rng_state(), drawn)  # the copies' new layers are drawn as well
    assert codes(found) == ["depth"]
    assert "the loss falls with 2 of its 12 layers" in found.findings[0].says
    assert found.plan.apply(copy.deepcopy(model)).rnn.num_layers == 2


def test_matrices_that_are_too_large_are_called_exploding() -> None:
    torch.manual_seed(0)
    rnn = uv.cures.spectral_radius_(nn.RNN(4, 16, nonlinearity="relu", batch_first=True), 1.6)
    assert codes(outcome(Last(rnn, 3), *recall(256, 60))) == ["explodes"]


def test_inputs_off_scale_are_named_and_standardised() -> None:
    x, y = recall(256, 8)
    found = outcome(gru(), x * 1000 + 5000, y)
    assert codes(found) == ["input_scale"]
    assert "standardise_(" in found.plan.code


def test_dropout_and_weight_decay_that_take_everything_are_named() -> None:
    assert codes(outcome(gru(dropout=0.999), *recall(256, 5))) == ["regularised_away"]
    model = gru()
    decayed = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=100.0)
    found = outcome(model, *recall(256, 5), optimizer=decayed)
    assert codes(found) == ["regularised_away"]
    assert "weight_decay=0.0" in found.plan.code
    # A suspect is tried before all others, for as long as the model as it is, and ends the race.
    assert [t.name for t in found.tried] == ["as it is", "without weight decay"]


def test_a_head_that_does_not_read_the_state_is_told_from_a_state_that_holds_nothing() -> None:
    class Blind(Last):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1] * 0 + 1)

    torch.manual_seed(0)
    found = outcome(Blind(nn.GRU(4, 16, batch_first=True), 3), *recall(256, 5))
    assert codes(found) == ["readout"]
    assert found.findings[0].where == "rnn"


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_targets_that_have_nothing_to_do_with_the_input_are_said_to_be_so(kind: str) -> None:
    x, y = RandomTargets(kind)(256)
    loss = cross_entropy if kind == "classes" else mse_loss
    found = outcome(gru(2 if kind == "classes" else 1), x, y, loss=loss)
    assert codes(found) == ["not_learnable_from_input"]
    assert not found.plan
    assert not any(t.learns for t in found.tried)
