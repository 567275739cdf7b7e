"""Cells in the kernels, by programs of their step: against torch operations, autograd and torch's special values."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import unvanish as uv
from tests.program_cases import CELLS, drawn, gradients
from tests.test_native import ISAS
from unvanish.cells import ZOO, Weights
from unvanish.engine import manual, native, stepped
from unvanish.engine.elementwise import Recorder
from unvanish.engine.program import Programs, programs

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason="the kernels are not built")


@pytest.mark.parametrize("name", list(CELLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    seed=st.integers(0, 999),
    T=st.integers(1, 9),
    B=st.integers(1, 20),
    H=st.integers(1, 40),
    ragged=st.booleans(),
    reverse=st.booleans(),
    bias=st.booleans(),
    clip=st.none() | st.just(0.5),
)
@settings(max_examples=10)
def test_a_sequence_equals_autograds(
    name: str, dtype: torch.dtype, seed: int, T: int, B: int, H: int, ragged: bool, reverse: bool, bias: bool, clip: Any
) -> None:
    cell = CELLS[name]()
    data = drawn(cell, T, B, 3, H, dtype, seed, bias)
    assert stepped.obstacle(cell, data[0], data[1], data[2]) is None
    lengths = torch.randint(0, T + 1, (B,), generator=torch.Generator().manual_seed(seed)) if ragged else None
    found = gradients("manual", cell, data, lengths, reverse=reverse, clip=clip)
    double = tuple(
        v.double() if isinstance(v, Tensor) else tuple(None if u is None else u.double() for u in v) for v in data
    )
    # A spike at its threshold may fall either way in float32.
    expected = gradients("reference", cell, data if name == "lif" else double, lengths, reverse=reverse, clip=clip)
    for ours, theirs in zip(found, expected, strict=True):
        largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        error = 1e-10 if dtype == torch.float64 else 1e-2  # of what a kink or a division by a small state magnifies
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=0, atol=error * max(largest, 1.0))


@pytest.mark.parametrize("name", list(CELLS))
@given(seed=st.integers(0, 999), ragged=st.booleans(), reverse=st.booleans())
@settings(max_examples=5)
def test_every_delta_equals_that_of_torch_operations(name: str, seed: int, ragged: bool, reverse: bool) -> None:
    cell, T, B = CELLS[name](), 6, 5
    x, states, w, dy, dfinal = drawn(cell, T, B, 2, 4, torch.float64, seed)
    lengths = torch.randint(0, T + 1, (B,), generator=torch.Generator().manual_seed(seed)) if ragged else None
    found = []
    for declined in (None, "tested"):
        with pytest.MonkeyPatch.context() as patch:
            if declined:
                patch.setattr(stepped, "obstacle", lambda *_: "tested")
            tr = manual.trace(cell, x, states, w, lengths, reverse)
            d = manual.adjoint(tr, dy, dfinal, 0.5)
            grads = manual.weight_gradients(tr, d)
        assert (tr.ran is None) == bool(declined)
        # What came before a step that is not there means nothing.
        active = torch.ones(T, B, 1) if tr.active is None else tr.active
        before = [torch.where(active > 0, s, 0.0) for s in tr.before]
        found.append([before, tr.after, tr.final, d.dstate, d.da, d.da_hh, d.dinitial, tuple(grads)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


def kept(name: str) -> list[str]:
    found = programs(CELLS[name](), torch.float64, stepped.OPERATIONS)
    assert isinstance(found, Programs)
    return [found._graph.nodes[n].op for n in found.kept]


def test_only_what_is_dear_is_kept() -> None:
    assert kept("lstm") == ["sigmoid", "sigmoid", "tanh", "sigmoid", "tanh"]
    assert kept("rnn_tanh") == kept("lif") == []
    assert sorted(kept("gru")) == ["input", "sigmoid", "sigmoid", "tanh"]


def test_equal_expressions_are_one_and_sums_of_shares_are_the_products_own() -> None:
    found = programs(ZOO["lstm"](), torch.float64, stepped.OPERATIONS)
    assert isinstance(found, Programs)
    assert found.shares == [(0, 0), (1, 1), (2, 2), (3, 3)]
    names = list(stepped.OPERATIONS)
    code = found.forward(keep=True).code
    assert sorted(names[op] for op in code[::5]) == ["fma", "mul", "mul", *["sigmoid"] * 3, "tanh", "tanh"]


def test_a_view_of_another_shape_is_refused_by_name() -> None:
    x = torch.rand(2, 3)
    recorder = Recorder(x.shape, x.dtype)
    recorder.input(x, "x")
    with recorder, pytest.raises(Exception, match="shape"):
        x.reshape(6)


@pytest.mark.parametrize("name", ["mgu", "peephole", "lem"])
def test_the_gradient_of_a_gradient(name: str) -> None:
    cell = CELLS[name]()
    x, states, w, dy, _ = drawn(cell, 3, 2, 2, 3, torch.float64, 0)
    found = []
    for rung in ("manual", "reference"):
        leaf = x.clone().requires_grad_()
        y, _ = uv.engine.run(cell, leaf, states, w, rung=rung)
        (dx,) = torch.autograd.grad(y, leaf, dy, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_threads_and_neighbours_change_nothing() -> None:
    cell = ZOO["peephole"]()
    x, states, w, *_ = drawn(cell, 20, 40, 3, 24, torch.float32, 0)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(uv.engine.run(cell, x, states, w, rung="manual")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone, _ = uv.engine.run(cell, x[:, 7:8], tuple(s[7:8] for s in states), w, rung="manual")
    assert torch.equal(alone[:, 0], found[0][:, 7])


def test_padding_is_not_read() -> None:
    cell, lengths = ZOO["lem"](), torch.tensor([2, 5, 0])
    x, states, w, dy, dfinal = drawn(cell, 5, 3, 2, 5, torch.float64, 0)
    spoilt = x.clone()
    for b, n in enumerate(lengths.tolist()):
        spoilt[n:, b] = math.nan
    found = gradients("manual", cell, (spoilt, states, w, dy, dfinal), lengths)
    torch.testing.assert_close(found, gradients("manual", cell, (x, states, w, dy, dfinal), lengths))


@pytest.mark.parametrize("name", ["peephole", "lem", "cornn", "slstm", "indrnn"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("T", "B", "n_in", "H"), [(3, 1, 1, 1), (30, 18, 5, 33), (70, 7, 9, 16), (2, 35, 70, 65)])
def test_every_instruction_set(
    isa: str, name: str, T: int, B: int, n_in: int, H: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNVANISH_ISA", isa)
    cell = CELLS[name]()
    data = drawn(cell, T, B, n_in, H, torch.float64, 1)
    w = Weights(*(None if v is None else v / math.sqrt(H) for v in data[2]))
    data = (*data[:2], w, *data[3:])
    lengths = torch.randint(0, T + 1, (B,), generator=torch.Generator().manual_seed(0))
    for longest, reverse in ((None, False), (lengths, True)):
        found = gradients("manual", cell, data, longest, reverse=reverse)
        expected = gradients("reference", cell, data, longest, reverse=reverse)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
