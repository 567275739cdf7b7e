"""Any two cures in any order: both hold, or the second says why it does not fit."""

import copy

import pytest
import torch
from torch import nn

import unvanish as uv
from unvanish import cures

X = torch.randn(12, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layers_inside(model):
    return [m for m in model.modules() if isinstance(m, nn.RNNBase | uv.nn.Recurrent)]


def criticalise(model):
    for layer in layers_inside(model):
        masks = torch.ones(12, 3, getattr(layer, "columns", 2) - 2, dtype=torch.float64)
        cures.critical_(layer, torch.cat([X, masks], -1))


CURES = {
    "forget_bias_": lambda m: cures.forget_bias_(m, 2.0),
    "chrono_": lambda m: cures.chrono_(m, 20),
    "uniform_gate_": cures.uniform_gate_,
    "orthogonal_": cures.orthogonal_,
    "spectral_radius_": lambda m: cures.spectral_radius_(m, 0.9),
    "identity_": cures.identity_,
    "critical_": criticalise,
    "clip_recurrence_": lambda m: cures.clip_recurrence_(m, 0.5),
    "h_detach_": lambda m: cures.h_detach_(m, 0.5),
    "constrain_": lambda m: cures.constrain_(m, "spectral"),
    "zoneout_": lambda m: cures.zoneout_(m, 0.3),
    "recurrent_dropout_": lambda m: cures.recurrent_dropout_(m, 0.3),
    "layer_norm_": cures.layer_norm_,
    "replace_": lambda m: cures.replace_(m, "mgu"),
    "Omega": lambda m: loss_of(m, cures.Omega(m)),
    "GradientFlossing": lambda m: cures.GradientFlossing(m)(X).backward(),
    "LocalStability": lambda m: cures.LocalStability(m)(X).backward(),
    "CarryRate": lambda m: cures.CarryRate(torch.optim.SGD(m.parameters(), lr=0.1), m, 0.1),
}
KINDS = {
    "RNN": lambda: nn.RNN(2, 4),
    "LSTM": lambda: nn.LSTM(2, 4),
    "GRU": lambda: nn.GRU(2, 4),
    "peephole": lambda: uv.nn.Recurrent(uv.cells.ZOO["peephole"](), 2, 4),
}


def loss_of(model, omega):
    with omega:
        out = model(X)
    y = out[0] if isinstance(out, tuple) else out
    y.square().sum().backward(retain_graph=True)
    omega.penalty().backward()


def refusal(name, model):
    """What a cure says where it does not fit; None where it was applied."""
    try:
        CURES[name](model)
    except (TypeError, ValueError, ArithmeticError) as error:
        return str(error)
    return None


def names_what_is_wrong(says, name):
    """The argument, the cure, or the layer (by its path in nn.Sequential)."""
    return says.startswith(("module: ", "model: ", "layer: ", "optimizer: ", f"{name}: ", "0."))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("first", list(CURES))
def test_the_second_cure_holds_or_says_why_not(kind, first):
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind]()).double()
    says = refusal(first, model)
    if says is not None:
        assert names_what_is_wrong(says, first)
        return
    fitting = 0
    for second in CURES:
        if second == first:
            continue
        both = copy.deepcopy(model)
        before = {key: v.clone() for key, v in both.state_dict().items()}
        says = refusal(second, both)
        if says is not None:
            assert names_what_is_wrong(says, second), (second, says)
            after = both.state_dict()
            assert all(torch.equal(after[key], v) for key, v in before.items()), second
            continue
        fitting += 1
        out = both(X)
        y = out[0] if isinstance(out, tuple) else out
        both.zero_grad()
        y.square().sum().backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in both.parameters()), second
    assert fitting >= 4
