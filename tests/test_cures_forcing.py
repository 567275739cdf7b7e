"""Sparse forcing puts the state on the data, and no error passes it."""

import math

import pytest
import torch
from torch import nn

import unvanish as uv
from unvanish import cures

DOUBLE = torch.float64


def setup(kind="RNN", H=6, N=2, gain=1.0, **options):
    torch.manual_seed(0)
    layer = (
        getattr(nn, kind)(2, H, **options)
        if hasattr(nn, kind)
        else uv.nn.Recurrent(uv.cells.ZOO[kind](), 2, H, **options)
    ).double()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "weight_hh" in name:
                p.mul_(gain)
    return layer, nn.Linear(H, N).double()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("kind", "N"), [("RNN", 2), ("LSTM", 2), ("GRU", 6), ("mgu", 9)])
def test_is_the_loop_that_projects_the_state_on_the_data(kind, N, keep):
    layer, readout = setup(kind, N=N)
    x, y = noise(10, 3, 2), noise(10, 3, N, seed=1)
    found = cures.forced(layer, x, y, readout, 4, keep=keep)
    inverse, state, expected = torch.linalg.pinv(readout.weight.detach()), None, []
    for t in range(10):
        h, state = layer(x[t : t + 1], state)
        expected.append(readout(h[0]))
        if (t + 1) % 4 == 0:
            h, *others = state if isinstance(state, tuple) else (state,)
            h = h + (y[t] - readout(h[0])) @ inverse.mT
            if N <= 6:  # B has a right inverse
                torch.testing.assert_close(readout(h[0]), y[t])
            state = (h, *others) if others else h
    torch.testing.assert_close(found, torch.stack(expected))


def test_no_error_passes_a_forcing_unless_it_is_kept():
    layer, readout = setup("LSTM", num_layers=2)
    x, y = noise(9, 1, 2).requires_grad_(), noise(9, 1, 2, seed=1)
    for keep in (False, True):
        found = cures.forced(layer, x, y, readout, 3, keep=keep)
        for t in range(9):
            (d,) = torch.autograd.grad(found[t].sum(), x, retain_graph=True)
            reached = d.flatten(1).any(1).nonzero().flatten().tolist()
            assert reached == list(range(0 if keep else t // 3 * 3, t + 1))


def test_kept_graph_is_that_of_what_the_readout_does_not_see():
    layer, readout = setup("RNN", N=2)
    x, y, h0 = noise(2, 1, 2), noise(2, 1, 2, seed=1), noise(1, 1, 6, seed=2).requires_grad_()
    found = cures.forced(layer, x, y, readout, 1, h0, keep=True)
    (d,) = torch.autograd.grad(found[1].sum(), h0, retain_graph=True)
    h1 = layer(x[:1], h0)[1]
    B = readout.weight.detach()
    hidden = torch.eye(6, dtype=DOUBLE) - torch.linalg.pinv(B) @ B
    moved = (h1 @ hidden.mT) + (h1 - h1 @ hidden.mT).detach()
    correction = (y[0] - readout(h1[0]).detach()) @ torch.linalg.pinv(B).mT
    (expected,) = torch.autograd.grad(readout(layer(x[1:], moved + correction)[0]).sum(), h0)
    torch.testing.assert_close(d, expected)


def test_the_gradient_of_a_chaotic_network_stays_bounded():
    layer, readout = setup("RNN", H=64, gain=14.0)
    x, y = noise(200, 2, 2), noise(200, 2, 2, seed=1)
    exponent = float(uv.flow.lyapunov(layer, x, n=1).exponents[0])
    assert exponent > 0.1

    def norm(found):
        grads = torch.autograd.grad((found[-1] - y[-1]).square().mean(), list(layer.parameters()))
        return math.sqrt(sum(float(g.square().sum()) for g in grads))

    free = norm(readout(layer(x)[0]))
    held = norm(cures.forced(layer, x, y, readout, cures.forcing_interval(exponent)))
    assert free > 1e6 * held


@pytest.mark.parametrize("options", [{"batch_first": True}, {}])
def test_with_a_long_interval_it_is_the_layer_itself(options):
    layer, readout = setup("GRU", **options)
    x = noise(7, 7, 2)
    torch.testing.assert_close(cures.forced(layer, x, noise(7, 7, 2), readout, 7), readout(layer(x)[0]))


def test_interval_is_the_doubling_time():
    for exponent in (0.01, 0.1, 0.5):
        steps = cures.forcing_interval(exponent)
        assert math.exp(exponent * steps) <= 2 < math.exp(exponent * (steps + 1))
    assert cures.forcing_interval(5.0) == 1


def test_forcing_errors():
    layer, readout = setup()
    x, y = noise(5, 1, 2), noise(5, 1, 2)
    with pytest.raises(ValueError, match="exponent"):
        cures.forcing_interval(-0.1)
    with pytest.raises(TypeError, match="layer: expected"):
        cures.forced(nn.RNNCell(2, 3), x, y, readout, 2)
    with pytest.raises(TypeError, match=r"nn\.Linear"):
        cures.forced(layer, x, y, nn.Sequential(readout), 2)
    with pytest.raises(ValueError, match="one direction"):
        cures.forced(nn.RNN(2, 6, bidirectional=True), x, y, readout, 2)
    with pytest.raises(ValueError, match="target"):
        cures.forced(layer, x, y[:3], readout, 2)
    with pytest.raises(ValueError, match="interval"):
        cures.forced(layer, x, y, readout, 0)
