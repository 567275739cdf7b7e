"""Jacobians, exponents and singular values: equal to autograd's, to a reference method and to closed forms."""

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import unvanish as uv
from tests.strategies import ModuleCase, module_cases
from unvanish.flow import tangents
from unvanish.flow.lyapunov import spectrum_of
from unvanish.flow.stack import full_jacobians, run_stack


@given(case=module_cases(), data=st.data())
def test_products_without_the_matrix_equal_those_with_it(case: ModuleCase, data: Any) -> None:
    stack = run_stack(case.module, case.x, case.hx)
    tr = stack.traces[data.draw(st.integers(0, len(stack.layers) - 1))]
    t = data.draw(st.integers(0, len(tr.y) - 1))
    S = sum(s.shape[-1] for s in tr.final)
    q = torch.randn(len(case.lengths), S, 3, dtype=torch.float64)
    j = full_jacobians(tr, t)
    formed = tangents.FORMED_FROM
    try:
        tangents.FORMED_FROM = 1e9
        torch.testing.assert_close(tangents.forward(tr, t, q), j @ q, rtol=1e-12, atol=1e-13)
        if tr.active is None:
            torch.testing.assert_close(tangents.transposed(tr, t, q), j.mT @ q, rtol=1e-12, atol=1e-13)
        tangents.FORMED_FROM = 0.0
        torch.testing.assert_close(tangents.forward(tr, t, q), j @ q, rtol=1e-12, atol=1e-13)
    finally:
        tangents.FORMED_FROM = formed


def _alone(case: ModuleCase, at: str) -> nn.RNNBase:
    """A stock module of one layer and direction that holds the weights of `at`."""
    module, suffix = case.module, at.replace(".reverse", "_reverse")
    names = [n.removesuffix(f"_{suffix}") for n, _ in module.named_parameters() if n.endswith(f"_{suffix}")]
    weights = {f"{n}_l0": getattr(module, f"{n}_{suffix}") for n in names}
    options: dict[str, Any] = {"bias": module.bias, "dtype": torch.float64}
    if module.proj_size:
        options["proj_size"] = module.proj_size
    if isinstance(module, nn.RNN):
        options["nonlinearity"] = module.nonlinearity
    twin = type(module)(weights["weight_ih_l0"].shape[1], module.hidden_size, **options)
    twin.load_state_dict(weights)
    return twin


