"""Optimizers and arms of the interventions."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.interventions_bars import NUMBERS, Wrapped, X, Y
from tests.interventions_subjects import Last, subject
from unvanish.diagnosis.interventions.arm import Arm
from unvanish.diagnosis.interventions.bar import best_constant
from unvanish.diagnosis.interventions.candidates import AS_IS, Candidate, rates
from unvanish.diagnosis.interventions.material import Rows, Whole
from unvanish.diagnosis.interventions.optimizers import other_rates, recipe, usual_rate


def groups_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def test_an_optimizer_is_made_again_with_its_class_options_and_groups() -> None:
    model = groups_model()
    given = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": [model[1].weight], "momentum": 0.5}],
        lr=0.2,
        momentum=0.9,
    )
    own, notes = recipe(given, model, 1e-3)
    assert notes == ()
    twin = groups_model()
    made = own.at(0.4).build(twin)
    assert isinstance(made, torch.optim.SGD)
    assert [(len(g["params"]), g["lr"], g["momentum"]) for g in made.param_groups] == [
        (2, pytest.approx(0.2), 0.9),
        (1, pytest.approx(0.4), 0.5),
    ]
    assert made.param_groups[1]["params"][0] is twin[1].weight
    held = {id(p) for g in made.param_groups for p in g["params"]}
    assert id(twin[1].bias) not in held  # the user's optimizer leaves it alone too
    twin.append(nn.Linear(1, 1))
    assert len(own.build(twin).param_groups[0]["params"]) == 4  # what only the changed copy has joins the first group


def test_the_code_of_an_optimizer_makes_the_same_one() -> None:
    model = groups_model()
    for given in (
        torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.8, 0.99), weight_decay=0.1),
        torch.optim.RMSprop([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}], lr=0.2),
    ):
        own, _ = recipe(given, model, 1e-3)
        names: dict[str, Any] = {"model": model, "torch": torch}
        exec(own.code(), names)
        made = names["optimizer"]
        assert type(made) is type(given)
        assert [{k: v for k, v in g.items() if k != "params"} for g in made.param_groups] == [
            {k: v for k, v in g.items() if k != "params"} for g in given.param_groups
        ]
        assert [[id(p) for p in g["params"]] for g in made.param_groups] == [
            [id(p) for p in g["params"]] for g in given.param_groups
        ]


def test_what_is_no_optimizer_of_this_model_is_refused() -> None:
    model = groups_model()
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer"):
        recipe(3, model, 1e-3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected the function to return"):
        recipe(lambda p: list(p), model, 1e-3)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        recipe(torch.optim.Adam(groups_model().parameters()), model, 1e-3)
    _, notes = recipe(torch.optim.LBFGS(model.parameters()), model, 1e-3)
    assert "LBFGS" in notes[0]


def test_rates_worth_a_trial_are_near_its_own_and_the_usual_ones() -> None:
    model = groups_model()
    own, _ = recipe(torch.optim.Adam(model.parameters(), lr=1e-6), model, 1e-3)
    assert other_rates(own) == pytest.approx([3e-6, 1e-6 / 3, 1e-3, 3e-3, 1e-2])
    assert other_rates(own.at(1e-3)) == pytest.approx([3e-3, 1e-3 / 3, 1e-2])


def test_a_rate_far_from_all_usual_ones_is_a_suspect_and_adam_with_it() -> None:
    model = groups_model()
    own, _ = recipe(torch.optim.SGD(model.parameters(), lr=1e-4), model, 1e-3)
    assert [c.name for c in rates(own) if c.suspect] == ["learning rate 0.1", "Adam, learning rate 0.003"]
    assert [c for c in rates(own.at(5e-3)) if c.suspect] == []
    adam, _ = recipe(torch.optim.Adam(model.parameters(), lr=0.5), model, 1e-3)
    assert [c.lr for c in rates(adam) if c.suspect] == [3e-3]
    assert usual_rate(recipe(None, model, 1e-6)[0]) is None  # nobody chose that one


def test_arms_see_the_same_samples_and_repeat_exactly() -> None:
    torch.manual_seed(0)
    rows = Rows(subject(Last(nn.GRU(4, 8, batch_first=True), 3, dropout=0.2), X, Y, loss=cross_entropy), 200, 0)
    own, _ = recipe(None, rows.subject.model, 3e-3)
    bar, _ = best_constant(rows, 0)
    arms = [Arm(AS_IS, rows, own, bar, 0) for _ in range(2)]
    arms[0].train(60)
    for updates in (1, 24, 20, 15):
        arms[1].train(updates)
    assert arms[0].losses == arms[1].losses


def test_clipping_bounds_what_an_arm_steps_with() -> None:
    rows = Rows(subject(Wrapped(1, lambda z: 1e4 * z), X, NUMBERS[:, None], loss=mse_loss), 200, 0)
    own, _ = recipe(torch.optim.SGD(rows.subject.model.parameters(), lr=1.0), rows.subject.model, 1e-3)
    arm = Arm(Candidate("clip", "clip", clip=0.5), rows, own, None, 0)
    before = [p.detach().clone() for p in arm.model.parameters()]
    arm.train(1)
    after = [p.detach() for p in arm.model.parameters()]
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(before, after, strict=True)))
    assert moved == pytest.approx(0.5, rel=1e-3)


def test_an_arm_that_was_never_judged_is_not_said_to_learn() -> None:
    """As where the budget ends before a candidate's turn comes to be judged."""
    whole = Whole(subject(Wrapped(3, lambda z: z), X, Y, loss=cross_entropy))
    for data in (whole, Rows(whole.subject, 200, 0)):
        arm = Arm(AS_IS, data, recipe(None, data.subject.model, 1e-3)[0], None, 0)
        assert not arm.learns
        assert not arm.clear


def test_an_arm_stops_at_a_loss_that_is_not_finite_and_says_when() -> None:
    rows = Rows(subject(Wrapped(1, lambda z: (z - 1e9).log()), X, NUMBERS[:, None], loss=mse_loss), 200, 0)
    arm = Arm(AS_IS, rows, recipe(None, rows.subject.model, 1e-3)[0], None, 0)
    arm.train(5)
    assert (arm.updates, arm.failed) == (0, "the loss was NaN or infinite in update 1")
