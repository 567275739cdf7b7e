"""A scaled carry learns as if its bias stood in a parameter group with that learning rate."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import unvanish as uv
from unvanish import cures

H = 3
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}


def layer(kind):
    torch.manual_seed(0)
    made = uv.nn.Recurrent(uv.cells.ZOO[kind](), 2, H) if kind in uv.cells.ZOO else getattr(nn, kind)(2, H)
    return made.double()


def loss(out):
    y, _ = out
    return (y[-1] - 0.3).square().sum()


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize(("kind", "row"), [("LSTM", 1), ("GRU", 1), ("mgu", 0)])
def test_is_a_parameter_group_of_its_own(kind, row, optimizer):
    scaled, x = layer(kind), torch.randn(6, 2, 2, dtype=torch.float64)
    named = dict(copy.deepcopy(scaled).named_parameters())
    own, other = {}, dict(named)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        parts = [nn.Parameter(part.detach().clone()) for part in other.pop(name).split(H)]
        own |= {(name, i): part for i, part in enumerate(parts)}
    carries = [part for (_, i), part in own.items() if i == row]
    rest = [*other.values(), *(part for (_, i), part in own.items() if i != row)]
    reference = OPTIMIZERS[optimizer]([{"params": rest}, {"params": carries}])
    reference.param_groups[1]["lr"] *= 0.25
    learner = OPTIMIZERS[optimizer](scaled.parameters())
    cures.CarryRate(learner, scaled, 0.25)
    for _ in range(5):
        learner.zero_grad()
        loss(scaled(x)).backward()
        learner.step()
        reference.zero_grad()
        biases = {
            name: torch.cat([part for (n, _), part in own.items() if n == name])
            for name in ("bias_ih_l0", "bias_hh_l0")
        }
        loss(functional_call(layer(kind), {**other, **biases}, (x,))).backward()
        reference.step()
    for name in biases:
        expected = torch.cat([part for (n, _), part in own.items() if n == name])
        torch.testing.assert_close(getattr(scaled, name), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled.weight_ih_l0, other["weight_ih_l0"], rtol=1e-9, atol=1e-12)


def test_scale_can_be_scheduled_and_taken_off():
    gru = nn.GRU(2, H)
    optimizer = torch.optim.SGD(gru.parameters(), lr=0.1)
    rate = cures.CarryRate(optimizer, gru, 0.0)

    def moved():
        before = gru.bias_ih_l0.detach().clone()
        optimizer.zero_grad()
        loss(gru(torch.randn(4, 2, 2))).backward()
        optimizer.step()
        return float((gru.bias_ih_l0.detach() - before)[H : 2 * H].norm())

    assert moved() == 0
    rate.scale = 1.0
    assert moved() > 0
    rate.scale = 0.0
    rate.remove()
    assert moved() > 0


def test_carry_rate_errors():
    lstm = nn.LSTM(2, H)
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer"):
        cures.CarryRate(lstm, lstm, 0.1)
    with pytest.raises(ValueError, match="at least 0"):
        cures.CarryRate(optimizer, lstm, -0.1)
    with pytest.raises(ValueError, match="does not hold"):
        cures.CarryRate(optimizer, nn.LSTM(2, H), 0.1)
    with pytest.raises(TypeError, match="no gate that alone carries"):
        cures.CarryRate(optimizer, nn.RNN(2, H), 0.1)