@given(case=module_cases(), data=st.data())
def test_jacobians_equal_autograd_on_any_layer_and_sample(case: ModuleCase, data: Any) -> None:
    at = data.draw(st.sampled_from(case.names))
    t, b = data.draw(st.integers(0, max(case.lengths) - 1)), data.draw(st.integers(0, len(case.lengths) - 1))
    found = uv.flow.jacobian(case.module, case.x, case.hx, t=t, at=at)[b]
    if t >= case.lengths[b]:
        assert torch.equal(found, torch.eye(len(found), dtype=torch.float64))
        return
    stack, twin = run_stack(case.module, case.x, case.hx), _alone(case, at)
    tr = stack.traces[stack.index(at)]
    inside = b if stack.inputs.order is None else stack.inputs.order.tolist().index(b)
    previous = [s[t, inside] for s in tr.before]

    def advance(flat: Tensor) -> Tensor:
        hx = tuple(part.reshape(1, 1, -1) for part in flat.split([len(p) for p in previous]))
        new = twin(tr.x[t : t + 1, inside : inside + 1], hx if len(hx) > 1 else hx[0])[1]
        return torch.cat([part.flatten() for part in (new if isinstance(new, tuple) else (new,))])

    expected = torch.autograd.functional.jacobian(advance, torch.cat(previous))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def _reference_exponents(layer: nn.RNNBase, x: Tensor) -> Tensor:
    """Benettin's method as it is published, on Jacobians that autograd takes from torch's own layer; one sample."""
    with torch.no_grad():
        final = layer(x[:1])[1]
    parts = final if isinstance(final, tuple) else (final,)
    S = sum(p.shape[-1] for p in parts)
    state = torch.zeros(S, dtype=torch.float64)

    def advance(flat: Tensor, t: int) -> Tensor:
        hx = tuple(p.reshape(1, 1, -1) for p in flat.split([p.shape[-1] for p in parts]))
        new = layer(x[t : t + 1], hx if len(hx) > 1 else hx[0])[1]
        return torch.cat([p.flatten() for p in (new if isinstance(new, tuple) else (new,))])

    q, logs = torch.eye(S, dtype=torch.float64), torch.zeros(S, dtype=torch.float64)
    for t in range(len(x)):
        q, r = torch.linalg.qr(torch.autograd.functional.jacobian(lambda s, t=t: advance(s, t), state) @ q)
        logs += r.diagonal().abs().log()
        state = advance(state, t).detach()
    return (logs / len(x)).sort(descending=True).values


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_exponents_agree_with_the_published_method(kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(2, 3, dtype=torch.float64)
    x = torch.randn(1, 1, 2, dtype=torch.float64).expand(400, 1, 2)
    expected = _reference_exponents(layer, x)
    # Another first Q: the two agree up to what the first steps leave behind, which falls as 1/T.
    found = uv.flow.lyapunov(layer, x).exponents
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
    assert float(found.sum()) == pytest.approx(float(expected.sum()), abs=1e-9)
    few = uv.flow.lyapunov(layer, x, n=1, warmup=200).exponents
    assert float(few) == pytest.approx(float(uv.flow.lyapunov(layer, x, warmup=200).exponents[0]), abs=1e-6)


def test_exponents_of_a_saturated_rnn_are_its_slopes() -> None:
    rnn = nn.RNN(1, 3, dtype=torch.float64)
    with torch.no_grad():
        for p in rnn.parameters():
            p.zero_()
        rnn.weight_hh_l0.copy_(torch.diag(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)))
        rnn.bias_ih_l0.copy_(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))
    x = torch.zeros(400, 1, 1, dtype=torch.float64)
    h = rnn(x)[0][-1, 0].detach()
    expected = ((1 - h * h) * torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)).log().sort(descending=True).values
    torch.testing.assert_close(uv.flow.lyapunov(rnn, x, warmup=200).exponents, expected, rtol=0, atol=1e-6)


def test_a_dead_direction_has_exponent_minus_infinity() -> None:
    rnn = nn.RNN(1, 3, nonlinearity="relu", dtype=torch.float64)
    with torch.no_grad():
        for p in rnn.parameters():
            p.zero_()
        rnn.weight_hh_l0.copy_(torch.diag(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)))
        rnn.bias_ih_l0.copy_(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    found = uv.flow.lyapunov(rnn, torch.zeros(300, 1, 1, dtype=torch.float64), warmup=100).exponents
    assert found[-1] == -math.inf
    torch.testing.assert_close(found[:2], torch.tensor([0.9, 0.5], dtype=torch.float64).log(), rtol=0, atol=1e-9)


@given(
    kind=st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]),
    hidden=st.integers(2, 24),
    lag=st.integers(1, 6),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_singular_values_equal_those_of_the_formed_product(
    kind: Any, hidden: int, lag: int, seed: int, data: Any
) -> None:
    torch.manual_seed(seed)
    layer, x = kind(2, hidden, dtype=torch.float64), torch.randn(9, 2, 2, dtype=torch.float64)
    product = uv.flow.jacobian(layer, x, t=2)
    for t in range(3, 2 + lag):
        product = uv.flow.jacobian(layer, x, t=t) @ product
    n = data.draw(st.integers(1, min(5, hidden)))
    expected = torch.linalg.svdvals(product).log()[:, :n]
    found = uv.flow.singular_values(layer, x, j=1, k=1 + lag, n=n)
    visible = expected > expected[:, :1] - 15
    torch.testing.assert_close(found[visible], expected[visible], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.999999, 0.9, 0.3])
