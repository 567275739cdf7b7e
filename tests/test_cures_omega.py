"""Ω is what its definition says, and its gradient is that of the definition with states and δ held."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

from unvanish import cures
from unvanish import nn as unn
from unvanish.cells import ZOO


def unrolled(cell, x, h0, error):
    """States, and δ of the full state by autograd through a loop whose steps are separate."""
    states, split = [h0], len(h0) if isinstance(h0, tuple) else 1
    for step in x:
        s = cell(step, states[-1])
        states.append(s)
    flat = [t for s in states[1:] for t in (s if split == 2 else (s,))]
    loss = sum((e * (s[0] if split == 2 else s)).sum() for e, s in zip(error, states[1:], strict=True))
    grads = torch.autograd.grad(loss, flat, allow_unused=True)
    return states, [torch.zeros_like(t) if g is None else g for g, t in zip(grads, flat, strict=True)]


def definition(cell, x, states, deltas, norms):
    """Σ_t Ω_t by autograd's own vector–Jacobian product, mean over samples."""
    B, total = x.shape[1], 0.0
    n = len(states[0]) if isinstance(states[0], tuple) else 1
    for t in range(1, len(x)):
        previous = [s.detach().requires_grad_() for s in (states[t] if n == 2 else (states[t],))]
        out = cell(x[t], tuple(previous) if n == 2 else previous[0])
        out = out if n == 2 else (out,)
        d = [v.detach() for v in deltas[t * n : t * n + n]]
        if n == 2:
            # coordinates of the full state are independent: δc without the path through h_t
            c = out[1].detach().requires_grad_()
            o = (out[0] / out[1].tanh()).detach()
            (through,) = torch.autograd.grad(o * c.tanh(), c, d[0])
            d[1] = d[1] - through
        back = torch.autograd.grad(out, previous, d, create_graph=True)
        ratio = torch.cat(back, -1).norm(dim=-1) / torch.cat(d, -1).norm(dim=-1)
        total = total + ((ratio if norms == "plain" else ratio**2) - 1).square().sum() / B
    return total


@pytest.mark.parametrize("norms", ["plain", "squared"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_value_is_the_definitions(kind, norms):
    torch.manual_seed(1)
    module, cell = kind(2, 4).double(), getattr(nn, kind.__name__ + "Cell")(2, 4).double()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in module.state_dict().items()})
    x, error = torch.randn(6, 3, 2).double(), torch.randn(6, 3, 4).double()
    zero = torch.zeros(3, 4).double()
    states, deltas = unrolled(cell, x, (zero, zero) if kind is nn.LSTM else zero, error)
    expected = definition(cell, x, states, deltas, norms)
    with cures.Omega(module, norms) as omega:
        (error * module(x)[0]).sum().backward()
    torch.testing.assert_close(omega.penalty(), expected.detach(), rtol=1e-10, atol=0, check_dtype=False)
    with cures.Omega(cell, norms) as omega:
        h = (zero, zero) if kind is nn.LSTM else zero
        loss = 0.0
        for step, e in zip(x, error, strict=True):
            h = cell(step, h)
            loss = loss + (e * (h[0] if kind is nn.LSTM else h)).sum()
        loss.backward()
    torch.testing.assert_close(omega.penalty(), expected.detach(), rtol=1e-10, atol=0, check_dtype=False)


@pytest.mark.parametrize("norms", ["plain", "squared"])
def test_gradient_of_the_rnn_is_the_finite_difference_of_the_definition(norms):
    """Ω(W) with h, φ' and δ held: Σ_t (‖Wᵀ(φ'_t ⊙ δ_t)‖ / ‖δ_t‖ − 1)²."""
    torch.manual_seed(2)
    rnn = nn.RNN(2, 3).double()
    x, error = torch.randn(5, 2, 2).double(), torch.randn(5, 2, 3).double()
    with cures.Omega(rnn, norms) as omega:
        y, _ = rnn(x)
        (error * y).sum().backward()
    rnn.zero_grad()
    omega.penalty().backward()
    w, y = rnn.weight_hh_l0.detach(), y.detach()
    deltas, d = [], torch.zeros(2, 3).double()
    for t in reversed(range(5)):
        d = error[t] + d
        deltas.insert(0, d)
        d = (d * (1 - y[t] ** 2)) @ w

    def value(m):
        total = 0.0
        for t in range(1, 5):
            ratio = ((deltas[t] * (1 - y[t] ** 2)) @ m).norm(dim=-1) / deltas[t].norm(dim=-1)
            total += float((((ratio if norms == "plain" else ratio**2) - 1) ** 2).sum()) / 2
        return total

    eps, expected = 1e-6, torch.zeros(3, 3).double()
    for i in range(3):
        for j in range(3):
            step = torch.zeros(3, 3).double()
            step[i, j] = eps
            expected[i, j] = (value(w + step) - value(w - step)) / (2 * eps)
    torch.testing.assert_close(rnn.weight_hh_l0.grad, expected, rtol=1e-7, atol=1e-8)
    assert rnn.weight_ih_l0.grad is None
    assert rnn.bias_hh_l0.grad is None


