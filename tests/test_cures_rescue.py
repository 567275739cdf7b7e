"""Survival is the derivative's Frobenius norm; rescue reaches its target with the smallest change of the biases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import unvanish as uv
from unvanish.cells import ZOO
from unvanish.cures import chrono_, rescue, rescue_
from unvanish.cures.bias_shift import kept, minimum_norm_shift
from unvanish.flow import survival
from unvanish.flow.survival import windows


def carry_bias(layer, suffix="l0"):
    H = layer.hidden_size
    return getattr(layer, f"bias_ih_{suffix}").detach()[H : 2 * H]


def uniform_shift(layer, x, lag, target, **where):
    """The 2-norm of the smallest shift common to all units that reaches the target."""
    bias, start = carry_bias(layer), carry_bias(layer).clone()
    low, high = 0.0, 40.0
    for _ in range(40):
        middle = (low + high) / 2
        bias.copy_(start + middle)
        low, high = (middle, high) if survival(layer, x, lag=lag, **where) < target else (low, middle)
    bias.copy_(start)
    return high * math.sqrt(len(bias))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_exact_survival_is_autograds(kind, reverse):
    torch.manual_seed(0)
    layer = kind(2, 3, bidirectional=reverse).double()
    T, lag = 6, 4
    x = torch.randn(T, 2, 2).double()
    rows = slice(1, 2) if reverse else slice(0, 1)
    D = 2 if reverse else 1
    x1 = x[lag:] if reverse else x[: T - lag]
    x2 = x[:lag] if reverse else x[T - lag :]
    _, state = layer(x1)
    state = tuple(s.detach() for s in state) if kind is nn.LSTM else (state.detach(),)
    leaf = state[-1][rows].clone().requires_grad_()
    full = torch.cat([torch.zeros_like(leaf), leaf]) if D == 2 else leaf
    given = (state[0], full) if kind is nn.LSTM else full
    _, final = layer(x2, given)
    end = (final[1] if kind is nn.LSTM else final)[rows]
    total = sum(
        float(torch.autograd.grad(end[0, b, u], leaf, retain_graph=True)[0].square().sum())
        for b in range(2)
        for u in range(3)
    )
    at = "l0.reverse" if reverse else "l0"
    assert math.isclose(survival(layer, x, lag=lag, paths="exact", at=at), math.sqrt(total / 6), rel_tol=1e-10)


def test_without_recurrent_weights_carry_and_exact_agree():
    lstm = nn.LSTM(2, 4).double()
    nn.init.zeros_(lstm.weight_hh_l0)
    x = torch.randn(30, 3, 2).double()
    assert math.isclose(survival(lstm, x, lag=20), survival(lstm, x, lag=20, paths="exact"), rel_tol=1e-10)


def test_survival_of_packed_samples_counts_their_own_last_steps():
    lstm = nn.LSTM(2, 4, bidirectional=True).double()
    x, lengths = torch.randn(9, 3, 2).double(), [6, 9, 5]
    for at in ("l0", "l0.reverse"):
        for paths in ("carry", "exact"):
            packed = survival(lstm, pack_padded_sequence(x, lengths, enforce_sorted=False), lag=5, paths=paths, at=at)
            alone = [survival(lstm, x[:n, b : b + 1], lag=5, paths=paths, at=at) ** 2 for b, n in enumerate(lengths)]
            assert math.isclose(packed, math.sqrt(sum(alone) / 3), rel_tol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "H", "T", "lag", "target", "prepare"),
    [
        (nn.LSTM, 16, 60, 50, 0.5, None),
        (nn.LSTM, 32, 500, 500, 0.5, None),
        (nn.LSTM, 24, 100, 90, 0.95, None),
        (nn.LSTM, 16, 40, 3, 0.5, None),
        (nn.LSTM, 16, 150, 120, 0.3, lambda m: chrono_(m, 60)),
        (nn.LSTM, 16, 80, 70, 0.5, lambda m: uv.cures.spectral_radius_(m, 1.5)),
        (nn.LSTM, 16, 80, 70, 0.5, lambda m: uv.cures.forget_bias_(m, -3.0)),
        (nn.GRU, 16, 60, 50, 0.5, None),
        (nn.LSTM, 1, 30, 30, 0.5, None),
    ],
)
def test_target_is_reached_and_no_uniform_shift_is_smaller(kind, H, T, lag, target, prepare, dtype):
    torch.manual_seed(0)
    layer, x = kind(4, H).to(dtype), torch.randn(T, 4, 4).to(dtype)
    if prepare is not None:
        prepare(layer)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    uniform = uniform_shift(layer, x, lag, target)
    assert rescue_(layer, x, lag, target) is layer
    assert math.isclose(survival(layer, x, lag=lag), target, rel_tol=0.01)
    assert float((carry_bias(layer) - before["bias_ih_l0"][H : 2 * H]).norm()) <= uniform * (1 + 1e-3)
    for name, value in layer.state_dict().items():
        if name == "bias_ih_l0":
            value = torch.cat([value[:H], value[2 * H :]])
            before[name] = torch.cat([before[name][:H], before[name][2 * H :]])
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(("seed", "target"), [(4, 0.02), (3, 0.1)])
def test_solutions_that_take_turns_come_to_rest(seed, target):
    torch.manual_seed(seed)
    lstm, x = nn.LSTM(4, 16), torch.randn(60, 8, 4)
    uniform, before = uniform_shift(lstm, x, 20, target), carry_bias(lstm).clone()
    rescue_(lstm, x, 20, target)
    assert survival(lstm, x, lag=20) == pytest.approx(target, rel=0.01)
    assert float((carry_bias(lstm) - before).norm()) < uniform


def test_no_change_nearby_is_smaller():
    """Every other change on the constraint, found by tangent steps that are driven back to it, is longer."""
    torch.manual_seed(1)
    lstm, x = nn.LSTM(3, 12).double(), torch.randn(60, 4, 3).double()
    start = carry_bias(lstm).clone()
    rescue_(lstm, x, 50, 0.5)
    best = carry_bias(lstm) - start
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        direction = best + 0.1 * best.norm() / 12**0.5 * torch.randn(12, generator=generator, dtype=torch.float64)
        low, high = 0.0, 3.0
        for _ in range(30):
            middle = (low + high) / 2
            carry_bias(lstm).copy_(start + middle * direction)
            low, high = (middle, high) if survival(lstm, x, lag=50) < 0.5 else (low, middle)
        assert float((high * direction).norm()) > float(best.norm()) * (1 - 2e-3)


@given(seed=st.integers(0, 10**6), steps=st.integers(1, 200), target=st.floats(0.05, 0.97), spread=st.floats(0.0, 2.0))
@settings(max_examples=25)
def test_separable_problem_is_solved(seed, steps, target, spread):
    generator = torch.Generator().manual_seed(seed)
    units = spread * torch.randn(6, generator=generator, dtype=torch.float64)
    a = units - 1.5 + 0.5 * torch.randn(steps, 2, 6, generator=generator, dtype=torch.float64)
    if float(kept(a, 1.0, torch.zeros(6).double())[0].mean()) >= target**2:
        return
    beta = minimum_norm_shift(a, 1.0, target)
    s, slope, _ = kept(a, 1.0, beta)
    assert math.isclose(float(s.mean()), target**2, rel_tol=1e-6)
    # One multiplier for all units, where Newton's method found the optimum: β = μ s'(β).
    mu = float(beta @ slope / (slope @ slope))
    stationary = float((beta - mu * slope).norm() / beta.norm()) < 1e-6
    low, high = 0.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        too_low = float(kept(a, 1.0, torch.full((6,), middle).double())[0].mean()) < target**2
        low, high = (middle, high) if too_low else (low, middle)
    assert float(beta.norm()) <= high * math.sqrt(6) * (1 + 1e-6)
    assert stationary or float(beta.norm()) < high * math.sqrt(6)


def test_few_units_solved_as_well_as_by_search():
    """Two units: walk the whole constraint curve."""
    a = torch.tensor([[[0.5, -0.7]]], dtype=torch.float64).expand(1, 1, 2)
    beta = minimum_norm_shift(a, 30.0, 0.6)
    found = math.inf
    for b0 in torch.linspace(0, 9, 600, dtype=torch.float64):
        lacking = 2 * 0.36 - float(kept(a, 30.0, torch.stack([b0, b0]))[0][0])
        low, high = 0.0, 12.0
        if not lacking < 1 - 1e-9:
            continue
        for _ in range(50):
            middle = (low + high) / 2
            s1 = float(kept(a, 30.0, torch.tensor([0.0, middle]).double())[0][1])
            low, high = (middle, high) if s1 < lacking else (low, middle)
        found = min(found, math.hypot(float(b0), high))
    assert float(beta.norm()) <= found * (1 + 1e-4)


@pytest.mark.parametrize(("lag", "target"), [(5, 0.6), (5, 0.9), (20, 0.5)])
@pytest.mark.parametrize("name", [name for name, cell in ZOO.items() if cell().carry_gate is not None])
def test_every_cell_with_a_carry_gate_is_rescued(name, lag, target):
    """Also where the carry is more than the gate: peepholes let it read the memory that it carries."""
    torch.manual_seed(6)
    layer, x = uv.nn.Recurrent(ZOO[name](), 5, 7), torch.randn(22, 3, 5)
    if name == "peephole":
        with torch.no_grad():
            layer.w_f_l0.copy_(torch.linspace(-1, 1, 7))
    rescue_(layer, x, lag, target)
    assert math.isclose(survival(layer, x, lag=lag), target, rel_tol=2e-3)


def test_every_layer_and_direction_is_rescued():
    torch.manual_seed(2)
    lstm = nn.LSTM(3, 8, num_layers=2, bidirectional=True, batch_first=True)
    x = pack_padded_sequence(torch.randn(3, 40, 3), [40, 30, 35], batch_first=True, enforce_sorted=False)
    rescue_(lstm, x, 25, 0.4)
    for at in ("l0", "l0.reverse", "l1", "l1.reverse"):
        assert math.isclose(survival(lstm, x, lag=25, at=at), 0.4, rel_tol=0.01)


def test_measuring_leaves_a_parametrised_layer_alone():
    lstm = nn.utils.parametrizations.spectral_norm(nn.LSTM(2, 4), "weight_hh_l0")
    before = [v.clone() for v in lstm.state_dict().values()]
    survival(lstm, torch.randn(10, 2, 2), lag=5)
    assert all(torch.equal(a, b) for a, b in zip(before, lstm.state_dict().values(), strict=True))


def test_a_rescue_that_is_interrupted_leaves_the_biases_as_they_were(monkeypatch):
    lstm, calls = nn.LSTM(2, 4), []
    before = lstm.bias_ih_l0.clone()

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return windows(*args)

    monkeypatch.setattr(rescue, "windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rescue_(lstm, torch.randn(30, 2, 2), 20, 0.9)
    assert torch.equal(lstm.bias_ih_l0, before)


def test_what_survives_is_left_alone():
    lstm, x = uv.cures.forget_bias_(nn.LSTM(2, 4), 12.0), torch.randn(20, 2, 2)
    before = lstm.bias_ih_l0.clone()
    rescue_(lstm, x, 10, 0.5)
    assert torch.equal(lstm.bias_ih_l0, before)


def test_a_record_predicts_where_gates_are_constant():
    torch.manual_seed(3)
    model = nn.ModuleDict({"lstm": nn.LSTM(2, 6).double()})
    lstm, x = model["lstm"], torch.zeros(8, 2, 2).double()
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    with uv.watch(model) as flow:
        lstm(x)[0].sum().backward()
    rescue_(lstm, flow, lag=500, target=0.5)
    assert math.isclose(survival(lstm, torch.zeros(500, 1, 2).double(), lag=500), 0.5, rel_tol=1e-6)
    with pytest.raises(ValueError, match=r"expected a record with one gru layer 'l0', found 0"):
        rescue_(nn.GRU(2, 6), flow, lag=5)
    with pytest.raises(ValueError, match=r"log_carry \[5\]"):
        rescue_(nn.LSTM(2, 5), flow["lstm.l0"], lag=5)


def test_rescue_errors():
    lstm, x = nn.LSTM(2, 4), torch.randn(10, 2, 2)
    for target in (0.0, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"^target"):
            rescue_(lstm, x, 5, target)
    for lag in (0, 11, 2.5):
        with pytest.raises(ValueError, match=r"^lag"):
            rescue_(lstm, x, lag)
    with pytest.raises(TypeError, match=r"^lstm"):
        rescue_(nn.RNN(2, 4), x, 5)
    with pytest.raises(TypeError, match=r"^x"):
        rescue_(lstm, "flow", 5)
    with pytest.raises(ValueError, match="bias=False"):
        rescue_(nn.LSTM(2, 4, bias=False), x, 5)
    with pytest.raises(ValueError, match=r"^at"):
        survival(lstm, x, lag=5, at="l3")
    with pytest.raises(ValueError, match=r"^paths"):
        survival(lstm, x, lag=5, paths="all")
    with pytest.raises(ValueError, match=r"^x: expected 2 features"):
        survival(lstm, torch.zeros(9, 1, 3), lag=5)
    with pytest.raises(ValueError, match="x: expected one sample at least"):
        survival(lstm, x[:, :0], lag=5)
    hole = torch.where(torch.arange(10)[:, None, None] == 7, math.nan, x)
    for call in (survival, rescue_):
        with pytest.raises(ValueError, match="x: expected finite numbers"):
            call(lstm, hole, lag=5)
    bad = nn.LSTM(2, 4)
    nn.init.constant_(bad.weight_ih_l0, math.nan)
    with pytest.raises(ValueError, match="NaN"):
        rescue_(bad, x, 5)
