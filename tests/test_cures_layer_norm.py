"""Layer norm inside the recurrence: the equations, and what no longer matters because of it."""

import copy

import pytest
import torch
from torch import nn

import unvanish as uv
from unvanish import cures

DOUBLE = torch.float64


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def build(name, **options):
    torch.manual_seed(0)
    if hasattr(nn, name):
        return getattr(nn, name)(2, 6, **options).double()
    return uv.nn.Recurrent(uv.cells.ZOO[name](), 2, 6, dtype=DOUBLE, **options)


def normed(a, gain, bias):
    blocks = a.unflatten(-1, (-1, 6))
    out = (blocks - blocks.mean(-1, keepdim=True)) / (blocks.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return gain * out.flatten(-2) + bias


def test_an_lstm_is_the_equations():
    lstm, x = build("LSTM"), noise(5, 3, 2)
    layer = cures.layer_norm_(copy.deepcopy(lstm))
    with torch.no_grad():
        layer.gain_hh_l0.copy_(noise(24, seed=1))
    h = c = torch.zeros(3, 6, dtype=DOUBLE)
    for step in x:
        a = normed(step @ lstm.weight_ih_l0.mT, layer.gain_ih_l0, lstm.bias_ih_l0)
        a = a + normed(h @ lstm.weight_hh_l0.mT, layer.gain_hh_l0, lstm.bias_hh_l0)
        i, f, g, o = a.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    y, (h_n, c_n) = layer(x)
    torch.testing.assert_close((y[-1], h_n[0], c_n[0]), (h, h, c))


@pytest.mark.parametrize("state", [0, 1])
def test_a_watch_records_the_states_of_its_steps_by_name(state):
    lstm, x = build("LSTM"), noise(5, 3, 2)
    model = nn.Sequential(cures.layer_norm_(copy.deepcopy(lstm)))
    with uv.watch(model) as flow:
        model(x)[0].square().sum().backward()
    assert "states=" in flow.skipped["0.step_l0"]
    model.zero_grad()
    with uv.watch(model, states={"0.step_l0": state}) as flow:
        model(x)[0].square().sum().backward()
    h = c = torch.zeros(3, 6, dtype=DOUBLE)
    total, kept = 0, []
    for step in x:
        a = normed(step @ lstm.weight_ih_l0.mT, 1.0, lstm.bias_ih_l0)
        a = a + normed(h @ lstm.weight_hh_l0.mT, 1.0, lstm.bias_hh_l0)
        i, f, g, o = a.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        total = total + h.square().sum()
        kept.append((h, c)[state])
    expected = torch.stack([d.norm(dim=-1) for d in torch.autograd.grad(total, kept)])
    torch.testing.assert_close(flow["0.step_l0"].dh, expected, rtol=1e-10, atol=1e-13)
    assert list(flow) == ["0.step_l0"]


def test_a_second_stage_reads_the_state_of_its_own_step():
    lem, x = build("lem"), noise(5, 3, 2)
    layer = cures.layer_norm_(copy.deepcopy(lem))
    y = z = torch.zeros(3, 6, dtype=DOUBLE)
    w_y, b_y = lem.weight_hh_l0.chunk(4)[3], lem.bias_hh_l0.chunk(4)[3]
    for step in x:
        p_a, p_b, p_z, p_y = normed(step @ lem.weight_ih_l0.mT, layer.gain_ih_l0, lem.bias_ih_l0).chunk(4, -1)
        q_a, q_b, q_z, _ = normed(y @ lem.weight_hh_l0.mT, layer.gain_hh_l0, lem.bias_hh_l0).chunk(4, -1)
        a, b = (p_a + q_a).sigmoid(), (p_b + q_b).sigmoid()
        z = (1 - a) * z + a * (p_z + q_z).tanh()
        q_y = normed(z @ w_y.mT, torch.ones(6, dtype=DOUBLE), b_y)
        y = (1 - b) * y + b * (p_y + q_y).tanh()
    torch.testing.assert_close(layer(x)[0][-1], y)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "lem", "peephole", "antisymmetric"])
def test_the_size_of_the_matrices_and_of_the_input_has_no_influence(name):
    layer, x = cures.layer_norm_(build(name, bias=False), eps=1e-20), noise(7, 2, 2)
    expected = layer(x)[0]
    with torch.no_grad():
        layer.inner.weight_hh_l0.mul_(100)
    torch.testing.assert_close(layer(x)[0], expected)
    torch.testing.assert_close(layer(0.01 * x)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["RNN", "GRU", "lem"])
def test_layers_directions_lengths_and_training(name):
    layer, x = cures.layer_norm_(build(name, num_layers=2, bidirectional=True, batch_first=True)), noise(3, 6, 2)
    y, final = layer(x, lengths=[6, 2, 4])
    alone, end = layer(x[1:2, :2])
    torch.testing.assert_close(y[1:2, :2], alone)
    assert not y[1, 2:].any()
    for found, expected in zip(*((s if isinstance(s, tuple) else (s,)) for s in (final, end)), strict=True):
        torch.testing.assert_close(found[:, 1:2], expected)
    y.square().sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if "gain" in n)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x)[0], layer(x)[0])


def test_other_cures_reach_the_weights_inside():
    model = nn.ModuleDict({"rnn": build("LSTM")})
    weights = {id(p) for p in model.parameters()}
    assert cures.layer_norm_(model, 0.1) is model
    assert weights <= {id(p) for p in model.parameters()}
    assert float(model["rnn"].gain_ih_l0.detach().max()) == pytest.approx(0.1)
    cures.chrono_(model, 20)
    b = model["rnn"].inner.bias_ih_l0.detach()
    assert torch.equal(b[:6], -b[6:12])


def test_layer_norm_errors():
    with pytest.raises(TypeError, match="sequences whole"):
        cures.layer_norm_(nn.LSTMCell(2, 3))
    with pytest.raises(TypeError, match="no recurrent matrix"):
        cures.layer_norm_(build("indrnn"))
    with pytest.raises(ValueError, match="gain"):
        cures.layer_norm_(nn.RNN(2, 3), 0.0)
    with pytest.raises(ValueError, match="run by a NormalisedLayers"):
        cures.layer_norm_(cures.layer_norm_(nn.RNN(2, 3)))
    with pytest.raises(ValueError, match="uses h_detach"):
        cures.layer_norm_(cures.h_detach_(nn.LSTM(2, 3), 0.5))
