"""Errors carried back over any number of decades: by both ways of computing a map, in rounds, under every layout."""

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unvanish as uv
from tests.strategies import ModuleCase, module_cases
from tests.test_adjoint_map import outputs
from unvanish import engine
from unvanish.cells import ZOO
from unvanish.flow import kernel_rows
from unvanish.flow.descent import arriving_at, flow_at
from unvanish.flow.exponents import Rows, log_norms, times_power_of_two
from unvanish.flow.scaled_rows import backwards, log_norms_of, made_at
from unvanish.flow.stack import run_stack


@given(case=module_cases(projections=False), data=st.data())
def test_collapsed_and_direct_maps_agree(case: ModuleCase, data: Any) -> None:
    stack = run_stack(case.module, case.x, case.hx)
    place = data.draw(st.integers(0, len(stack.layers) - 1))
    tr = stack.traces[place]
    T, B = tr.x.shape[:2]
    sources = sorted(data.draw(st.sets(st.integers(0, T - 1), min_size=1)))
    scale = 10.0 ** data.draw(st.sampled_from([-300, -30, 0, 300]))
    error = scale * torch.randn(len(sources), B, stack.directions * tr.y.shape[-1], dtype=torch.float64)
    for state in range(len(tr.final)):
        direct, collapsed = (
            log_norms_of(tr, len(sources), arriving_at(stack, place, len(sources), made_at(sources, error)), state, way)
            for way in (False, True)
        )
        torch.testing.assert_close(collapsed, direct, rtol=1e-11, atol=1e-10)
        if place >= len(stack.layers) - stack.directions:
            own = error.unflatten(-1, (stack.directions, -1))[:, :, place % stack.directions]
            by_kernels = kernel_rows.log_norms_of_many(tr, sources, own, state)
            torch.testing.assert_close(by_kernels, direct, rtol=1e-11, atol=1e-10)


