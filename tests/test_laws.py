"""Closed forms that the flow must reproduce: no comparison with another implementation, only with the mathematics."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unvanish as uv


def last_step_flow(layer: nn.RNNBase, x: Tensor) -> uv.flow.LayerFlow:
    """The flow of a random error at the last step's h alone."""
    with uv.watch(layer) as flow:
        y, _ = layer(x)
        (y[-1] * torch.randn_like(y[-1])).sum().backward()
    return flow["l0"]


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_orthogonal_recurrence_scales_the_error_by_s_per_step(scale: float, nonlinearity: str) -> None:
    torch.manual_seed(0)
    T, H = 40, 6
    rnn = nn.RNN(2, H, nonlinearity=nonlinearity, dtype=torch.float64)
    with torch.no_grad():
        q, _ = torch.linalg.qr(torch.randn(H, H, dtype=torch.float64))
        for p in rnn.parameters():
            p.zero_()
        rnn.weight_hh_l0.copy_(scale * q)
        if nonlinearity == "relu":
            # A permutation keeps a positive state positive, where relu is the identity.
            rnn.weight_hh_l0.copy_(scale * torch.eye(H, dtype=torch.float64)[torch.randperm(H)])
            rnn.bias_ih_l0.fill_(1.0)
    dh = last_step_flow(rnn, torch.zeros(T, 3, 2, dtype=torch.float64)).dh
    expected = scale ** torch.arange(T - 1, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(dh / dh[-1], expected[:, None].expand_as(dh), rtol=1e-10, atol=0)


def test_without_recurrent_weights_the_cell_state_decays_by_the_product_of_forget_gates() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 1, dtype=torch.float64)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    x = torch.randn(12, 4, 3, dtype=torch.float64)
    record = last_step_flow(lstm, x)
    gates = x @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
    f = gates[..., 1].sigmoid()
    product = torch.cat([f.flip(0)[:-1].cumprod(0).flip(0), torch.ones(1, 4, dtype=torch.float64)])
    assert record.dc is not None
    torch.testing.assert_close(record.dc / record.dc[-1], product, rtol=1e-12, atol=0)
    torch.testing.assert_close(record.log_carry, f.log().mean().reshape(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("bias", "kept"), [(0.0, 9.5e-7), (1.0, 1.9e-3), (2.0, 7.9e-2)])
def test_twenty_steps_through_a_forget_gate(bias: float, kept: float) -> None:
    lstm = nn.LSTM(1, 2, dtype=torch.float64)
    with torch.no_grad():
        for p in lstm.parameters():
            p.zero_()
    uv.cures.forget_bias_(lstm, bias)
    dc = last_step_flow(lstm, torch.zeros(21, 1, 1, dtype=torch.float64)).dc
    assert dc is not None
    assert float(dc[0] / dc[-1]) == pytest.approx(kept, rel=0.02)
    assert float(dc[0] / dc[-1]) == pytest.approx((1 / (1 + math.exp(-bias))) ** 20, rel=1e-12)


@pytest.mark.parametrize(("family", "cell"), [(nn.GRU, torch.gru_cell), (nn.RNN, torch.rnn_tanh_cell)])
def test_subgradients_and_their_partial_sums_are_those_of_the_weights(family: Any, cell: Any) -> None:
    torch.manual_seed(0)
    rnn, x = family(2, 3, bias=False, dtype=torch.float64), torch.randn(6, 4, 2, dtype=torch.float64)
    with uv.watch(rnn, partial=True) as flow:
        rnn(x)[0].square().sum().backward()
    record = flow["l0"]
    weights = [rnn.weight_ih_l0.expand(6, -1, -1), rnn.weight_hh_l0.expand(6, -1, -1)]
    unshared = [w.detach().clone().requires_grad_() for w in weights]
    h, total = torch.zeros(4, 3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in range(6):
        h = cell(x[t], h, unshared[0][t], unshared[1][t])
        total = total + h.square().sum()
    g = torch.cat([v.flatten(1) for v in torch.autograd.grad(total, unshared)], dim=1)
    torch.testing.assert_close(record.dweight, g.norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(record.partial, g.flip(0).cumsum(0).flip(0).norm(dim=1), rtol=1e-12, atol=0)


def test_norms_survive_where_float32_squares_underflow() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(1, 4)
    with torch.no_grad():
        for p in rnn.parameters():
            p.zero_()
        rnn.weight_hh_l0.copy_(0.5 * torch.linalg.qr(torch.randn(4, 4))[0])
    record = last_step_flow(rnn, torch.zeros(111, 2, 1))
    kept = float(record.dh[0, 0] / record.dh[-1, 0])
    assert kept == pytest.approx(0.5**110, rel=1e-3)
    assert kept**2 < torch.finfo(torch.float32).smallest_normal


def test_reach_and_half_life_of_a_known_decay() -> None:
    decay = uv.flow.decay(torch.arange(100) * math.log(0.5) + 123.0, fraction=0.01)
    assert decay.rate == pytest.approx(math.log(0.5))
    assert decay.half_life == pytest.approx(1.0)
    assert decay.reach == 6
    flat = uv.flow.decay(torch.zeros(10))
    assert (flat.rate, flat.half_life, flat.reach) == (0.0, None, 9)
    dead = uv.flow.decay(torch.tensor([0.0] + [-math.inf] * 5))
    assert (dead.rate, dead.half_life, dead.reach) == (-math.inf, 0.0, 0)
    with pytest.raises(ValueError, match="finite value at lag 0"):
        uv.flow.decay(torch.full((3,), -math.inf))


@pytest.mark.parametrize("tau", [2.0, 10.0, 784.0])
def test_a_chrono_bias_forgets_by_one_over_e_in_about_tau_steps(tau: float) -> None:
    lstm, T = nn.LSTM(1, 1, dtype=torch.float64), math.ceil(tau) + 1
    with torch.no_grad():
        for p in lstm.parameters():
            p.zero_()
        lstm.bias_ih_l0[1] = math.log(tau - 1)  # b_f
    log_norms = uv.flow.adjoint_map(lstm, torch.zeros(T, 1, 1, dtype=torch.float64), sources=[T - 1]).over_lag(0)
    rate = (log_norms[-1, 0] - log_norms[0, 0]) / (T - 1)
    assert float(rate) == pytest.approx(math.log(1 - 1 / tau), rel=1e-10)
    # −1/ln(1 − 1/τ) = τ − 1/2 − 1/12τ − …
    assert -1 / float(rate) == pytest.approx(tau - 0.5, abs=1 / (6 * tau))
    stats = uv.flow.gate_statistics(lstm, torch.zeros(T, 1, 1, dtype=torch.float64))
    assert float(stats.time_constant) == pytest.approx(-1 / float(rate), rel=1e-10)
