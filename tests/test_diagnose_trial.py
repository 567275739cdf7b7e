"""The trial: what can be read from the states, the chance that follows, and prescriptions only where it is low."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import unvanish as uv
from unvanish import cures
from unvanish.diagnosis import trial

T, B, H = 24, 96, 6


class LastStep(nn.Module):
    def __init__(self, layer: nn.RNNBase, outputs: int = 1) -> None:
        super().__init__()
        self.rnn, self.head = layer, nn.Linear(layer.hidden_size, outputs)

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        final = self.rnn(x)[1]
        return self.head(final[0][-1] if isinstance(final, tuple) else final[-1])


def remember_the_first() -> tuple[Tensor, Tensor]:
    x = torch.randn(B, T, 2, generator=torch.Generator().manual_seed(0))
    return x, x[:, 0, :1].clone()


def forgetful() -> LastStep:
    torch.manual_seed(0)
    return LastStep(cures.spectral_radius_(nn.RNN(2, H, batch_first=True), 0.3))


def test_what_is_read_from_states_is_what_is_linear_in_them() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    linear = 3e6 * h @ torch.randn(5, 2, generator=generator, dtype=torch.float64) + 1e7
    noise = torch.randn(200, 2, generator=generator, dtype=torch.float64)

    def read(states: Tensor, y: Tensor) -> float:
        left, total = trial._judged(states[:150], y[:150], states[150:], y[150:])
        return 1 - left / total

    assert read(h, linear) > 1 - 1e-5
    assert read(1e-9 * h + 4, linear) > 1 - 1e-5
    assert read(h, noise) < 0.1
    assert read(torch.ones_like(h), linear) == pytest.approx(0, abs=0.1)


def test_the_chance_grows_with_both_of_its_parts() -> None:
    assert trial.Odds(0.9, 1.0).chance > trial.Odds(0.1, 1.0).chance > trial.Odds(0.1, 1e-6).chance
    assert trial.Odds(0.1, 0.0).chance == trial.Odds(0.1, 1e-300).chance
    assert trial.Odds(0.1, 1e9).chance == trial.Odds(0.1, 1.0).chance


def test_what_forgets_is_told_so_and_what_is_likely_to_learn_is_left_alone() -> None:
    x, y = remember_the_first()
    found = uv.diagnose(forgetful(), x, y, loss=mse_loss, trial=True)
    assert found.chance is not None
    assert found.chance < 0.5
    first = found.prescriptions[0]
    assert "GRU" in first.cure
    assert first.chance is not None
    assert first.chance > found.chance + 0.1
    assert not first._undo, "it keeps no copy of the model"
    assert "chance of learning as it is" in repr(found)

    # Its error does not arrive over the 23 steps either, but nothing asks for that: the answer is the last input.
    easy = uv.diagnose(forgetful(), x, x[:, -1, :1], loss=mse_loss, trial=True)
    assert easy["rnn.l0"].verdict == "vanishes"
    assert easy.readable is not None
    assert easy.readable > 0.9
    assert easy.chance is not None
    assert easy.chance > found.chance
    keeps = LastStep(cures.chrono_(nn.GRU(2, H, batch_first=True), T, torch.Generator().manual_seed(0)))
    good = uv.diagnose(keeps, x, y, loss=mse_loss, trial=True)
    assert good.chance is not None
    assert good.chance > 0.5
    assert not good.prescriptions


def test_a_factor_on_the_loss_changes_no_chance_and_nothing_of_the_users_is_touched() -> None:
    x, y = remember_the_first()
    model = forgetful().train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    chances = [
        uv.diagnose(model, x, y, loss=lambda a, b, f=f: f * mse_loss(a, b), trial=True).chance for f in (1, 1e-12, 1e12)
    ]
    assert chances[1:] == pytest.approx(chances[:1] * 2, rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_packed_time_major_classes_and_answers_per_step() -> None:
    torch.manual_seed(1)
    x, classes = torch.randn(B, T, 2), torch.randint(3, (B,))
    x[:, -1, 0] += 5 * classes
    packed = pack_padded_sequence(x, torch.randint(5, T, (B,)), batch_first=True, enforce_sorted=False)
    assert uv.diagnose(LastStep(nn.GRU(2, H, batch_first=True), 3), packed, classes, loss=cross_entropy,
                       trial=True).chance is not None  # fmt: skip
    major = uv.diagnose(LastStep(nn.GRU(2, H), 3), x.transpose(0, 1), classes, loss=cross_entropy, trial=True)
    assert major.readable is not None
    assert major.readable > 0.3

    class EveryStep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(2, H, batch_first=True), nn.Linear(H, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    each = uv.diagnose(EveryStep(), x, x[..., :1], loss=mse_loss, trial=True)
    assert each.readable is not None
    assert each.readable > 0.5


def test_a_trial_that_can_not_be_is_an_error_and_one_that_diverges_has_no_chance() -> None:
    x, y = remember_the_first()
    with pytest.raises(
        ValueError, match=r"trial: expected a batch of at least 38 samples for a state of 6 units, got 9"
    ):
        uv.diagnose(forgetful(), x[:9], y[:9], loss=mse_loss, trial=True)
    with pytest.raises(ValueError, match="trial: expected the target as a tensor"):
        uv.diagnose(forgetful(), x, loss=lambda output: output.square().mean(), trial=True)
    for lr in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr: expected a positive number"):
            uv.diagnose(forgetful(), x, y, loss=mse_loss, lr=lr)
    diverging = LastStep(cures.spectral_radius_(nn.RNN(2, H, batch_first=True, nonlinearity="relu"), 1.0))
    found = uv.diagnose(diverging, x, y, loss=mse_loss, trial=True, lr=1e12)
    assert found.readable == 0.0


def test_no_chance_is_told_where_nothing_is_decided() -> None:
    x, y = remember_the_first()
    for options in ({"steps": 1}, {"steps": 2}, {"lag": 500}):
        few = x[:, : options.pop("steps", T)]
        found = uv.diagnose(forgetful(), few, y, loss=mse_loss, trial=True, **options)
        assert found["rnn.l0"].verdict == "undecided"
        assert found.chance is found.readable is None
        assert not found.prescriptions
        assert "chance" not in repr(found)
        assert "nothing" not in repr(found)


def test_an_undecided_layer_has_no_part_in_the_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    class Beside(LastStep):
        def __init__(self) -> None:
            super().__init__(cures.chrono_(nn.GRU(2, H, batch_first=True), T, torch.Generator().manual_seed(0)))
            self.short = cures.spectral_radius_(nn.RNN(2, H, batch_first=True), 1e-6)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.short(x[:, -2:])[0][:, -1, :1]

    x, y = remember_the_first()
    torch.manual_seed(0)
    seen: list[float] = []
    monkeypatch.setattr(
        "unvanish.diagnosis.diagnose.Odds", lambda readable, survival: seen.append(survival) or trial.Odds(readable, survival)
    )
    found = uv.diagnose(Beside(), x, y, loss=mse_loss, trial=True)
    assert [found[name].verdict for name in ("rnn.l0", "short.l0")] == ["healthy", "undecided"]
    assert found["short.l0"].evidence["median_survival"] < 1e-3
    assert seen == [found["rnn.l0"].evidence["median_survival"]]


def test_a_read_out_is_judged_on_samples_it_was_not_fitted_on() -> None:
    """Targets of pure noise: nothing can be read, although a fit to so few samples explains a fifth of them."""
    torch.manual_seed(0)
    layer, samples = nn.RNN(2, 2 * H), 4 * trial.PER_FEATURE * 2 * H // 3 + 8
    x, noise = torch.randn(T, samples, 2), torch.randn(samples, 1)
    states = layer(x)[0][-1].detach()
    left, total = trial._judged(states, noise, states, noise)
    assert 1 - left / total > 0.1
    model = LastStep(layer)
    given, _ = trial.capture(model, (x,), lambda output: mse_loss(output, noise), 0)
    assert trial._readable(given[0], noise) < 0.05