def test_orthogonal_linear_network_has_none_and_scaling_the_loss_changes_nothing():
    rnn = cures.identity_(nn.RNN(2, 4, nonlinearity="relu"))
    with torch.no_grad():
        rnn.weight_ih_l0.abs_()
    x = torch.rand(40, 3, 2)
    with cures.Omega(rnn) as omega:
        rnn(x)[0][-1].sum().backward()
    assert float(omega.penalty().detach()) < 1e-9
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 4)
    values = []
    for factor in (1.0, 1e-12, 1e12):
        with cures.Omega(lstm) as omega:
            (factor * lstm(x)[0][-1].sum()).backward()
        values.append(float(omega.penalty().detach()))
    assert math.isclose(values[0], values[1], rel_tol=1e-4)
    assert math.isclose(values[0], values[2], rel_tol=1e-4)


def test_steps_without_error_are_not_counted():
    rnn, x = nn.RNN(2, 4).double(), torch.randn(9, 3, 2).double()
    with cures.Omega(rnn) as whole:
        rnn(x)[0][4].sum().backward()
    with cures.Omega(rnn) as part:
        rnn(x[:5])[0][4].sum().backward()
    torch.testing.assert_close(whole.penalty(), part.penalty())


def test_packed_bidirectional_layers_are_the_samples_apart():
    torch.manual_seed(3)
    gru = nn.GRU(2, 3, num_layers=2, bidirectional=True).double()
    x, lengths = torch.randn(7, 3, 2).double(), [4, 7, 2]
    with cures.Omega(gru) as together:
        y, h = gru(pack_padded_sequence(x, lengths, enforce_sorted=False))
        (y.data.sum() + h.sin().sum()).backward()
    total = 0.0
    for b, n in enumerate(lengths):
        with cures.Omega(gru) as alone:
            y, h = gru(x[:n, b : b + 1])
            (y.sum() + h.sin().sum()).backward()
        total += float(alone.penalty().detach()) / 3
    assert math.isclose(float(together.penalty().detach()), total, rel_tol=1e-10)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_lengths_count_as_packing_does(kind):
    torch.manual_seed(3)
    layer = getattr(unn, kind)(2, 3, bidirectional=True).double()
    x, lengths = torch.randn(7, 3, 2).double(), torch.tensor([4, 7, 2])
    x[6, 0] = math.nan
    found = []
    for packed in (True, False):
        with cures.Omega(layer) as omega:
            if packed:
                y, final = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
                y = y.data
            else:
                y, final = layer(x, lengths=lengths)
            (y.sum() + (final[0] if kind == "LSTM" else final).sin().sum()).backward()
        found.append(float(omega.penalty().detach()))
    assert math.isclose(*found, rel_tol=1e-12)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "RNNCell", "LSTMCell"])
