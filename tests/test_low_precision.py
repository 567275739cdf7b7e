"""Layers whose weights and input are bfloat16 or float16, without autocast: computed in float32, rounded once."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unvanish as uv
from tests.test_nn import flat
from unvanish.cells import CELLS, ZOO

KINDS = ["RNN", "LSTM", "GRU"]
LOW = [torch.bfloat16, torch.float16]


def assert_rounded(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """found is exact, rounded once; float32's own error may tip the rounding where it is a tie."""
    half = torch.finfo(dtype).eps / 2
    for v, right in zip(found, exact, strict=True):
        assert v.dtype == dtype
        assert bool(((v.double() - right).abs() <= 1.01 * half * right.abs() + 1e-6).all())


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(LOW),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    projected=st.booleans(),
    ragged=st.sampled_from([None, "lengths", "packed"]),
    initial=st.booleans(),
    H=st.integers(2, 20),
    seed=st.integers(0, 1000),
)
def test_results_and_gradients_are_those_of_float64_rounded_once(
    kind: str,
    dtype: torch.dtype,
    layers: int,
    bidirectional: bool,
    projected: bool,
    ragged: str | None,
    initial: bool,
    H: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    proj = 1 if projected and kind == "LSTM" else 0
    options = {"proj_size": proj} if proj else {}
    layer = getattr(uv.nn, kind)(3, H, layers, bidirectional=bidirectional, **options).to(dtype)
    exact, T, B, places = copy.deepcopy(layer).double(), 7, 3, layers * (1 + bidirectional)
    x = torch.randn(T, B, 3).to(dtype)
    hx: Any = tuple(torch.randn(places, B, n).to(dtype) for n in (proj or H, H)) if initial else None
    lengths = [3, 7, 5]

    def run(layer: nn.Module, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        given = x.detach().clone().to(dtype).requires_grad_()
        state = None if hx is None else tuple(h.to(dtype) for h in hx)
        state = state if state is None or kind == "LSTM" else state[0]
        seen: Any = pack_padded_sequence(given, lengths, enforce_sorted=False) if ragged == "packed" else given
        out = flat(layer(seen, state, **({"lengths": lengths} if ragged == "lengths" else {})))
        # Errors that every dtype represents.
        out[0].backward(torch.ones_like(out[0]) / 4)
        return [v.detach() for v in out], [given.grad, *(w.grad for w in layer.parameters())]

    for found, right in zip(run(layer, dtype), run(exact, torch.float64), strict=True):
        assert_rounded(found, right, dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_are_torchs_and_errors_no_larger(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs, ours = getattr(nn, kind)(8, 64).to(dtype), getattr(uv.nn, kind)(8, 64).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(40, 4, 8).to(dtype)
    right = flat(copy.deepcopy(theirs).double()(x.double()))
    mine, torchs = flat(ours(x)), flat(theirs(x))
    assert [v.dtype for v in mine] == [v.dtype for v in torchs] == [dtype] * len(right)
    for a, b, exact in zip(mine, torchs, right, strict=True):
        assert (a - exact).norm() <= (b - exact).norm()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", KINDS)
def test_explained_states_and_watched_as_in_float32(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = getattr(uv.nn, kind)(3, 4).to(dtype), torch.randn(20, 2, 3).to(dtype)
    wide = copy.deepcopy(layer).float()
    for context in (torch.autocast("cpu", torch.bfloat16, enabled=False), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert uv.nn.explain(layer, x).rung == "native"
    torch.testing.assert_close(layer.states(x)["l0"].states, wide.states(x.float())["l0"].states)
    flows = []
    for module, sequence in ((layer, x), (wide, x.float())):
        with uv.watch(module) as flow:
            module(sequence)[0].float().sum().backward()
        flows.append(next(iter(flow.values())))
    for name in ("dh", "dweight"):
        torch.testing.assert_close(getattr(flows[0], name), getattr(flows[1], name))
    assert flows[0].valid


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_that_differ_are_an_error_as_in_torch(kind: str, dtype: torch.dtype) -> None:
    layer, low = getattr(uv.nn, kind)(3, 4), torch.zeros(5, 2, 3, dtype=dtype)
    h = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="dtype"):
        layer(low)
    with pytest.raises(RuntimeError):
        layer.to(dtype)(low, (h, h) if kind == "LSTM" else h)


# W_hh of "antisymmetric" is a difference of parameters, which is rounded before the sequence runs.
@pytest.mark.parametrize("name", sorted({*CELLS, *ZOO} - {"antisymmetric"}))
def test_any_cell_is_computed_in_float32_too(name: str) -> None:
    torch.manual_seed(0)
    layer = uv.nn.Recurrent(CELLS.get(name) or ZOO[name](), 3, 4).bfloat16()
    x, results = torch.randn(9, 2, 3).bfloat16(), []
    for module, dtype in ((layer, torch.bfloat16), (copy.deepcopy(layer).double(), torch.float64)):
        out = flat(module(x.to(dtype)))
        out[0].sum().backward()
        results.append(([v.detach() for v in out], [w.grad for w in module.parameters() if w.grad is not None]))
    for found, right in zip(*results, strict=True):
        assert_rounded(found, right, torch.bfloat16)