@given(case=module_cases(), data=st.data())
def test_sources_add_up_to_the_total_flow(case: ModuleCase, data: Any) -> None:
    stack = run_stack(case.module, case.x, case.hx)
    place = data.draw(st.integers(0, len(stack.layers) - 1))
    tr, y = stack.traces[place], outputs(case)
    T, error = len(y), torch.randn_like(y)
    total = flow_at(stack, place, error)
    internal = stack.inputs.in_internal_order(error, 1)
    entering = arriving_at(stack, place, T, made_at(list(range(T)), internal))
    for step in backwards(tr, T, entering):
        for apart, whole in zip(step.state, total.deltas.dstate, strict=True):
            added = times_power_of_two(apart, step.exponent.unsqueeze(-1)).sum(1)
            expected = times_power_of_two(whole[step.t], total.exponent[step.t].unsqueeze(-1))
            torch.testing.assert_close(added, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_our_layers_are_measured_as_torchs(kind: str) -> None:
    torch.manual_seed(0)
    stock, x = getattr(nn, kind)(2, 3, num_layers=2), torch.randn(6, 2, 2)
    ours = getattr(uv.nn, kind)(2, 3, num_layers=2)
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(uv.flow.adjoint_map(ours, x).log_norms, uv.flow.adjoint_map(stock, x).log_norms)
    assert torch.equal(uv.flow.lyapunov(ours, x).exponents, uv.flow.lyapunov(stock, x).exponents)


@pytest.mark.parametrize("sources", [[5], list(range(6))])
def test_sigmoid_networks_too(sources: list[int]) -> None:
    torch.manual_seed(0)
    rnn, x = uv.nn.RNN(2, 3, nonlinearity="sigmoid", dtype=torch.float64), torch.randn(6, 2, 2, dtype=torch.float64)
    error = torch.randn(len(sources), 2, 3, dtype=torch.float64)
    found = uv.flow.adjoint_map(rnn, x, sources=sources, error=error)
    for i, k in enumerate(sources):
        with uv.watch(rnn) as flow:
            (rnn(x)[0][k] * error[i]).sum().backward()
        torch.testing.assert_close(found.norms[i], flow["l0"].dh, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e3, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sources", [1, 60])
def test_right_however_much_one_step_changes(scale: float, dtype: torch.dtype, sources: int) -> None:
    torch.manual_seed(0)
    T, H = 60, 5
    rnn = nn.RNN(1, H, nonlinearity="relu", dtype=dtype)
    with torch.no_grad():
        for p in rnn.parameters():
            p.zero_()
        rnn.weight_hh_l0.copy_(scale * torch.eye(H, dtype=dtype)[torch.randperm(H)])
    steps = list(range(T - sources, T))
    tr = run_stack(rnn, torch.zeros(T, 2, 1, dtype=dtype)).traces[0]
    # As if every state were 1: positive, so that φ' = 1, and finite at any scale.
    before, after = (tuple(torch.ones_like(s) for s in kind) for kind in (tr.before, tr.after))
    tr = engine.Trace(tr.cell, tr.weights, tr.x, before, after, tr.final, tr.active, tr.reverse)
    error = torch.nn.functional.normalize(torch.rand(sources, 2, H, dtype=dtype), dim=-1)
    lag = torch.tensor([[k - t for t in range(T)] for k in steps], dtype=torch.float64)
    expected = torch.where(lag >= 0, lag * math.log(scale), -torch.inf).unsqueeze(-1).expand(-1, -1, 2)
    for way in (False, True):
        found = log_norms_of(tr, sources, made_at(steps, error), 0, way)
        torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gain", [0.3, 1.0, 30.0])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "peephole", "reversed"])
def test_many_ragged_sources_both_ways(name: str, gain: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    if name == "peephole":
        layer = uv.nn.Recurrent(ZOO["peephole"](), 2, 5, dtype=dtype)
    elif name == "reversed":
        layer = nn.GRU(2, 5, bidirectional=True, dtype=dtype)
    else:
        layer = getattr(nn, name)(2, 5, dtype=dtype, **({"nonlinearity": "relu"} if name == "RNN" else {}))
    with torch.no_grad():
        for parameter_name, p in layer.named_parameters():
            if "weight_hh" in parameter_name:
                p.mul_(gain)
    stack = run_stack(layer, torch.randn(61, 4, 2, dtype=dtype), lengths=[61, 48, 40, 3])
    tr, steps = stack.traces[-1], list(range(2, 61, 1 if gain == 1 else 3))
    # The last sample's rows are zero from the start for most sources; one error is zero altogether.
    error = torch.randn(len(steps), 4, 5, dtype=dtype)
    error[7, 0] = 0
    entering = arriving_at(
        stack, len(stack.traces) - 1, len(steps), made_at(steps, error.repeat(1, 1, stack.directions))
    )
    for state in range(len(tr.final)):
        one, other = (log_norms_of(tr, len(steps), entering, state, way) for way in (False, True))
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-9 if dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM])
def test_a_nan_reaches_only_errors_that_pass_its_step(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    T, at = 40, 17
    layer, x, error = kind(2, 3), torch.randn(T, 2, 2), torch.randn(T, 2, 3)
    x[at, 0] = torch.nan
    # Errors of the sample beyond the NaN are zero: only Jacobians carry it.
    error[at:, 0] = 0
    tr = run_stack(layer, x).traces[0]
    for state in range(len(tr.final)):
        one, other = (log_norms_of(tr, T, made_at(list(range(T)), error), state, way) for way in (False, True))
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4, equal_nan=True)
        assert not bool(other[:, :, 1].isnan().any())
        assert not bool(other[:at, :, 0].isnan().any())


def test_rows_far_apart_add_up() -> None:
    a, b = Rows.of(torch.tensor([[3.0, 4.0]])), Rows.of(torch.tensor([[0.0, 0.0]]))
    big = Rows(a.v, a.exponent + 5000)

    def log_norm(rows: Rows) -> float:
        return float(log_norms(rows.v, rows.exponent))

    assert log_norm(a + b) == pytest.approx(math.log(5))
    assert log_norm(b + b) == -math.inf
    assert log_norm(a + big) == pytest.approx(math.log(5) + 5000 * math.log(2))
    assert log_norm((a + Rows(-a.v, a.exponent)).normalised()) == -math.inf


@pytest.mark.parametrize("bidirectional", [False, True])
def test_rounds_change_nothing(monkeypatch: pytest.MonkeyPatch, bidirectional: bool) -> None:
    torch.manual_seed(0)
    gru = nn.GRU(2, 3, num_layers=2, bidirectional=bidirectional, dtype=torch.float64)
    x, error = torch.randn(9, 2, 2, dtype=torch.float64), torch.randn(9, 2, 6 if bidirectional else 3).double()
    whole = uv.flow.adjoint_map(gru, x, at="l0").log_norms, uv.flow.source_gradients(gru, x, error=error, at="l0")
    for module, name in (("adjoint_map", "HELD_ELEMENTS"), ("subgradients", "SUM_ELEMENTS")):
        monkeypatch.setattr(sys.modules[f"unvanish.flow.{module}"], name, 200)
    parts = uv.flow.adjoint_map(gru, x, at="l0").log_norms, uv.flow.source_gradients(gru, x, error=error, at="l0")
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(parts[1].log_norms, whole[1].log_norms, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts[1].log_partial_sums, whole[1].log_partial_sums, rtol=0, atol=1e-12)


def test_lag_of_a_reversed_layer_runs_to_later_steps() -> None:
    torch.manual_seed(0)
    found = uv.flow.adjoint_map(nn.GRU(2, 3, bidirectional=True), torch.randn(6, 2, 2), at="l0.reverse")
    lagged = found.over_lag(2)
    assert lagged.shape == (4, 2)
    assert torch.equal(lagged, found.log_norms[2, 2:])
    assert lagged.isfinite().all()


def _vanishing(dtype: torch.dtype) -> tuple[nn.LSTM, Tensor]:
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 6).to(dtype)
    return lstm, torch.randn(400, 2, 2).to(dtype)