def test_singular_values_close_together_and_far_apart_at_once(ratio: float) -> None:
    rnn = nn.RNN(1, 4, dtype=torch.float64)
    weights = torch.tensor([1.0, ratio, 1e-3, ratio * 1e-3], dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in rnn.parameters():
            p.zero_()
        u = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
        rnn.weight_hh_l0.copy_(u @ torch.diag(weights) @ u.T)
    found = uv.flow.singular_values(rnn, torch.zeros(41, 1, 1, dtype=torch.float64), j=0, k=40, n=4)
    torch.testing.assert_close(found[0], 40 * weights.log(), rtol=0, atol=1e-6)


def test_a_product_of_rank_one_has_one_singular_value() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(1, 4, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.outer(*torch.randn(2, 4, dtype=torch.float64)))
    with pytest.warns(RuntimeWarning, match="fewer than n values above rounding"):
        found = uv.flow.singular_values(rnn, torch.zeros(4, 1, 1, dtype=torch.float64), j=0, k=3, n=2)[0]
    assert found[0].isfinite()
    assert found[1] < found[0] - 30


def test_unfinished_singular_values_say_so() -> None:
    torch.manual_seed(0)
    rnn, x = nn.RNN(2, 64, dtype=torch.float64), torch.randn(3, 1, 2, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="after 2 turns the logarithms still move"):
        uv.flow.singular_values(rnn, x, j=0, k=1, n=4, iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uv.flow.singular_values(rnn, x, j=0, k=1, n=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exponents_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(2, 3), torch.randn(20, 2, 2)
    expected = uv.flow.lyapunov(gru, x, n=2).exponents
    floss = uv.cures.GradientFlossing(gru, n=2)(x)
    rounded = uv.flow.lyapunov(gru.to(dtype), x.to(dtype), n=2).exponents
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0.05)
    found = uv.cures.GradientFlossing(gru, n=2)(x.to(dtype))
    torch.testing.assert_close(found.float(), floss, rtol=0.1, atol=0)


def test_a_sample_that_is_not_finite_is_not_left_out() -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(2, 3, dtype=torch.float64), torch.randn(6, 2, 2, dtype=torch.float64)
    expected = uv.flow.lyapunov(gru, x).per_sample, uv.flow.singular_values(gru, x, j=0, k=5, n=2)
    x[2, 0, 0] = math.nan
    found = uv.flow.lyapunov(gru, x)
    assert found.exponents.isnan().all()
    assert torch.equal(found.per_sample[1].sort().values, expected[0][1].sort().values)
    values = uv.flow.singular_values(gru, x, j=0, k=5, n=2)
    assert values[0].isnan().all()
    torch.testing.assert_close(values[1], expected[1][1], rtol=0, atol=1e-8)


def test_held_samples_keep_their_exponents() -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(2, 3, dtype=torch.float64), torch.randn(20, 2, 2, dtype=torch.float64)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([12, 20]), enforce_sorted=False)
    both = uv.flow.lyapunov(gru, packed).per_sample
    alone = uv.flow.lyapunov(gru, x[:12, :1]).per_sample
    torch.testing.assert_close(both[0].sort().values, alone[0].sort().values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", ["l0", "l0.reverse"])
def test_each_sample_warms_up_on_its_own_steps(at: str) -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(2, 3, bidirectional=True, dtype=torch.float64), torch.randn(20, 3, 2, dtype=torch.float64)
    lengths = (20, 12, 4)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    found = uv.flow.lyapunov(gru, packed, at=at, n=1, warmup=5)
    alone = [
        uv.flow.lyapunov(gru, x[:length, b : b + 1], at=at, n=1, warmup=5).exponents
        for b, length in enumerate((20, 12))
    ]
    torch.testing.assert_close(found.per_sample[:2], torch.stack(alone), rtol=1e-12, atol=1e-12)
    assert found.per_sample[2].isnan().all()
    torch.testing.assert_close(found.exponents, torch.stack(alone).mean(0), rtol=1e-12, atol=1e-12)
    assert found.history[:5].isnan().all()
    assert found.history[5:].isfinite().any(1).all()


@pytest.mark.parametrize("at", ["l0", "l0.reverse"])
def test_the_last_steps_alone_continue_from_the_state_before_them(at: str) -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(2, 3, bidirectional=True, dtype=torch.float64), torch.randn(20, 3, 2, dtype=torch.float64)
    found = spectrum_of(run_stack(gru, x), at, 2, warmup=2, last=8)
    before, last = (x[8:], x[:8]) if at == "l0.reverse" else (x[:12], x[12:])
    expected = uv.flow.lyapunov(gru, last, gru(before)[1].detach(), at=at, n=2, warmup=2)
    torch.testing.assert_close(found.per_sample, expected.per_sample, rtol=1e-12, atol=1e-12)
