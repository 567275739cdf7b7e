"""The adjoint map equals one watched backward pass per source, and stays right where floats end."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import unvanish as uv
from tests.strategies import ModuleCase, module_cases
from unvanish.flow import kernel_rows
from unvanish.flow.exponents import times_power_of_two


def outputs(case: ModuleCase) -> Tensor:
    """[T, B, D·R] in the user's order."""
    y, _ = case.module(case.x, case.hx)
    if not isinstance(y, Tensor):
        return nn.utils.rnn.pad_packed_sequence(y)[0]
    if y.dim() == 2:
        return y.unsqueeze(1)
    return y.transpose(0, 1) if case.module.batch_first else y


@given(case=module_cases(), data=st.data())
def test_equal_to_one_backward_pass_per_source(case: ModuleCase, data: st.DataObject) -> None:
    module, T, B = case.module, max(case.lengths), len(case.lengths)
    sources = sorted(data.draw(st.sets(st.integers(0, T - 1), min_size=1)))
    at = data.draw(st.sampled_from(case.names))
    state = data.draw(st.sampled_from(["h", "c"] if isinstance(module, nn.LSTM) else ["h"]))
    width = outputs(case).shape[-1]
    error = torch.randn(len(sources), B, width, dtype=torch.float64)
    found = uv.flow.adjoint_map(module, case.x, case.hx, sources=sources, state=state, error=error, at=at)
    assert found.norms.shape == (len(sources), T, B)
    for i, k in enumerate(sources):
        with uv.watch(module) as flow:
            (outputs(case)[k] * error[i]).sum().backward()
        expected = getattr(flow[at], f"d{state}")
        torch.testing.assert_close(found.norms[i], expected, rtol=1e-10, atol=1e-15)


