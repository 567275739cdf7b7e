"""`readout` is claimed where the head fails, and not where something else does: a table of heads, rates and dropout."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, mse_loss

from tests.interventions_subjects import Last, recall, subject
from unvanish.diagnosis.interventions.arm import Arm
from unvanish.diagnosis.interventions.bar import best_constant
from unvanish.diagnosis.interventions.candidates import AS_IS
from unvanish.diagnosis.interventions.head import Head, head
from unvanish.diagnosis.interventions.material import Rows
from unvanish.diagnosis.interventions.optimizers import recipe
from unvanish.diagnosis.interventions.readout import head_questions

X, Y = recall(256, 3)
X = 3 * X  # so that the states are far from 0, and heads need few updates


class Read(nn.Module):
    """A GRU, and whatever is made of its states."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.rnn, self.head, self.read = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 3), read
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, self.rnn(x)[0])


def last(model: Any, y: Tensor) -> Tensor:
    return model.head(y[:, -1])


def changed(model: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    with torch.no_grad():
        change(model)
    return model


def found(model: nn.Module, lr: float = 1e-6, seconds: float = 60.0, x: Tensor = X, **options: Any) -> Head | None:
    """Of a copy that a tiny or a huge learning rate kept from learning."""
    rows = Rows(subject(model, x, Y, loss=options.get("loss", cross_entropy)), len(Y), 0)
    own, _ = recipe(lambda p: torch.optim.Adam(p, lr=lr), model, lr)
    arm = Arm(AS_IS, rows, own, best_constant(rows, 0)[0], 0)
    arm.judge()
    arm.train(options.get("updates", 25))
    arm.judge()
    assert not arm.learns
    return head(arm, own, 0, time.perf_counter() + seconds)


FAILS: dict[str, Callable[[], nn.Module]] = {
    "multiplied by 0": lambda: Read(lambda m, y: m.head(y[:, -1] * 0 + 1)),
    "a dead layer": lambda: changed(
        Read(lambda m, y: m.head(m.mid(y[:, -1]).relu()), mid=nn.Linear(16, 16)), lambda m: m.mid.bias.fill_(-50.0)
    ),
    "rounded": lambda: Read(lambda m, y: m.head((y[:, -1] > 2).float())),
    "frozen": lambda: changed(Read(last), lambda m: [p.requires_grad_(False).zero_() for p in m.head.parameters()]),
    "other samples' states": lambda: Read(lambda m, y: m.head(y[:, -1].roll(1, 0))),
}


@pytest.mark.parametrize("name", FAILS)
def test_a_head_that_cannot_read_the_states_fails(name: str) -> None:
    torch.manual_seed(0)
    told = found(FAILS[name]())
    assert told is not None
    assert told.fails
    assert not told.drowned
    assert told.linear.readable > 0.5
    assert told.where == "rnn"


READS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "a rate far too small": lambda: (Read(last), {"lr": 1e-6}),
    "a rate far too large": lambda: (Read(last), {"lr": 10.0}),
    "two layers": lambda: (Read(lambda m, y: m.head(m.mid(y[:, -1]).relu()), mid=nn.Linear(16, 16)), {}),
    "starts at zero": lambda: (changed(Read(last), lambda m: m.head.weight.zero_()), {}),
    "mean over the steps": lambda: (Read(lambda m, y: m.head(y.mean(1))), {}),
    "dropout of a half": lambda: (Last(nn.GRU(4, 16, batch_first=True), 3, dropout=0.5), {}),
    "dropout, called": lambda: (Read(lambda m, y: m.head(dropout(y[:, -1], 0.98, m.training))), {}),
}


@pytest.mark.parametrize("name", READS)
def test_a_head_that_learns_when_it_is_trained_alone_does_not_fail(name: str) -> None:
    torch.manual_seed(0)
    model, options = READS[name]()
    told = found(model, **options)
    assert told is None or not (told.fails or told.drowned)


@pytest.mark.parametrize(("p", "drowned"), [(0.0, False), (0.5, False), (0.999, True)])
def test_dropout_is_told_from_a_head_that_fails(p: float, drowned: bool) -> None:
    torch.manual_seed(0)
    told = found(Last(nn.GRU(4, 16, batch_first=True), 3, dropout=p))
    assert told is not None
    assert not told.fails
    assert told.drowned is drowned
    assert (told.dropout is None) is (p == 0)


def test_states_that_hold_nothing_blame_no_head() -> None:
    torch.manual_seed(0)
    assert found(Read(last), x=torch.randn(256, 3, 4)) is None


def test_a_trial_that_time_cuts_short_proves_nothing() -> None:
    torch.manual_seed(0)
    assert found(FAILS["multiplied by 0"](), seconds=0.0) is None


def test_states_that_another_layer_reads_are_not_the_head_s() -> None:
    """A first layer holds the target, the second forgets it: no head could read it there."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.GRU(4, 16, batch_first=True), nn.RNN(16, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)[0]
            return self.head(self.b(torch.cat([y.transpose(0, 1) * 1e-9, torch.zeros(20, len(y), 16)]))[0][-1])

    torch.manual_seed(0)
    rows = Rows(subject(Two(), X, Y, loss=cross_entropy), len(Y), 0)
    arm = Arm(AS_IS, rows, recipe(None, rows.subject.model, 1e-3)[0], None, 0)
    assert list(head_questions(arm, 0)) == ["b"]


def test_a_target_at_every_step_is_asked_for_over_all_steps() -> None:
    """The first of twenty steps is easy: that it can be read does not prove the others can."""
    torch.manual_seed(0)
    x = torch.randn(256, 20, 4)
    y = torch.randn(256, 20, 1)
    y[:, 0] = x[:, 0, :1]
    model = Read(lambda m, y: m.head(y)[..., :1])
    rows = Rows(subject(model, x, y, loss=mse_loss), 256, 0)
    arm = Arm(AS_IS, rows, recipe(None, model, 1e-3)[0], None, 0)
    (question,) = head_questions(arm, 0).values()
    assert question.read_out()[0] < 0.4
