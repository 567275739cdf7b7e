"""Criticality and local stability: the mean-field laws, measured by autograd."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import unvanish as uv
from unvanish import cures
from unvanish.cures.critical import chi

DOUBLE = torch.float64


def build(name, H=8, **options):
    torch.manual_seed(0)
    if hasattr(nn, name):
        return getattr(nn, name)(2, H, **options).double()
    return uv.nn.Recurrent(uv.cells.ZOO[name](), 2, H, dtype=DOUBLE, **options)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def by_autograd(layer, x):
    """χ from autograd's Jacobians of a single step, at every step of the second half."""
    (d,) = uv.nn.modules.layer_directions(layer)
    state = d.cell.start(x[0], (layer.hidden_size,) * len(d.cell.states))
    n, found = len(state), []
    for t, p in enumerate(d.cell.project(x, d.weights).detach()):
        if t >= len(x) // 2:
            blocks = jacobian(lambda *s, p=p: d.cell.advance(p, s, d.weights), state)
            blocks = [[blocks[a][b].diagonal(dim1=0, dim2=2) for b in range(n)] for a in range(n)]
            found.append(torch.stack([torch.stack([b.square().sum((0, 1)).mean() for b in row]) for row in blocks]))
        state = tuple(s.detach() for s in d.cell.advance(p, state, d.weights))
    return float(torch.linalg.eigvals(torch.stack(found).mean(0) / layer.hidden_size).abs().max())


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "mgu", "lem"])
def test_mean_squared_singular_value_is_one_afterwards(name):
    layer, x = build(name), noise(24, 4, 2)
    drawn = layer.weight_hh_l0.detach().clone()
    assert chi(layer, x)[0] == pytest.approx(by_autograd(layer, x), rel=1e-9)
    assert cures.critical_(layer, x) is layer
    assert by_autograd(layer, x) == pytest.approx(1, abs=2e-3)
    factors = (layer.weight_hh_l0.detach() / drawn).flatten()
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    cures.critical_(layer, x, target=0.8)
    assert by_autograd(layer, x) == pytest.approx(0.8, abs=2e-3)


def test_a_wide_tanh_rnn_gets_the_variance_of_mean_field_theory():
    """q = σ_w² E tanh²(√q z) + σ_x² and 1 = σ_w² E sech⁴(√q z), with z normal."""
    H, var_x = 400, 0.3
    torch.manual_seed(0)
    rnn = nn.RNN(1, H, bias=False).double()
    with torch.no_grad():
        rnn.weight_hh_l0.normal_(0, 1 / math.sqrt(H))
        rnn.weight_ih_l0.normal_(0, math.sqrt(var_x))
    z = torch.linspace(-8, 8, 4001, dtype=DOUBLE)
    weight = torch.exp(-(z**2) / 2) / torch.exp(-(z**2) / 2).sum()
    q, var_w = 1.0, 1.0
    for _ in range(500):
        a = math.sqrt(q) * z
        var_w = 1 / float((weight / a.cosh() ** 4).sum())
        q = 0.5 * q + 0.5 * (var_w * float((weight * a.tanh() ** 2).sum()) + var_x)
    cures.critical_(rnn, torch.ones(60, 4, 1, dtype=DOUBLE) * torch.sign(noise(60, 4, 1)))
    assert float(rnn.weight_hh_l0.detach().var() * H) == pytest.approx(var_w, rel=0.05)


def test_every_layer_and_direction_is_critical_under_those_below():
    layer, x = build("GRU", num_layers=2, bidirectional=True), noise(24, 4, 2)
    cures.critical_(layer, x)
    assert chi(layer, x) == pytest.approx([1] * 4, abs=2e-3)


def test_padding_is_not_measured():
    layer, x = build("RNN"), noise(20, 2, 2)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([20, 11]))
    x[11:, 1] = 1e6
    again = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([20, 11]))
    assert chi(layer, packed) == chi(layer, again)


def test_critical_errors():
    rnn, x = build("RNN"), noise(10, 2, 2)
    with pytest.raises(TypeError, match="runs sequences whole"):
        cures.critical_(nn.RNNCell(2, 3), x)
    with pytest.raises(TypeError, match="no recurrent matrix"):
        cures.critical_(build("mingru"), x)
    with pytest.raises(ValueError, match=r"^target"):
        cures.critical_(rnn, x, target=0.0)
    antisymmetric = build("antisymmetric")
    before = antisymmetric.weight_hh_l0.detach().clone()
    with pytest.raises(ArithmeticError, match="its carry alone keeps more"):
        cures.critical_(antisymmetric, x, target=0.5)
    assert torch.equal(antisymmetric.weight_hh_l0, before)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "mgu"])
def test_pre_training_to_local_stability_moves_the_radii_to_the_target(name):
    layer, x = build(name, num_layers=2), noise(20, 4, 2)
    stability = cures.LocalStability(layer, steps=4, samples=4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    first = float(stability(x).detach())
    for _ in range(60):
        optimizer.zero_grad()
        stability(x).backward()
        optimizer.step()
    assert float(stability(x).detach()) < 0.1 * first
    time, depth = stability.radii(x)["l1"]
    assert float(time.detach()) == pytest.approx(0.5, abs=0.2)
    assert float(depth.detach()) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("name", ["LSTM", "lem"])
def test_loss_is_the_definitions_and_its_gradient_is_its_own(name):
    layer, x = build(name, H=3), noise(10, 2, 2)
    stability = cures.LocalStability(layer, steps=100, samples=100)
    loss = stability(x)
    assert float(loss.detach()) == pytest.approx((math.sqrt(by_autograd(layer, x)) - 1) ** 2, rel=1e-8)
    (found,) = torch.autograd.grad(loss, layer.weight_hh_l0)
    direction, values = torch.randn_like(found), []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            layer.weight_hh_l0.add_(step * direction)
        values.append(float(stability(x).detach()))
    assert float((found * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


def test_depth_is_the_jacobian_of_a_layer_by_its_input():
    layer, x = build("LSTM", H=3, num_layers=2), noise(8, 2, 2)
    _, depth = cures.LocalStability(layer, steps=100, samples=100).radii(x)["l1"]
    below, states = layer.states if hasattr(layer, "states") else uv.accelerate(layer).states, []
    states = below(x)
    upper, total = uv.nn.modules.layer_directions(layer)[1], 0.0
    for t in range(4, 8):
        before = (states["l1"].h[t - 1], states["l1"].c[t - 1])

        def h(inputs, before=before):
            p = upper.cell.project(inputs, upper.weights)
            return upper.cell.advance(p, before, upper.weights)[0]

        J = jacobian(h, states["l0"].h[t].detach()).diagonal(dim1=0, dim2=2)
        total += float(J.square().sum((0, 1)).mean()) / 3 / 4
    assert float(depth.detach()) == pytest.approx(math.sqrt(total), rel=1e-9)


def test_local_stability_errors():
    with pytest.raises(TypeError, match="no sequence of its own"):
        cures.LocalStability(nn.LSTMCell(2, 3))
    with pytest.raises(ValueError, match="target"):
        cures.LocalStability(nn.RNN(2, 3), target=-1.0)
    with pytest.raises(ValueError, match="steps, samples"):
        cures.LocalStability(nn.RNN(2, 3), steps=0)
