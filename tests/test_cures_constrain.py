"""Constrained matrices stay on their set through training, state_dict and deepcopy, in torch's own modules."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from unvanish import cures
from unvanish.cures.layer_weights import recurrent_layers

LAYERS = [nn.RNN, nn.LSTM, nn.GRU]
ALL = [*LAYERS, nn.RNNCell, nn.LSTMCell, nn.GRUCell]


def blocks(module):
    layers = recurrent_layers(module, "test")
    return [b for layer in layers for b in layer.blocks("weight_hh", layer.weight("weight_hh")).values()]


def holds(module, kind, scale, tolerance=1e-12):
    for b in blocks(module):
        if kind == "orthogonal":
            eye = scale**2 * torch.eye(b.shape[1], dtype=b.dtype)
            torch.testing.assert_close(b.mT @ b, eye, rtol=0, atol=tolerance)
        else:
            assert math.isclose(float(torch.linalg.matrix_norm(b.detach(), 2)), scale, rel_tol=tolerance)


def make(kind):
    options = {"num_layers": 2, "bidirectional": True} if kind in LAYERS else {}
    return kind(3, 5, **options).double()


@pytest.mark.parametrize("kind", ["orthogonal", "spectral"])
@pytest.mark.parametrize("layer", ALL)
def test_held_through_training(layer, kind):
    torch.manual_seed(0)
    module = make(layer)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    before = {id(p) for p in module.parameters()}
    assert cures.constrain_(module, kind, 0.9) is module
    assert {id(p) for p in module.parameters()} == before
    holds(module, kind, 0.9)
    start, x = [b.detach().clone() for b in blocks(module)], torch.randn(2, 3).double()
    for _ in range(15):
        optimizer.zero_grad()
        out = module(x)
        if layer not in LAYERS:
            out = module(x, out)
        out = out[0] if isinstance(out, tuple) else out
        (out - 1).square().sum().backward()
        optimizer.step()
    holds(module, kind, 0.9)
    assert all(float((a - b).detach().norm()) > 1e-3 for a, b in zip(start, blocks(module), strict=True))


@pytest.mark.parametrize("kind", ["orthogonal", "spectral"])
@pytest.mark.parametrize("layer", LAYERS)
def test_forward_uses_the_constrained_weight_and_its_gradient_arrives(layer, kind):
    module = cures.constrain_(make(layer), kind)
    plain = make(layer)
    plain.load_state_dict({k: getattr(module, k).detach() for k in plain.state_dict()})
    x = torch.randn(4, 2, 3).double()
    torch.testing.assert_close(module(x)[0], plain(x)[0])
    module(x)[0].sum().backward()
    plain(x)[0].sum().backward()
    # The chain rule through the parametrization, from the plain weight's gradient.
    original = module.parametrizations.weight_hh_l0.original
    expected = torch.autograd.grad(module.weight_hh_l0, original, plain.weight_hh_l0.grad)[0]
    torch.testing.assert_close(original.grad, expected)
    with torch.no_grad():
        original.add_(0.1 * torch.randn_like(original))
    assert float((module(x)[0] - plain(x)[0]).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("kind", ["orthogonal", "spectral"])
@pytest.mark.parametrize("layer", ALL)
def test_state_dict_deepcopy_conversion_and_removal(layer, kind):
    module, x = cures.constrain_(make(layer), kind, 0.8), torch.randn(4, 3).double()

    def run(m):
        out = m(x)
        return (out[0] if isinstance(out, tuple) else out).detach()

    y = run(module)
    module(x)  # leaves torch's cache of computed weights in place, graph and all
    other = cures.constrain_(make(layer), kind, 0.8)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(run(other), y, rtol=0, atol=0)
    twin = copy.deepcopy(module)
    torch.testing.assert_close(run(twin), y, rtol=0, atol=0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3)
    torch.testing.assert_close(run(twin), y, rtol=0, atol=0)
    again = copy.deepcopy(copy.deepcopy(twin.float()).double())
    torch.testing.assert_close(run(again), y, rtol=1e-4, atol=1e-5)
    for name in list(twin.parametrizations):
        parametrize.remove_parametrizations(again, name)
    assert type(again) is layer
    holds(again, kind, 0.8, 1e-5)


def test_starts_at_the_nearest_orthogonal_matrix():
    rnn = nn.RNN(2, 4).double()
    w = rnn.weight_hh_l0.detach().clone()
    nearest = cures.constrain_(rnn).weight_hh_l0.detach()
    for seed in range(20):
        other = cures.orthogonal_(nn.RNN(2, 4).double(), generator=torch.Generator().manual_seed(seed)).weight_hh_l0
        assert float((w - nearest).norm()) <= float((w - other).detach().norm())


def test_projected_blocks_keep_orthonormal_columns():
    lstm = cures.constrain_(nn.LSTM(3, 6, proj_size=4).double())
    with torch.no_grad():
        lstm.parametrizations.weight_hh_l0.original.normal_()
    holds(lstm, "orthogonal", 1.0)
    lstm(torch.randn(3, 2, 3).double())[0].sum().backward()


def test_orthogonal_relu_free_network_keeps_the_errors_length():
    rnn = cures.constrain_(nn.RNN(2, 5, bias=False).double(), "orthogonal", 1.0)
    h0 = torch.zeros(1, 1, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(rnn(torch.zeros(50, 1, 2).double(), h0)[0][-1, 0, 0], h0)
    assert math.isclose(float(grad.norm()), 1.0, rel_tol=1e-12)


def test_constrain_errors():
    with pytest.raises(ValueError, match=r"^kind"):
        cures.constrain_(nn.RNN(2, 3), "unitary")
    with pytest.raises(ValueError, match=r"^scale"):
        cures.constrain_(nn.RNN(2, 3), scale=0.0)
    with pytest.raises(ValueError, match="contains none"):
        cures.constrain_(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="parametrized"):
        cures.constrain_(cures.constrain_(nn.RNN(2, 3)))
    zero = nn.RNN(2, 3)
    nn.init.zeros_(zero.weight_hh_l0)
    with pytest.raises(ValueError, match="no direction"):
        cures.constrain_(zero, "spectral")
    nn.init.constant_(zero.weight_hh_l0, math.nan)
    with pytest.raises(ValueError, match="NaN"):
        cures.constrain_(zero)