def test_terms_and_shares_are_right_where_float32_has_ended() -> None:
    torch.manual_seed(1)
    error = torch.zeros(400, 2, 6)
    error[-1] = torch.randn(2, 6)
    single, double = (
        uv.flow.decompose(*_vanishing(dtype), error=error.to(dtype)) for dtype in (torch.float32, torch.float64)
    )
    assert float(double.log_total[0].max()) < -103, "float32 ends at e^-103"
    torch.testing.assert_close(single.log_total, double.log_total, rtol=1e-3, atol=1e-3)
    for name, term in single.terms.items():
        torch.testing.assert_close(term.share[:-1], double.terms[name].share[:-1], rtol=0, atol=2e-2)
    total = torch.stack([term.share[:-1] for term in single.terms.values()]).sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def test_the_longest_path_is_right_where_float32_has_ended() -> None:
    error = torch.zeros(400, 2, 6)
    error[-1] = 1.0
    single, double = (
        uv.flow.source_gradients(*_vanishing(dtype), error=error.to(dtype)) for dtype in (torch.float32, torch.float64)
    )
    assert float(double.log_longest_path) < -103
    torch.testing.assert_close(single.log_longest_path, double.log_longest_path, rtol=1e-3, atol=0)
    torch.testing.assert_close(single.norms, double.norms, rtol=1e-4, atol=0)


@given(case=module_cases(), data=st.data())
def test_source_gradients_equal_autograd_on_any_layer(case: ModuleCase, data: Any) -> None:
    at = data.draw(st.sampled_from(case.names))
    y = outputs(case)
    error = torch.randn_like(y)
    inside = torch.arange(len(y))[:, None] < torch.tensor(case.lengths)
    error[~inside] = 0
    found = uv.flow.source_gradients(case.module, case.x, case.hx, error=error, at=at)
    assert found.sources == tuple(range(len(y)))
    suffix = at.replace(".reverse", "_reverse")
    weights = [getattr(case.module, f"weight_{kind}_{suffix}") for kind in ("hh", "ih")]
    total: Tensor | None = None
    for i, k in enumerate(found.sources):
        loss = (outputs(case)[k] * error[k]).sum()
        grads = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        total = grads if total is None else total + grads
        torch.testing.assert_close(found.norms[i], grads.norm(), rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(found.partial_sums[i], total.norm(), rtol=1e-10, atol=1e-15)
    # The first step's term, from the states a watch records one step at a time.
    if set(case.lengths) == {len(y)}:
        with uv.watch(case.module) as flow:
            (outputs(case)[-1] * error[-1]).sum().backward()
        first = -1 if at.endswith("reverse") else 0
        torch.testing.assert_close(found.longest_path[-1], flow[at].dweight[first], rtol=1e-10, atol=1e-15)


def test_the_first_step_read_of_ragged_samples() -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(2, 3, bidirectional=True, dtype=torch.float64), torch.randn(5, 2, 2, dtype=torch.float64)
    error = torch.zeros(5, 2, 6, dtype=torch.float64)
    error[0] = torch.randn(2, 6)
    packed = pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False)
    found = uv.flow.source_gradients(gru, packed, error=error, at="l0.reverse").longest_path
    # Each sample's first step contributes one outer product; their sum, from two runs of one sample each.
    parts = []
    for b, length in enumerate((3, 5)):
        with uv.watch(gru) as flow:
            (gru(x[:length, b : b + 1])[0][0] * error[0, b]).sum().backward()
        parts.append(float(flow["l0.reverse"].dweight[-1]))
    assert abs(parts[0] - parts[1]) <= float(found[0]) <= sum(parts) + 1e-12
    assert float(found[0]) != pytest.approx(parts[1], rel=1e-3), "the shorter sample counts too"