@given(case=module_cases(), scale=st.sampled_from([1e-250, 1e250]))
def test_scaling_the_error_shifts_the_logarithm(case: ModuleCase, scale: float) -> None:
    T, B = max(case.lengths), len(case.lengths)
    error = torch.randn(1, B, outputs(case).shape[-1], dtype=torch.float64)
    one, other = (
        uv.flow.adjoint_map(case.module, case.x, case.hx, sources=[T - 1], error=e).log_norms
        for e in (error, error * scale)
    )
    torch.testing.assert_close(other, one + math.log(scale), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_right_beyond_ten_to_the_400(dtype: torch.dtype, layers: int, factor: float) -> None:
    torch.manual_seed(0)
    T, H = 1400, 4
    rnn = nn.RNN(H, H, num_layers=layers, dtype=dtype)
    with torch.no_grad():
        for p in rnn.parameters():
            p.zero_()
        q, _ = torch.linalg.qr(torch.randn(H, H, dtype=torch.float64))
        rnn.weight_hh_l0.copy_(factor * q)
        if layers == 2:
            rnn.weight_ih_l1.copy_(q)
    log = uv.flow.adjoint_map(rnn, torch.zeros(T, 1, H, dtype=dtype), sources=[T - 1], at="l0").log_norms[0, :, 0]
    expected = torch.arange(T - 1, -1, -1, dtype=torch.float64) * math.log(factor)
    torch.testing.assert_close(log, expected, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)
    assert abs(float(log[0])) > 400 * math.log(10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_where_all_components_grow_beyond_the_range(dtype: torch.dtype) -> None:
    """Other signs, or units of padding, would make NaN of infinities; here they would stay."""
    T, H = 1400, 64
    rnn, ones = nn.RNN(H, H, dtype=dtype), torch.ones(1, 1, H, dtype=dtype)
    with torch.no_grad():
        for p in rnn.parameters():
            p.zero_()
        rnn.weight_hh_l0.fill_(2 / H)
    log = uv.flow.adjoint_map(rnn, torch.zeros(T, 1, H, dtype=dtype), sources=[T - 1], error=ones).log_norms[0, :, 0]
    expected = torch.arange(T - 1, -1, -1, dtype=torch.float64) * math.log(2) + math.log(math.sqrt(H))
    torch.testing.assert_close(log, expected, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("scale", [1e-20, 0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "make",
    [
        partial(nn.LSTM, 3, 9), partial(nn.LSTM, 3, 9, proj_size=4), partial(nn.GRU, 3, 9), partial(nn.RNN, 3, 64),
        partial(nn.RNN, 3, 9, nonlinearity="relu"),
    ],
    ids=["lstm", "projected", "gru", "rnn", "relu"],
)  # fmt: skip
def test_the_kernels_carry_errors_as_torch_operations_do(
    make: partial[nn.RNNBase], scale: float, reverse: bool, dtype: torch.dtype
) -> None:
    """Over 400 steps that vanish, grow beyond the range or die, in batches of one block of samples and more."""
    torch.manual_seed(0)
    layer = make(bidirectional=reverse, dtype=dtype)
    with torch.no_grad():
        for name, w in layer.named_parameters():
            w.mul_(scale if "weight_hh" in name else 1.0)
    for B, state in itertools.product((1, 40), ["h", "c"] if isinstance(layer, nn.LSTM) else ["h"]):
        x = torch.randn(400, B, 3, dtype=dtype)
        found, like = [], "l0.reverse" if reverse else "l0"
        for few, many in ((kernel_rows.FEW, kernel_rows.MANY), (0, 1), (0, 1000)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernel_rows, "FEW", few)
                patch.setattr(kernel_rows, "MANY", many)
                found.append(uv.flow.adjoint_map(layer, x, sources=[1, 399], at=like, state=state).log_norms)
        close = 1e-9 if dtype == torch.float64 else 2e-3
        for by_kernels in found[:2]:
            torch.testing.assert_close(by_kernels, found[2], rtol=close, atol=close)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_no_error_is_made_beyond_the_end_of_a_sample(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = getattr(nn, kind)(3, 5, bidirectional=True, dtype=torch.float64), torch.randn(40, 2, 3).double()
    for at in ("l0", "l0.reverse"):
        found = uv.flow.adjoint_map(layer, x, lengths=[40, 21], at=at).log_norms[:, :, 1:]
        alone = uv.flow.adjoint_map(layer, x[:21, 1:], at=at, sources="all").log_norms
        torch.testing.assert_close(found[:21, :21], alone, rtol=1e-12, atol=1e-12)
        assert found[21:].isneginf().all()
        assert found[:, 21:].isneginf().all()


def test_sources_add_up_to_the_total_flow() -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(2, 1, dtype=torch.float64), torch.randn(6, 3, 2, dtype=torch.float64)
    error = torch.rand(6, 3, 1, dtype=torch.float64)
    with torch.no_grad():
        # Positive Jacobians of one unit, so that norms of the parts add up to the norm of the sum.
        gru.weight_hh_l0.zero_()
    total = uv.flow.adjoint_map(gru, x, error=error).norms.sum(0)
    with uv.watch(gru) as flow:
        (gru(x)[0] * error).sum().backward()
    torch.testing.assert_close(total, flow["l0"].dh, rtol=1e-12, atol=0)


def test_spread_and_negative_sources() -> None:
    gru, x = nn.GRU(2, 3), torch.randn(10, 2, 2)
    assert uv.flow.adjoint_map(gru, x, sources=3).sources == (2, 6, 9)
    assert uv.flow.adjoint_map(gru, x, sources=np.int64(3)).sources == (2, 6, 9)  # type: ignore[arg-type]
    assert uv.flow.adjoint_map(gru, x, sources=np.arange(2)).sources == (0, 1)  # type: ignore[arg-type]
    assert uv.flow.adjoint_map(gru, x, sources=[-1]).sources == (9,)
    assert uv.flow.adjoint_map(gru, x).sources == tuple(range(10))
    assert uv.flow.adjoint_map(gru, x, sources=[5]).over_lag(0).shape == (6, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": [10]}, "sources: expected different steps from 0 to 9"),
        ({"sources": [3, 3]}, "sources: expected different steps"),
        ({"sources": [5, 3]}, "sources: expected steps in increasing order"),
        ({"sources": [9, -1]}, "sources: expected different steps"),
        ({"sources": [1.5]}, "sources: expected whole numbers"),
        ({"sources": []}, "sources: expected different steps"),
        ({"sources": 11}, "sources: expected a count from 1 to 10"),
        ({"sources": "last"}, "sources: expected 'all'"),
        ({"sources": 1.5}, "sources: expected 'all'"),
        ({"hx": (torch.zeros(1, 2, 3),) * 2}, "hx: expected h_0, 1 of tensors, got 2: Tensor, Tensor"),
        ({"hx": 0}, "hx: expected h_0, 1 of tensors, got 1: int"),
        ({"state": "c"}, "state: expected h for gru"),
        ({"at": "l3"}, "at: expected one of l0"),
        ({"error": torch.zeros(1, 1, 1)}, r"error: expected \[K, B, D·R\] = \(10, 2, 3\)"),
        ({"error": torch.zeros(10, 2, 3, dtype=torch.float64)}, "error: expected the layer's dtype"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uv.flow.adjoint_map(nn.GRU(2, 3), torch.randn(10, 2, 2), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_are_exact(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    low, high = math.frexp(info.smallest_normal)[1], math.frexp(info.max)[1]
    e = torch.arange(low, high - 1, dtype=torch.int32)
    there = times_power_of_two(torch.full((len(e),), 1.5, dtype=dtype), e)
    assert there.tolist() == [math.ldexp(1.5, int(k)) for k in e]
    assert (times_power_of_two(there, -e) == 1.5).all()
