"""Flossing: the exponents are those of the measurement, their gradient is exact, and descent moves them to zero."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from unvanish import cures, flow
from unvanish import nn as unn
from unvanish.cells import ZOO


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_exponents_are_the_measured_ones(kind, every):
    torch.manual_seed(0)
    module, x = kind(2, 5, num_layers=2).double(), torch.randn(20, 3, 2).double()
    found = cures.GradientFlossing(module, n=2, every=every, warmup=4, seed=7).exponents(x)
    for name in ("l0", "l1"):
        expected = flow.lyapunov(module, x, n=2, warmup=4, at=name, seed=7).exponents
        mean = found[name].mean(0).sort(descending=True).values
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)


def test_scaled_orthogonal_network_at_rest_has_ln_scale():
    rnn = cures.orthogonal_(nn.RNN(2, 6).double(), 0.8)
    for b in (rnn.bias_ih_l0, rnn.bias_hh_l0):
        nn.init.zeros_(b)
    value = cures.GradientFlossing(rnn, n=6)(torch.zeros(10, 1, 2).double())
    assert math.isclose(float(value.detach()), math.log(0.8) ** 2, rel_tol=1e-12)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_gradient_is_exact(kind):
    torch.manual_seed(1)
    module, x = kind(2, 3).double(), torch.randn(6, 2, 2).double()
    floss = cures.GradientFlossing(module, n=2)
    floss(x).backward()
    for p in module.parameters():
        flat, grad = p.detach().view(-1), p.grad.view(-1)
        for i in (0, len(flat) - 1):
            was, values = float(flat[i]), []
            for step in (1e-5, -1e-5):
                flat[i] = was + step
                values.append(float(floss(x).detach()))
            flat[i] = was
            assert math.isclose(float(grad[i]), (values[0] - values[1]) / 2e-5, rel_tol=1e-5, abs_tol=1e-7)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_descent_moves_the_exponents_to_zero(kind):
    torch.manual_seed(2)
    module = cures.spectral_radius_(kind(2, 8), 0.4)
    x = torch.randn(15, 2, 2)
    floss = cures.GradientFlossing(module, n=2)
    optimizer = torch.optim.Adam(module.parameters(), 2e-2)
    before = float(flow.lyapunov(module, x, n=2).exponents.abs().max())
    for _ in range(40):
        optimizer.zero_grad()
        floss(x).backward()
        optimizer.step()
    assert float(flow.lyapunov(module, x, n=2).exponents.abs().max()) < 0.4 * before


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.rnn = nn.GRU(3, 4, batch_first=True, bidirectional=True)

    def forward(self, tokens):
        return self.rnn(self.embed(tokens))[0]


def test_a_model_is_run_and_its_embedding_gets_a_gradient():
    model = Model()
    floss = cures.GradientFlossing(model, n=2)
    tokens = torch.randint(5, (3, 6))
    assert {k: v.shape for k, v in floss.exponents(tokens).items()} == {"rnn.l0": (3, 2), "rnn.l0.reverse": (3, 2)}
    floss(tokens).backward()
    assert float(model.embed.weight.grad.norm()) > 0
    assert not model.rnn._forward_pre_hooks


@pytest.mark.parametrize(("every", "warmup"), [(1, 0), (1, 2), (3, 2)])
def test_packed_samples_average_over_their_own_steps(every, warmup):
    torch.manual_seed(3)
    rnn, x = nn.RNN(2, 4, bidirectional=True).double(), torch.randn(6, 2, 2).double()
    floss = cures.GradientFlossing(rnn, n=2, every=every, warmup=warmup)
    packed = floss.exponents(pack_padded_sequence(x, [6, 3]))
    alone = floss.exponents(x[:3, 1:])
    for name in ("l0", "l0.reverse"):
        torch.testing.assert_close(packed[name][1], alone[name][0])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_lengths_count_as_packing_does(kind):
    torch.manual_seed(3)
    layer, x = getattr(unn, kind)(2, 4).double(), torch.randn(6, 2, 2).double()
    floss, lengths = cures.GradientFlossing(layer, n=2), torch.tensor([3, 6])
    expected = floss.exponents(pack_padded_sequence(x, lengths, enforce_sorted=False))
    torch.testing.assert_close(floss.exponents(x, lengths=lengths), expected)


def test_autocast_does_not_round_the_exponents():
    torch.manual_seed(3)
    gru, x = nn.GRU(2, 4), torch.randn(6, 2, 2).bfloat16()
    floss = cures.GradientFlossing(gru, n=2)
    expected = floss.exponents(x.float())["l0"]
    with torch.autocast("cpu", torch.bfloat16):
        found = floss.exponents(x)["l0"]
    torch.testing.assert_close(found, expected)


def test_flossing_errors():
    x = torch.zeros(4, 1, 2)
    with pytest.raises(TypeError, match=r"'' is a GRUCell|GRUCell"):
        cures.GradientFlossing(nn.GRUCell(2, 3))
    with pytest.raises(ValueError, match=r"^n, every, warmup"):
        cures.GradientFlossing(nn.RNN(2, 3), n=0)
    with pytest.raises(ValueError, match=r"^n: expected at most 3"):
        cures.GradientFlossing(nn.RNN(2, 3), n=4)(x)
    with pytest.raises(ValueError, match=r"^warmup"):
        cures.GradientFlossing(nn.RNN(2, 3), warmup=4)(x)
    with pytest.raises(ValueError, match="warmup: expected fewer than the 2 steps of the shortest sample, got 3"):
        cures.GradientFlossing(nn.RNN(2, 3), warmup=3)(pack_padded_sequence(torch.zeros(4, 2, 2), [4, 2]))
    dead = cures.identity_(nn.RNN(2, 3, nonlinearity="relu"))
    with pytest.raises(ArithmeticError, match=r"^l0: exponent 1 of 1 is not finite"):
        cures.GradientFlossing(dead)(x)
    with pytest.raises(ArithmeticError, match="l0: an exponent is NaN, since input"):
        cures.GradientFlossing(nn.RNN(2, 3))(x * math.nan)


@pytest.mark.parametrize("name", ["mgu", "lem", "peephole", "cifg", "cornn"])
def test_gradient_of_a_derived_cell_is_the_loss_s_own(name):
    torch.manual_seed(0)
    layer = unn.Recurrent(ZOO[name](), 2, 3, dtype=torch.float64)
    x = torch.randn(8, 2, 2, dtype=torch.float64)
    floss = cures.GradientFlossing(layer, n=2)
    (found,) = torch.autograd.grad(floss(x), layer.weight_hh_l0)
    direction = torch.randn_like(found)
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            layer.weight_hh_l0.add_(step * direction)
        values.append(float(floss(x).detach()))
    assert float((found * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)