def test_under_autocast_it_is_that_of_the_weights_own_dtype(kind):
    torch.manual_seed(0)
    layer, x = getattr(nn, kind)(2, 3), torch.randn(6, 3, 2)

    def penalty(x):
        with cures.Omega(layer) as omega:
            if kind.endswith("Cell"):
                h = None
                for row in x:
                    h = layer(row, h)
                h = h[0] if isinstance(h, tuple) else h
            else:
                h = layer(x)[0][-1]
            h.float().sum().backward()
        return float(omega.penalty().detach())

    right = penalty(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert math.isclose(penalty(x), right, rel_tol=2e-2)
        assert math.isclose(penalty(x.bfloat16()), right, rel_tol=2e-2)


@pytest.mark.parametrize("kind", [nn.RNN, nn.RNNCell])
def test_weights_of_the_pass_are_read_and_left_alone(kind):
    torch.manual_seed(0)
    layer = kind(2, 3).double()
    parametrizations.spectral_norm(layer, "weight_hh" if kind is nn.RNNCell else "weight_hh_l0")
    x, h = torch.randn(5, 2, 2).double(), None
    with cures.Omega(layer) as omega:
        for row in x if kind is nn.RNNCell else ():
            h = layer(row, h)
        (layer(x)[0] if h is None else h).sum().backward()
    before = [v.clone() for v in layer.state_dict().values()]
    omega.penalty().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, layer.state_dict().values(), strict=True))


def test_dropout_between_layers_is_drawn_again_as_it_was():
    torch.manual_seed(4)
    rnn = nn.RNN(2, 8, num_layers=2, dropout=0.5).double()
    x = torch.randn(6, 2, 2).double()
    state = torch.get_rng_state()
    with cures.Omega(rnn) as omega:
        y, _ = rnn(x)
        y.sum().backward()
    after = torch.get_rng_state()
    value = float(omega.penalty().detach())
    assert torch.equal(after, torch.get_rng_state())
    # By hand: two layers with the same mask between.
    lower, upper = nn.RNN(2, 8).double(), nn.RNN(8, 8).double()
    lower.load_state_dict({k: v for k, v in rnn.state_dict().items() if "l0" in k})
    upper.load_state_dict({k.replace("l1", "l0"): v for k, v in rnn.state_dict().items() if "l1" in k})
    torch.set_rng_state(state)
    with cures.Omega(nn.ModuleList([lower, upper])) as apart:
        y2, _ = upper(nn.functional.dropout(lower(x)[0], 0.5))
        y2.sum().backward()
    torch.testing.assert_close(y2, y)
    assert math.isclose(value, float(apart.penalty().detach()), rel_tol=1e-10)


def test_a_penalised_network_gets_gentler():
    torch.manual_seed(5)
    rnn = cures.spectral_radius_(nn.RNN(2, 8), 0.3)
    optimizer = torch.optim.Adam(rnn.parameters(), 1e-2)
    x, values = torch.randn(20, 4, 2), []
    for _ in range(60):
        optimizer.zero_grad()
        with cures.Omega(rnn) as omega:
            rnn(x)[0][-1].sum().backward()
        rnn.zero_grad()
        penalty = omega.penalty()
        penalty.backward()
        optimizer.step()
        values.append(float(penalty.detach()))
    assert values[-1] < 0.3 * values[0]


def test_a_constrained_matrix_gets_its_gradient_through_the_constraint():
    torch.manual_seed(6)
    rnn = cures.constrain_(nn.RNN(2, 3).double(), scale=0.5)
    plain = nn.RNN(2, 3).double()
    plain.load_state_dict({k: getattr(rnn, k).detach() for k in plain.state_dict()})
    x = torch.randn(5, 2, 2).double()
    for module in (rnn, plain):
        with cures.Omega(module) as omega:
            module(x)[0].sum().backward()
        module.zero_grad()
        omega.penalty().backward()
    original = rnn.parametrizations.weight_hh_l0.original
    expected = torch.autograd.grad(rnn.weight_hh_l0, original, plain.weight_hh_l0.grad)[0]
    torch.testing.assert_close(original.grad, expected)


def test_omega_errors():
    rnn = nn.RNN(2, 3)
    with pytest.raises(ValueError, match=r"^norms"):
        cures.Omega(rnn, "huge")
    with pytest.raises(TypeError, match="a indrnn: it has no recurrent matrix"):
        cures.Omega(nn.ModuleList([rnn, unn.Recurrent(ZOO["indrnn"](), 2, 3)]))
    with cures.Omega(rnn) as omega:
        rnn(torch.zeros(3, 1, 2))
    with pytest.raises(RuntimeError, match="no gradient reached"):
        omega.penalty()
    assert not rnn._forward_hooks
    assert not rnn._forward_pre_hooks
