"""The diagnosis by exact tests on a table of models: name, model, batch, loss, expected code.

A healthy model of unusual build must not be accused, a faulty one must be told its fault first.
"""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 (torch's own documentation calls it so)

import unvanish as uv
from tests.diagnosis_cases import (
    faulty_field,
    faulty_states,
    faulty_values,
    healthy_builds,
    healthy_field,
    healthy_tasks,
)
from tests.diagnosis_cases.common import Net, X, Y
from tests.diagnosis_cases.faulty_values import not_finite

HEALTHY = {**healthy_tasks.CASES, **healthy_builds.CASES, **healthy_field.CASES}
FAULTY = {**faulty_states.CASES, **faulty_values.CASES, **faulty_field.CASES}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_is_not_accused(name: str) -> None:
    torch.manual_seed(0)
    model, batch, loss = HEALTHY[name]()
    found = uv.diagnose(model, *batch, loss=loss, budget=0)
    assert found.findings[0].code == "healthy", found
    assert not [n for n in found.notes if n.startswith("not tested")], found.notes


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_named_first(name: str) -> None:
    torch.manual_seed(0)
    build, code = FAULTY[name]
    model, batch, loss = build()
    found = uv.diagnose(model, *batch, loss=loss, budget=0)
    assert found.findings[0].code == code, found
    assert any(c.isdigit() for c in found.findings[0].proof)


def test_an_optimizer_of_another_model_is_a_finding_of_this_one() -> None:
    model, batch, loss = Net(), (X, Y), F.cross_entropy
    other = torch.optim.Adam(Net().parameters())
    found = uv.diagnose(model, *batch, loss=loss, optimizer=other, budget=5)
    assert found.findings[0].code == "parameters_unmoved"
    assert "lacks 6 of 6" in found.findings[0].proof
    with pytest.raises(TypeError, match="optimizer: expected"):
        uv.diagnose(model, *batch, loss=loss, optimizer=3, budget=0)  # type: ignore[arg-type]


def test_a_target_that_is_used_or_that_nothing_asks_for_is_not_ignored() -> None:
    model, batch, loss = faulty_values.with_penalty(0.5)
    assert uv.diagnose(model, *batch, loss=loss, budget=0).findings[0].code == "healthy"
    found = uv.diagnose(model, *batch, loss=lambda z, y: (z[0] ** 2).mean() + (z[1] ** 2).mean(), budget=0)
    assert found.findings[0].code == "healthy"


def test_answers_that_are_nan_do_not_look_like_a_state_that_is_carried() -> None:
    torch.manual_seed(0)
    model, batch, loss = not_finite("log")
    found = uv.diagnose(model, *batch, loss=loss, budget=0)
    assert [f.code for f in found.findings] == ["nan"]


def test_a_stack_that_fades_is_remarked_upon_and_not_accused() -> None:
    torch.manual_seed(0)
    found = uv.diagnose(Net(torch.nn.LSTM(4, 16, 4, batch_first=True)), X, Y, loss=F.cross_entropy, budget=0)
    assert [(f.code, f.severity) for f in found.findings] == [("healthy", "note"), ("depth", "note")]
    assert "4 stacked layers shrink the differences between samples" in found.findings[1].says
    shallow = uv.diagnose(Net(torch.nn.LSTM(4, 16, 2, batch_first=True)), X, Y, loss=F.cross_entropy, budget=0)
    assert [f.code for f in shallow.findings] == ["healthy"]
