"""The parts of the interventions, each against what is known: the best constant, splits, optimizers, scores."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, mse_loss, nll_loss, softplus

from tests.interventions_bars import NUMBERS, Wrapped, X, Y, bar_of, on_held_out, seeded
from tests.interventions_subjects import drawn, recall, subject
from unvanish.diagnosis.interventions.arm import Arm
from unvanish.diagnosis.interventions.bar import best_constant
from unvanish.diagnosis.interventions.candidates import AS_IS
from unvanish.diagnosis.interventions.chance import EARLY, HORIZON, Features, features
from unvanish.diagnosis.interventions.inputs import fed
from unvanish.diagnosis.interventions.material import Draws, Rows, Whole, material
from unvanish.diagnosis.interventions.optimizers import recipe
from unvanish.diagnosis.interventions.readout import read_out
from unvanish.diagnosis.interventions.score import ahead, score


def test_the_best_constant_of_squares_is_the_mean_and_of_classes_their_frequencies() -> None:
    rows = Rows(subject(nn.Identity(), X, Y, loss=cross_entropy), 200, 0)
    found = bar_of(Wrapped(1, lambda z: z), X, NUMBERS[:, None], mse_loss)
    assert found.mean == pytest.approx(
        on_held_out(rows, lambda at: (NUMBERS[at] - NUMBERS.mean()).square().mean()), rel=1e-3
    )
    shares = torch.bincount(Y).double() / 200
    expected = on_held_out(rows, lambda at: -shares[Y[at]].log().mean())
    assert bar_of(Wrapped(3, lambda z: z), X, Y, cross_entropy).mean == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("form", "loss"),
    [
        (lambda z: z.softmax(-1), lambda p, y: nll_loss(p.log(), y)),
        (lambda z: z.log_softmax(-1), nll_loss),
        (lambda z: z.softmax(-1)[:, None].squeeze(1), lambda p, y: nll_loss(p.log(), y)),
        (lambda z: {"p": z.softmax(-1)}, lambda out, y: nll_loss(out["p"].log(), y)),
    ],
)
def test_a_constant_obeys_the_last_activation_so_that_the_bar_can_be_attained(form: Any, loss: Any) -> None:
    free = bar_of(Wrapped(3, lambda z: z), X, Y, cross_entropy)
    assert bar_of(Wrapped(3, form), X, Y, loss).mean == pytest.approx(free.mean, rel=1e-3)


def test_a_constant_of_probabilities_given_to_cross_entropy_has_the_loss_that_is_left_to_it() -> None:
    # Every class alike: no probabilities do better than ln 3 − (a little), while free numbers would reach any shares.
    y = torch.arange(198) % 3
    found = bar_of(Wrapped(3, lambda z: z.softmax(-1)), X[:198], y, cross_entropy)
    assert found.mean == pytest.approx(math.log(3), abs=0.02)


def test_a_constant_of_a_sigmoid_is_a_probability_and_of_a_softplus_positive() -> None:
    y = (torch.rand(200, 1, generator=seeded()) < 0.3).float()
    share = float(y.mean())
    expected = -(share * math.log(share) + (1 - share) * math.log(1 - share))
    assert bar_of(Wrapped(1, torch.sigmoid), X, y, binary_cross_entropy).mean == pytest.approx(expected, rel=0.15)

    def likelihood(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return -torch.distributions.Normal(*out).log_prob(y).mean()

    found = bar_of(Wrapped(2, lambda z: (z[:, 0], softplus(z[:, 1]))), X, NUMBERS, likelihood)
    assert found.mean == pytest.approx(math.log(7 * math.sqrt(2 * math.pi * math.e)), rel=0.05)


class Steps(nn.Module):
    """An answer per step."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.GRU(4, 8, batch_first=batch_first), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def test_an_answer_that_follows_the_step_alone_is_a_constant_too() -> None:
    y = torch.arange(5.0)[None, :, None] + 0.1 * torch.randn(200, 5, 1, generator=seeded())
    found = bar_of(Steps(True), X, y, mse_loss)
    assert found.per_step
    assert found.mean == pytest.approx(0.01, rel=0.2)


def test_a_model_that_makes_its_own_loss_has_a_bar_at_the_module_below() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Wrapped(3, lambda z: z)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(self.net(x), y)

    own = Rows(subject(Own(), X, Y, Y, loss=lambda loss, _: loss), 200, 0)
    found, _ = best_constant(own, 0)
    assert found is not None
    assert found.mean == pytest.approx(bar_of(Wrapped(3, lambda z: z), X, Y, cross_entropy).mean, rel=1e-3)


