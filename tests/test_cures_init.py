"""Initialising cures, each held to its law."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from unvanish import cures
from unvanish.cures.layer_weights import recurrent_layers

KINDS = [nn.RNN, nn.LSTM, nn.GRU]
CELLS = [nn.RNNCell, nn.LSTMCell, nn.GRUCell]
GATED = [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell]
CARRY_ROWS = {nn.LSTM: 1, nn.LSTMCell: 1, nn.GRU: 1, nn.GRUCell: 1}
"""f is the LSTM's second gate, z the GRU's"""


def biases(module):
    return [layer.weight("bias_ih") + layer.weight("bias_hh") for layer in recurrent_layers(module, "test")]


def big(kind, **options):
    return kind(3, 8, num_layers=2, bidirectional=True, **options)


def make(kind):
    return kind(3, 8) if kind in CELLS else big(kind)


@pytest.mark.parametrize("kind", GATED)
def test_forget_bias_sets_the_sum_and_only_the_carry_gate(kind):
    module = make(kind)
    before = [b.clone() for b in biases(module)]
    assert cures.forget_bias_(module, 1.5) is module
    for old, new in zip(before, biases(module), strict=True):
        carry = CARRY_ROWS[kind]
        for gate, (was, now) in enumerate(zip(old.split(8), new.split(8), strict=True)):
            assert torch.equal(now, torch.full_like(now, 1.5) if gate == carry else was)


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0])
def test_forget_bias_survival_over_20_steps_without_input(value):
    lstm = cures.forget_bias_(nn.LSTM(1, 4).double(), value)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    c0 = torch.ones(1, 1, 4, dtype=torch.float64, requires_grad=True)
    _, (_, c) = lstm(torch.zeros(20, 1, 1, dtype=torch.float64), (torch.zeros(1, 1, 4).double(), c0))
    (grad,) = torch.autograd.grad(c.sum(), c0)
    assert torch.allclose(grad, torch.full_like(grad, (1 / (1 + math.exp(-value))) ** 20), rtol=1e-12)


@given(max_lag=st.floats(2.0, 1e5), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_chrono_time_constants_lie_in_the_lags(max_lag, seed):
    lstm = cures.chrono_(nn.LSTM(2, 16).double(), max_lag, torch.Generator().manual_seed(seed))
    b_i, b_f, _, _ = biases(lstm)[0].chunk(4)
    tau = 1 / (1 - b_f.sigmoid())
    assert torch.equal(b_i, -b_f)
    assert bool((tau >= 2 - 1e-9).all())
    assert bool((tau <= max_lag * (1 + 1e-9)).all())
    # f = 1 − 1/τ with τ − 1 the uniform draw
    u = torch.empty(16, dtype=torch.float64).uniform_(1, max_lag - 1, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(tau, 1 + u, rtol=1e-9, atol=0)


def test_chrono_on_a_gru_gives_both_coefficients_of_the_leaky_unit():
    seed = torch.Generator
    gru = cures.chrono_(nn.GRU(2, 64).double(), 300, seed().manual_seed(1))
    lstm = cures.chrono_(nn.LSTM(2, 64).double(), 300, seed().manual_seed(1))
    b_i, b_f, _, _ = biases(lstm)[0].chunk(4)
    z = biases(gru)[0].chunk(3)[1].sigmoid()
    torch.testing.assert_close(z, b_f.sigmoid())
    torch.testing.assert_close(1 - z, b_i.sigmoid())


def test_chrono_draw_is_the_generators_alone_and_uniform():
    state = torch.get_rng_state()
    lstm = nn.LSTM(2, 4000).double()
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    cures.chrono_(lstm, 101, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())
    tau = 1 / (1 - biases(lstm)[0].chunk(4)[1].sigmoid())
    assert abs(float(tau.detach().mean()) - 51.5) < 2


@pytest.mark.parametrize("kind", GATED)
def test_uniform_gates_spread_the_carries_over_the_whole_range(kind):
    seed = torch.Generator
    module = kind(2, 4000).double()
    before = biases(module)[0].clone()
    assert cures.uniform_gate_(module, seed().manual_seed(5)) is module
    gates, old = biases(module)[0].detach().split(4000), before.detach().split(4000)
    f = gates[CARRY_ROWS[kind]].sigmoid()
    u = torch.empty(4000, dtype=torch.float64).uniform_(1 / 4000, 1 - 1 / 4000, generator=seed().manual_seed(5))
    torch.testing.assert_close(f, u, rtol=1e-9, atol=0)
    # The Kolmogorov–Smirnov distance of 4000 draws from the uniform law is above 0.04 with probability 5e-6.
    assert float((f.sort().values - torch.arange(1, 4001) / 4000).abs().max()) < 0.04
    assert float(f.min()) >= 1 / 4000
    written = {CARRY_ROWS[kind]}
    if kind in (nn.LSTM, nn.LSTMCell):
        assert torch.equal(gates[0], -gates[1])
        written.add(0)
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(gates, old, strict=True)) if i not in written)


def test_uniform_gates_need_more_than_one_unit_and_change_nothing_before_they_know():
    model = Holder(nn.LSTM(2, 4), nn.GRU(4, 1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="at least 2 units"):
        cures.uniform_gate_(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS + CELLS)
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_orthogonal_per_gate_block(kind, gain):
    module = make(kind).double()
    others = {n: p.clone() for n, p in module.named_parameters() if "weight_hh" not in n}
    assert cures.orthogonal_(module, gain) is module
    for layer in recurrent_layers(module, "test"):
        for block in layer.blocks("weight_hh", layer.weight("weight_hh")).values():
            torch.testing.assert_close(block.mT @ block, gain**2 * torch.eye(8).double(), rtol=0, atol=1e-13)
    assert all(torch.equal(dict(module.named_parameters())[n], p) for n, p in others.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_orthogonal_in_any_dtype_and_reproducible(dtype):
    a, b = (cures.orthogonal_(nn.GRU(2, 4, dtype=dtype), generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(a.weight_hh_l0, b.weight_hh_l0)
    block = a.weight_hh_l0[:4].double()
    torch.testing.assert_close(block.mT @ block, torch.eye(4).double(), rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_orthogonal_draws_every_sign_alike():
    drawn = [cures.orthogonal_(nn.RNN(1, 1), generator=torch.Generator().manual_seed(s)) for s in range(40)]
    positive = sum(float(rnn.weight_hh_l0) > 0 for rnn in drawn)
    assert 10 <= positive <= 30


def test_orthogonal_of_a_projected_lstm_has_orthonormal_columns():
    lstm = cures.orthogonal_(nn.LSTM(3, 8, proj_size=5).double())
    for block in lstm.weight_hh_l0.chunk(4):
        torch.testing.assert_close(block.mT @ block, torch.eye(5).double(), rtol=0, atol=1e-13)


def test_orthogonal_keeps_the_errors_length():
    rnn = cures.orthogonal_(nn.RNN(2, 8, nonlinearity="tanh").double(), 0.9)
    h0 = torch.zeros(1, 1, 8, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        rnn.bias_ih_l0.zero_(), rnn.bias_hh_l0.zero_()
    y, _ = rnn(torch.zeros(30, 1, 2).double(), h0)
    (grad,) = torch.autograd.grad(y[-1, 0, 0], h0)
    assert math.isclose(float(grad.norm()), 0.9**30, rel_tol=1e-12)


@pytest.mark.parametrize("kind", [nn.RNN, nn.RNNCell])
def test_identity_copies_the_state(kind):
    rnn = cures.identity_(kind(2, 4, nonlinearity="relu"), 1.0)
    h = torch.rand(1, 4)
    x = torch.zeros(1, 2)
    out = rnn(x, h)[0] if kind is nn.RNN else rnn(x, h)
    assert torch.equal(out.reshape(-1), h.reshape(-1))


@given(radius=st.floats(1e-3, 10.0), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_spectral_radius_is_exact(radius, seed):
    torch.manual_seed(seed)
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        module = cures.spectral_radius_(kind(3, 6, bidirectional=True).double(), radius)
        for layer in recurrent_layers(module, "test"):
            for block in layer.blocks("weight_hh", layer.weight("weight_hh")).values():
                assert math.isclose(float(torch.linalg.eigvals(block.detach()).abs().max()), radius, rel_tol=1e-9)


def test_spectral_radius_of_a_projected_lstm_goes_through_the_projection():
    lstm = cures.spectral_radius_(nn.LSTM(3, 8, proj_size=5).double(), 0.7)
    for block in lstm.weight_hh_l0.chunk(4):
        assert math.isclose(
            float(torch.linalg.eigvals(block @ lstm.weight_hr_l0).abs().max().detach()), 0.7, rel_tol=1e-9
        )


class Holder(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.head = nn.Linear(4, 1)
        self.parts = nn.ModuleList(parts)


def test_acts_on_every_recurrent_module_inside_and_survives_a_state_dict():
    model = Holder(nn.LSTM(2, 4), nn.GRUCell(4, 4))
    cures.forget_bias_(model, 3.0)
    other = Holder(nn.LSTM(2, 4), nn.GRUCell(4, 4))
    other.load_state_dict(copy.deepcopy(model).state_dict())
    for part in other.parts:
        assert torch.equal(biases(part)[0].split(4)[1], torch.full((4,), 3.0))


ALL = [
    cures.forget_bias_,
    lambda m: cures.chrono_(m, 10),
    cures.uniform_gate_,
    cures.orthogonal_,
    cures.identity_,
    cures.spectral_radius_,
]


@pytest.mark.parametrize("cure", ALL)
def test_no_recurrence_is_an_error(cure):
    with pytest.raises(ValueError, match="contains none"):
        cure(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        cure("lstm")


@pytest.mark.parametrize("cure", ALL[:3])
def test_a_carry_bias_does_not_fit_a_plain_rnn_and_nothing_is_half_done(cure):
    model = Holder(nn.LSTM(2, 4), nn.RNN(4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"parts\.1_l0.*rnn_tanh.*no gate that alone carries its state"):
        cure(model)
    with pytest.raises(ValueError, match=r"parts\.1_l0.*bias=False"):
        cure(Holder(nn.LSTM(2, 4), nn.GRU(4, 4, bias=False)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_identity_does_not_fit_gates():
    with pytest.raises(TypeError, match=r"identity_ does not fit.*LSTM"):
        cures.identity_(nn.LSTM(2, 4))
    cures.identity_(nn.RNN(2, 4, bias=False))


@pytest.mark.parametrize("cure", [cures.orthogonal_, cures.spectral_radius_, cures.identity_])
def test_a_parametrized_matrix_is_refused(cure):
    cell = parametrizations.orthogonal(nn.RNNCell(2, 4), "weight_hh")
    with pytest.raises(ValueError, match="parametrized"):
        cure(cell)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: cures.forget_bias_(m, math.nan), "value"),
        (lambda m: cures.chrono_(m, 1), "max_lag"),
        (lambda m: cures.chrono_(m, math.inf), "max_lag"),
        (lambda m: cures.orthogonal_(m, 0.0), "gain"),
        (lambda m: cures.spectral_radius_(m, -1.0), "radius"),
    ],
)
def test_bad_numbers_name_the_argument(call, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call(nn.LSTM(2, 4))
    with pytest.raises(TypeError, match=r"^value: expected a number, got str"):
        cures.forget_bias_(nn.LSTM(2, 4), "1")


def test_spectral_radius_of_a_zero_matrix_is_refused():
    rnn = nn.RNN(2, 4)
    with torch.no_grad():
        rnn.weight_hh_l0.zero_()
    with pytest.raises(ValueError, match="spectral radius 0"):
        cures.spectral_radius_(rnn)
