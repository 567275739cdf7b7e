"""What a prescription promises, what applying it changes, and how it is taken back."""

import copy

import pytest
import torch
from torch import Tensor, nn

import unvanish as uv
from tests.test_diagnose import LastStep, data, diagnose, layer
from unvanish import cures


def test_a_replaced_module_can_be_put_back() -> None:
    model = LastStep(cures.spectral_radius_(layer("RNN"), 0.5))
    old = model.encoder
    found = diagnose(model)
    replace = next(p for p in found.prescriptions if "GRU" in p.cure)
    replace.apply(model)
    assert isinstance(model.encoder, nn.GRU)
    assert found.verify(model).cured
    assert replace.undo(model).encoder is old


def test_a_cure_that_does_not_heal_says_so_and_comes_after_those_that_do() -> None:
    rnn = cures.spectral_radius_(layer("RNN", H=48), 2.0)
    found = diagnose(LastStep(rnn), data()[0])
    heals = [p.heals for p in found.prescriptions]
    assert heals == sorted(heals, reverse=True)
    assert not all(heals)
    for p in found.prescriptions:
        assert (p.limit == "; does not cure") is not p.heals


def test_undo_takes_the_training_back_too_and_a_cure_is_applied_once() -> None:
    model = LastStep(layer("LSTM"))
    first = diagnose(model).prescriptions[0]
    before = copy.deepcopy(model.state_dict())
    first.apply(model)
    with pytest.raises(ValueError, match="was applied to this model already"):
        first.apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    first.undo(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is name.startswith("encoder"), name


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    model = LastStep(cures.spectral_radius_(layer("RNN"), 0.5))
    model.also = model.encoder
    replace = next(p for p in diagnose(model).prescriptions if "GRU" in p.cure)
    replace.apply(model)
    assert isinstance(model.encoder, nn.GRU)
    assert model.also is model.encoder
    replace.undo(model)
    assert isinstance(model.also, nn.RNN)
    assert model.also is model.encoder


def test_a_module_is_cured_for_its_own_layers_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = nn.GRU(3, 8, batch_first=True)
            self.enc2 = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.enc2(self.enc(x)[0])[0][:, -1]

    torch.manual_seed(0)
    model = Two()
    with torch.no_grad():
        uv.cures.forget_bias_(model.enc2, -3.0)
        uv.cures.chrono_(model.enc, max_lag=400)
    found = uv.diagnose(model, torch.randn(8, 30, 3), torch.randn(8, 8), budget=0, loss=nn.functional.mse_loss)
    assert found["enc2.l0"].verdict == "vanishes"
    cured = {p.path for p in found.prescriptions}
    assert "enc2" in cured
    assert ("enc" in cured) is (found["enc.l0"].verdict != "healthy")
    for text in repr(found).splitlines():
        assert "nan" not in text