def test_what_a_model_hands_through_is_not_made_constant() -> None:
    class Auto(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Wrapped(1, lambda z: z)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), x[:, 0, :1]

    found = bar_of(Auto(), X, Y, lambda out, _: mse_loss(*out))
    assert found.mean == pytest.approx(float(X[:, 0, 0].var()), rel=0.2)


def test_a_loss_that_refuses_an_answer_keeps_the_best_constant_before_it() -> None:
    def loss(out: Tensor, _: Tensor) -> Tensor:
        if bool((out <= 0).any()):
            raise ValueError("expected a positive scale")
        return (out + 1.0).square().mean()

    found = bar_of(Wrapped(1, lambda z: z.abs() + 3.0), X, Y, loss)
    assert 1.0 < found.mean < 10.0


@pytest.mark.parametrize("time_first", [False, True])
def test_a_constant_lies_in_memory_as_the_answer_does_so_that_a_loss_can_view_it(time_first: bool) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.head(self.rnn(x)[0])
            return z.transpose(0, 1).contiguous().transpose(0, 1) if time_first else z

    def loss(z: Tensor, y: Tensor) -> Tensor:
        z, y = (z.transpose(0, 1), y.t()) if time_first else (z, y)
        return cross_entropy(z.view(-1, 3), y.reshape(-1))

    y = torch.randint(3, (200, 5), generator=seeded())
    assert bar_of(Tagger(), X, y, loss).mean < 1.11


def test_the_bar_of_a_step_is_that_of_its_batches() -> None:
    model = Wrapped(3, lambda z: z)
    found, _ = best_constant(Draws(subject(model, step=drawn(5)), 0), 0)
    assert found is not None
    assert found.mean == pytest.approx(math.log(3), abs=0.05)


def test_shrinking_answers_rescues_the_overconfident_and_not_the_ignorant() -> None:
    class Fixed(nn.Module):
        def __init__(self, sign: Tensor) -> None:
            super().__init__()
            self.scale, self.sign = nn.Parameter(torch.ones(1)), sign

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * 40 * (self.sign[x.long()] - 0.5)

    y = (torch.rand(300, generator=seeded()) < 0.5).float()
    mostly = torch.where(torch.rand(300, generator=seeded(6)) < 0.8, y, 1 - y)
    coin = (torch.rand(300, generator=seeded(7)) < 0.5).float()
    loss = nn.functional.binary_cross_entropy_with_logits
    for sign, helps in ((mostly, True), (coin, False)):
        rows = Rows(subject(Fixed(sign), torch.arange(300.0), y, loss=loss), 300, 0)
        found, _ = best_constant(rows, 0)
        assert found is not None
        model = rows.subject.twin()
        assert not score(rows.judged(model), found.losses).learns
        with found.shrunk(model, 0.02):
            assert score(rows.judged(model), found.losses).learns is helps
        assert "forward" not in vars(model)


def test_rows_are_split_once_and_no_judged_row_is_trained_on() -> None:
    rows = Rows(subject(nn.Identity(), torch.arange(100.0), torch.arange(100.0), loss=mse_loss), 100, 0)
    held = torch.cat(rows.groups)
    assert len(held) == len(held.unique()) >= 25
    assert not set(held.tolist()) & set(rows.train.tolist())
    assert len(held) + len(rows.train) == 100
    seen: list[float] = []

    def listening(out: Tensor, _: Tensor) -> Tensor:
        seen.extend(out.tolist())
        return out.mean()

    rows.subject = subject(nn.Identity(), torch.arange(100.0), torch.zeros(100), loss=listening)
    for update in range(20):
        rows.loss(rows.subject.model, update)
    assert set(seen) == set(rows.train.float().tolist())


def test_answers_that_belong_to_their_samples_are_told_from_answers_that_belong_to_none() -> None:
    y = (torch.arange(200) % 20 == 0).long()
    for target, belongs in ((y, True), (y[torch.randperm(200, generator=seeded())], False)):
        rows = Rows(subject(nn.Embedding.from_pretrained(4.0 * nn.functional.one_hot(y)), torch.arange(200), target,
                            loss=cross_entropy), 200, 0)  # fmt: skip
        assert (rows.informed(rows.subject.model) > 5) is belongs


def test_targets_that_number_the_samples_are_numbered_anew_and_classes_are_not() -> None:
    rows = Rows(subject(nn.Identity(), X, torch.arange(200), loss=cross_entropy), 200, 0)
    assert rows.targets(torch.tensor([7, 3, 9])).tolist() == [0, 1, 2]
    rows = Rows(subject(nn.Identity(), X, Y, loss=cross_entropy), 200, 0)
    assert torch.equal(rows.targets(torch.tensor([7, 3, 9])), Y[[7, 3, 9]])


