"""Planted diseases are found, with their cause, and the first prescription heals them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import unvanish as uv
from tests.test_diagnose import LastStep, T, data, diagnose, layer, relu
from unvanish import cures


def padded() -> Tensor:
    x = data()[0].clone()
    x[:, T // 10 :] = 0
    return x


DISEASES: dict[str, tuple[Callable[[], Any], float, str, str]] = {
    "radius 0.5": (lambda: cures.spectral_radius_(layer("RNN"), 0.5), 1.0, "vanishes", "weights too small"),
    "radius 2, tanh": (lambda: cures.spectral_radius_(layer("RNN", H=48), 2.0), 1.0, "chaotic", "weights too large"),
    "radius 1.5, tanh": (lambda: cures.spectral_radius_(layer("RNN", H=48), 1.5), 0.1, "healthy", "reaches back"),
    "radius 1.5, relu": (lambda: relu(1.5), 1.0, "explodes", "weights too large"),
    "forget bias −3": (lambda: cures.forget_bias_(layer("LSTM"), -3.0), 1.0, "vanishes", "forget gate"),
    "update bias −3": (lambda: cures.forget_bias_(layer("GRU"), -3.0), 1.0, "vanishes", "update gate"),
    "input scale 50, LSTM": (lambda: layer("LSTM"), 50.0, "saturated", "gates saturated"),
    "input scale 50, RNN": (lambda: layer("RNN"), 50.0, "saturated", "activations saturated"),
    "detached": (lambda: cures.chrono_(layer("LSTM"), T), 1.0, "vanishes", "detached"),
    "padding": (lambda: layer("LSTM"), 1.0, "vanishes", "padding"),
    "dead": (lambda: dead(), 1.0, "dead", "no relu unit is on"),
    "identity": (lambda: relu(), 0.1, "healthy", "reaches back"),
    "chrono": (lambda: cures.chrono_(layer("LSTM"), T), 1.0, "healthy", "reaches back"),
}
"""layer, scale of the input, verdict, cause"""


def planted(disease: str) -> tuple[nn.Module, Tensor]:
    make, scale, _, _ = DISEASES[disease]
    x = padded() if disease == "padding" else data(scale=scale)[0]
    return LastStep(make(), every=20 if disease == "detached" else None), x


def dead() -> nn.RNN:
    rnn = cures.identity_(layer("RNN", nonlinearity="relu"))
    nn.init.constant_(rnn.bias_ih_l0, -1e3)
    return rnn


@pytest.mark.parametrize("disease", list(DISEASES))
def test_planted_diseases_are_found_with_their_cause(disease: str) -> None:
    _, _, verdict, cause = DISEASES[disease]
    for factor in (1.0, 1e-12, 1e12):
        found = diagnose(*planted(disease), factor)["encoder.l0"]
        assert found.verdict == verdict
        assert cause in found.cause


@pytest.mark.parametrize("disease", list(DISEASES))
def test_the_first_prescription_keeps_its_promise(disease: str) -> None:
    model, x = planted(disease)
    found = diagnose(model, x)
    if DISEASES[disease][2] == "healthy":
        assert found.healthy
        assert not found.prescriptions
        return
    able = [p for p in found.prescriptions if p.act is not None]
    assert able[0].heals or disease == "detached"
    before = copy.deepcopy(model.state_dict())
    cured = able[0].apply(model)
    after = found.verify(cured)
    assert after.cured == able[0].heals
    for name, predicted in able[0].predicted.items():
        assert after.after[name].rate == pytest.approx(predicted.rate, rel=1e-6)
        assert after.after[name].reach == predicted.reach
    able[0].undo(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="was not applied"):
        able[0].undo(model)


def test_large_recurrent_weights_that_do_no_harm_are_named_all_the_same() -> None:
    for radius in (0.9, 1.5):
        found = diagnose(LastStep(cures.spectral_radius_(layer("RNN", H=32), radius)), data(scale=1.0)[0], lag=20)
        told = found["encoder.l0"]
        if radius > 1:
            assert told.verdict == "healthy"
            assert "spectral radius of W_hh 1.50" in told.cause
            assert "grow by 10^4 over" in told.cause
            assert told.evidence["lyapunov"] < 0.05
        else:
            assert "held" not in told.cause


class Read(nn.Module):
    """The last step of any stack."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def integrator(features: int, layers: int, seed: int, H: int = 24) -> Read:
    torch.manual_seed(seed)
    return Read(cures.identity_(nn.RNN(features, H, layers, batch_first=True, nonlinearity="relu")))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_an_error_that_some_samples_lose_and_others_keep_arrives(scale: float, seed: int) -> None:
    """Relu units that are off lose it exactly; what arrives in the others is what the weights learn from. Against
    autograd, sample by sample."""
    model, batch = integrator(2, 1, seed), (8, 60, 2)
    x, y = scale * torch.randn(batch), torch.randn(8, 1)
    found = uv.diagnose(model, x, y, budget=0, loss=mse_loss)["rnn.l0"]
    rnn, head = model.rnn.double(), model.head.weight.double().detach()
    first = rnn(x[:, :1].double())[1].detach().requires_grad_()
    last = rnn(x[:, 1:].double(), first)[1][0]
    (error,) = torch.autograd.grad((last @ head.mT).sum(), first)
    own = error[0].norm(dim=-1) / head.norm()
    arriving = float((own > 0).double().mean())
    assert found.evidence["arriving"] == arriving
    assert arriving < 1
    assert found.evidence["survival"] == pytest.approx(float(own[own > 0].median()) * arriving**0.5, rel=1e-6)
    assert found.verdict == "healthy"
    assert f"for {100 * (1 - arriving):.3g} % of the errors followed, the gradient becomes exactly 0" in found.cause


def test_an_error_that_every_sample_loses_vanishes_with_the_units_off() -> None:
    model = integrator(1, 1, 0)
    x = torch.randn(8, 60, 1)
    x[:, 30] = 1e3 * torch.tensor([-1.0, 1.0]).repeat(4)[:, None]
    x[:, 31] = -2 * x[:, 30]
    found = uv.diagnose(model, x, torch.randn(8, 1), budget=0, loss=mse_loss)["rnn.l0"]
    assert found.verdict == "vanishes"
    assert found.cause.startswith("relu units off")
    assert "for 100 % of the errors followed, the gradient becomes exactly 0" in found.cause
    assert found.evidence["half_arriving"] <= 29


def test_an_error_that_layers_above_hand_down_at_every_step_does_not_explode() -> None:
    """Over a lag ℓ a layer under m others is reached along C(ℓ + m, m) ways: a polynomial, whatever the lag."""
    found = uv.diagnose(integrator(3, 3, 0), torch.randn(8, 100, 3), torch.randn(8, 1), budget=0, loss=mse_loss)
    assert [d.verdict for d in found.values()] == ["healthy"] * 3
    assert found["rnn.l0"].evidence["survival"] > 100
    assert "along 5e+03 paths" in found["rnn.l0"].cause
    torch.manual_seed(0)
    stretching = nn.RNN(3, 24, 2, batch_first=True, nonlinearity="relu")
    cures.identity_(stretching, 0.5)
    with torch.no_grad():
        stretching.weight_hh_l0.copy_(1.2 * torch.eye(24))  # type: ignore[union-attr]
    below = uv.diagnose(Read(stretching), torch.randn(8, 60, 3).abs(), torch.randn(8, 1), budget=0, loss=mse_loss)
    assert below["rnn.l0"].verdict == "explodes"
    assert below["rnn.l1"].verdict == "vanishes"