def test_errors_where_a_sample_has_no_input_are_none() -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(2, 3), torch.randn(5, 2, 2)
    packed = pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False)
    error = torch.zeros(5, 2, 3)
    error[2], error[4, 0] = 1e-30, 1e30
    found = uv.flow.decompose(gru, packed, error=error).log_total[:2, 0]
    expected = uv.flow.decompose(gru, x[:3, :1], error=error[:3, :1]).log_total[:2, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_measuring_changes_no_model() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(2, 3), torch.randn(5, 2, 2)
    nn.utils.parametrizations.spectral_norm(lstm, "weight_hh_l0")
    lstm(x)
    before, generator = {k: v.clone() for k, v in lstm.state_dict().items()}, torch.get_rng_state()
    uv.flow.adjoint_map(lstm, x)
    uv.flow.decompose(lstm, x)
    uv.flow.lyapunov(lstm, x)
    uv.flow.gate_statistics(lstm, x)
    uv.flow.source_gradients(lstm, x, error=torch.ones(5, 2, 3))
    assert lstm.training
    assert all(module.training for module in lstm.modules())
    assert all(torch.equal(v, before[k]) for k, v in lstm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_an_error_of_another_dtype_is_refused() -> None:
    for measure in (uv.flow.source_gradients, uv.flow.decompose):
        with pytest.raises(ValueError, match=r"error: expected the layer's dtype torch\.float32, got torch.float64"):
            measure(nn.GRU(2, 3), torch.randn(4, 2, 2), error=torch.ones(4, 2, 3, dtype=torch.float64))


def test_clip_plays_no_part() -> None:
    torch.manual_seed(0)
    free, x = uv.nn.LSTM(2, 3), torch.randn(12, 2, 2)
    clipped = uv.nn.LSTM(2, 3)
    clipped.load_state_dict(free.state_dict())
    clipped.clip = 1e-6
    for measure in (
        lambda layer: uv.flow.adjoint_map(layer, x).log_norms,
        lambda layer: uv.flow.decompose(layer, x).log_total,
        lambda layer: uv.flow.source_gradients(layer, x, error=torch.ones(12, 2, 3)).log_norms,
    ):
        assert torch.equal(measure(free), measure(clipped))


@given(case=module_cases(), data=st.data())
def test_neighbours_order_and_scale_change_no_sample(case: ModuleCase, data: Any) -> None:
    if not isinstance(case.x, Tensor) or case.hx is not None or case.x.dim() == 2:
        return
    at = data.draw(st.sampled_from(case.names))
    module, x = case.module, case.x
    batch = 0 if module.batch_first else 1
    B = x.shape[batch]
    order = torch.tensor(data.draw(st.permutations(range(B))))
    moved = x.index_select(batch, order)
    stranger = x.clone()
    stranger.narrow(batch, B - 1, 1).normal_()
    error = torch.randn_like(outputs(case))

    def records(x: Tensor, error: Tensor) -> list[Tensor]:
        terms = uv.flow.decompose(module, x, error=error, at=at)
        shares = [torch.nan_to_num(term.share) for term in terms.terms.values()]
        return [terms.log_total, *shares, uv.flow.adjoint_map(module, x, at=at).log_norms[-1]]

    base, permuted = records(x, error), records(moved, error[:, order])
    beside, scaled = records(stranger, error), records(x, 2.0**300 * error)
    scaled[0] -= 300 * math.log(2)
    for i, expected in enumerate(base):
        torch.testing.assert_close(permuted[i], expected[:, order], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(beside[i][:, : B - 1], expected[:, : B - 1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scaled[i], expected, rtol=1e-9, atol=1e-9)


def test_random_probes_estimate_the_textbook_product() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(2, 4, dtype=torch.float64), torch.randn(8, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(3)
    exact, guess = (uv.flow.decompose(lstm, x, textbook=True, probes=probes).textbook for probes in (None, 4000))
    assert exact is not None
    assert guess is not None
    torch.testing.assert_close(guess.log_exact, exact.log_exact, rtol=0, atol=0.1)
    torch.testing.assert_close(guess.log_textbook, exact.log_textbook, rtol=0, atol=0.1)
    torch.testing.assert_close(guess.apart, exact.apart, rtol=0.15, atol=1e-10)
    with pytest.raises(ValueError, match="probes: expected a count of 1 or more, together with textbook=True"):
        uv.flow.decompose(lstm, x, probes=3)


def test_a_gate_that_is_fully_open_remembers_for_ever() -> None:
    lstm = nn.LSTM(1, 2)
    with torch.no_grad():
        for p in lstm.parameters():
            p.zero_()
        lstm.bias_ih_l0[2:4] = torch.tensor([60.0, -200.0])
    stats = uv.flow.gate_statistics(lstm, torch.zeros(4, 1, 1))
    for memory in (stats.time_constant, stats.half_life):
        assert float(memory[0]) == math.inf
        assert 0 <= float(memory[1]) < 0.02
    counts, edges = stats.histogram(bins=3)
    assert counts.sum() == 2
    assert edges.isfinite().all()