def test_a_loss_that_needs_the_whole_batch_is_judged_on_it_and_that_is_said() -> None:
    data, notes = material(subject(Wrapped(3, lambda z: z), X, Y, loss=lambda out, _: cross_entropy(out, Y)), 0)
    assert isinstance(data, Whole)
    assert "could not be computed for a part of the batch" in notes[0]


def test_fresh_batch_norm_is_judged_by_the_batchs_own_statistics_and_keeps_its_buffers() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    x = 1000 + 500 * torch.randn(100, 1, generator=seeded())
    model = Normed()
    rows = Rows(subject(model, x, (x - 1000) / 500, loss=mse_loss), 100, 0)
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert float(rows.judged(model).mean()) < 1.0
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert model.norm.training


def test_a_score_is_sure_only_beyond_the_scatter_over_groups() -> None:
    bar = torch.ones(16)
    scatter = torch.tensor([1.0, -1.0] * 8)
    assert score(bar - 0.3 + 0.1 * scatter, bar).learns
    assert not score(bar - 0.3 + 0.8 * scatter, bar).learns
    assert score(bar - 0.3 + 0.6 * scatter, bar).visible
    assert not score(bar - 0.01, bar).learns  # certain, but too small to see
    assert not score(torch.full((16,), math.inf), bar).learns
    assert ahead(bar - 0.1, bar + 0.01 * scatter)
    assert not ahead(bar - 0.1, bar + scatter)


def test_the_input_of_each_module_is_measured_over_all_its_steps() -> None:
    model = Wrapped(3, lambda z: z)
    rows = Rows(subject(model, 100 + 10 * X, Y, loss=cross_entropy), 200, 0)
    entry = fed(rows, 0)["net.rnn"]
    held = torch.cat(rows.groups)
    assert entry.steps == 5
    torch.testing.assert_close(entry.mean, (100 + 10 * X[held]).double().mean((0, 1)))
    assert entry.off_scale
    assert not fed(Rows(subject(model, X, Y, loss=cross_entropy), 200, 0), 0)["net.rnn"].off_scale


@pytest.mark.parametrize("cell", [False, True])
def test_a_read_out_finds_what_the_states_hold_and_nothing_else(cell: bool) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRUCell(4, 16) if cell else nn.GRU(4, 16, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            if not cell:
                return self.head(self.rnn(x)[0][:, -1])
            h = x.new_zeros(len(x), 16)
            for t in range(x.shape[1]):
                h = self.rnn(x[:, t], h)
            return self.head(h)

    x, y = recall(300, 3)
    coin = torch.randint(3, (300,), generator=seeded())
    for target, holds in ((y, True), (coin, False)):
        rows = Rows(subject(Loop(), x, target, loss=cross_entropy), 300, 0)
        arm = Arm(AS_IS, rows, recipe(None, rows.subject.model, 1e-3)[0], None, 0)
        found = read_out(arm, 0)
        assert found is not None
        assert (found.readable > 0.5) is holds
        assert found.where == "rnn"
        assert found.enough


def test_the_chance_is_the_logistic_of_the_features() -> None:
    known = Features(0.5, 1.0, 0.5, 0.9, -0.1, 0.0)
    assert known.chance((0.0,) * 7) == 0.5
    assert known.chance((0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0)) == pytest.approx(1 / (1 + math.exp(-1)))
    assert known.chance() > 0.9 > 0.1 > Features(-1.0, 0.0, 0.0, 0.3, -1.0, 0.0).chance()
    with pytest.raises(ValueError, match="weights: expected 7"):
        known.chance((1.0,))


def test_features_tell_a_copy_that_learns_from_one_that_does_not() -> None:
    told = []
    for target in (Y, torch.randint(3, (200,), generator=seeded())):
        rows = Rows(subject(Wrapped(3, lambda z: z), X, target, loss=cross_entropy), 200, 0)
        arm = Arm(AS_IS, rows, recipe(None, rows.subject.model, 3e-3)[0], best_constant(rows, 0)[0], 0)
        arm.judge()
        while not arm.clear and arm.updates < EARLY:
            arm.train(25)
            arm.judge()
        found = read_out(arm, 0)
        assert found is not None
        told.append(features(arm, found.readable, {}))
    learns, fails = told
    assert learns.quick > fails.quick == 0.5 * math.log2(HORIZON / (2 * EARLY))
    assert learns.fallen > 0.2 > fails.fallen
    assert learns.readable > 0.5 > fails.readable
    assert learns.fitted > fails.fitted
