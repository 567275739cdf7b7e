"""Where the fused rung runs, at which precision, and what it keeps."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import unvanish as uv
from tests.fused_traces import EXACT, TORCHS
from unvanish import engine, torch_internals
from unvanish.cells import CELLS, LSTM, State, Weights
from unvanish.engine import fused, manual
from unvanish.engine.precision import full_precision, rounds_to_tf32


def settings_of_products() -> list[Any]:
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    return [place.fp32_precision for place in places]


def test_products_are_exact_within_and_as_before_without(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    kernel = fused.torch_kernels.run

    def looking(*args: Any) -> Any:
        seen.append(settings_of_products())
        assert not torch.is_autocast_enabled("cpu")
        return kernel(*args)

    monkeypatch.setattr(fused.torch_kernels, "run", looking)
    layer, x = nn.GRU(2, 3), torch.randn(4, 2, 2)
    torch.set_float32_matmul_precision("medium")
    try:
        before = settings_of_products()
        with engine.force("fused"), torch.autocast("cpu", torch.bfloat16), uv.watch(layer):
            layer(x)[0].float().sum().backward()
        assert seen
        assert all(found == ["ieee"] * 3 for found in seen)
        assert settings_of_products() == before
        with full_precision():
            with pytest.raises(KeyError), full_precision():
                raise KeyError
            assert settings_of_products() == ["ieee"] * 3
        assert settings_of_products() == before
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_settings_that_a_library_has_frozen_are_no_obstacle() -> None:
    """As torch's own test library does when it is imported."""
    layer, x, before = nn.GRU(2, 3), torch.randn(4, 2, 2), settings_of_products()
    with torch_internals.writable_backends():
        torch.backends.disable_global_flags()  # undone at the end of the block
        with uv.watch(layer) as flow, full_precision():
            assert torch.backends.flags_frozen()
            assert settings_of_products() == ["ieee"] * 3
            layer(x)[0].sum().backward()
        assert flow["l0"].valid
        assert settings_of_products() == before


def test_tf32_is_read_from_the_setting_of_the_kernel_that_runs() -> None:
    backends: Any = torch.backends
    before = settings_of_products()
    try:
        for rnn, products in (("ieee", "tf32"), ("tf32", "ieee")):
            backends.cudnn.rnn.fp32_precision, backends.cuda.matmul.fp32_precision = rnn, products
            assert (rounds_to_tf32(cudnn=True), rounds_to_tf32(cudnn=False)) == (rnn == "tf32", products == "tf32")
    finally:
        backends.cuda.matmul.fp32_precision, backends.cudnn.rnn.fp32_precision = before[:2]
    assert settings_of_products() == before


def test_settings_of_products_go_on_following_the_one_above_them() -> None:
    generic: Any = torch.backends
    before = settings_of_products()
    try:
        for value in ("ieee", "tf32", "none"):
            with torch_internals.writable_backends():
                generic.fp32_precision = value
            now = settings_of_products()
            with full_precision():
                assert settings_of_products() == ["ieee"] * 3
            assert settings_of_products() == now
    finally:
        with torch_internals.writable_backends():
            generic.fp32_precision = "none"
    assert settings_of_products() == before


def test_a_graph_is_kept_only_for_an_adjoint_that_follows_and_a_short_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = CELLS["gru"]
    w, x, state = Weights(torch.randn(9, 2), torch.randn(9, 3)), torch.randn(5, 2, 2), (torch.zeros(2, 3),)
    with engine.force("fused"):
        assert not engine.trace(cell, x, state, w).fused.graphs
        assert engine.trace(cell, x, state, w, adjoint_follows=True).fused.graphs
        monkeypatch.setattr(fused, "GRAPH_ELEMENTS", 5 * 2 * 9 - 1)
        assert not engine.trace(cell, x, state, w, adjoint_follows=True).fused.graphs


def test_nothing_that_goes_in_is_changed() -> None:
    torch.manual_seed(0)
    cell = CELLS["lstm"]
    given = [torch.randn(*s) for s in ((5, 2, 2), (2, 3), (2, 3), (12, 2), (12, 3), (12,), (12,), (5, 2, 3))]
    before = copy.deepcopy(given)
    x, h, c, *w, dy = given
    with engine.force("fused"):
        tr = engine.trace(cell, x, (h, c), Weights(*w), torch.tensor([5, 2]), True)
        flow = engine.adjoint(tr, dy, (h, c))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert not any(v.requires_grad for v in (*tr.after, *tr.final, *flow.dstate, *flow.dinitial, flow.da))


class Halved(LSTM):
    """Not torch's step any more."""

    def step(self, p: Any, q: Any, s: Any, v: Any) -> State:  # type: ignore[override]
        h, c = super().step(p, q, s, v)
        return h / 2, c


def test_which_cells_and_options_it_declines_and_why() -> None:
    x = torch.zeros(1, 1, 1)
    assert (
        "no kernel for sequences of a rnn_sigmoid"
        in engine.explain(CELLS["rnn_sigmoid"], torch.zeros(1, 1, 1, dtype=torch.complex64)).declined["fused"]
    )
    assert Halved.torch_kernel is None
    for cell in (Halved(), uv.cells.ZOO["peephole"]()):
        assert "no kernel" in engine.explain(cell, x).declined["fused"]
    empty = torch.zeros(1, 0, 1)
    for like, clip, why in ((x, 1.0, "do not clip"), (x.half(), None, "float32 and float64"), (empty, None, "empty")):
        with pytest.raises(RuntimeError, match=f"'fused' was forced, but can't run here: .*{why}"):
            engine.explain(CELLS["gru"], like, "fused", clip=clip)
    square = (torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(8, 1), torch.zeros(8, 2), None, None, torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="project to a smaller size"):
        engine.explain(CELLS["lstm"], x, "fused", square)
    assert engine.explain(CELLS["lstm"], x, "fused").rung == "fused"
    with engine.force("fused"):
        assert engine.explain(CELLS["gru"], x).rung == "fused"


def test_on_the_cpu_it_runs_only_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unvanish.engine.native.MISSING", "the extension is not built")
    choice = engine.explain(CELLS["lstm"], torch.zeros(1, 1, 1))
    assert choice.rung == "manual"
    assert choice.declined["fused"] == "on the CPU the manual rung is faster"


def test_elsewhere_it_runs_unless_there_is_one_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Any device but the CPU: a tensor without numbers, which the rung itself would decline, stands for it.
    monkeypatch.setattr(fused, "obstacle", lambda *given: None)
    monkeypatch.setattr("unvanish.engine.native.obstacle", lambda *given: "its kernels are for the CPU")
    assert engine.explain(CELLS["lstm"], torch.zeros(2, 1, 1, device="meta")).rung == "fused"
    choice = engine.explain(CELLS["lstm"], torch.zeros(1, 1, 1, device="meta"))
    assert choice.rung == "manual"
    assert "a single step" in choice.declined["fused"]


@pytest.mark.parametrize("name", TORCHS)
def test_a_clipped_gradient_goes_down_the_ladder(name: str) -> None:
    torch.manual_seed(0)
    cell = CELLS[name]
    G, n = len(cell.gates), len(cell.states)
    w = Weights(torch.randn(G * 3, 2).double(), torch.randn(G * 3, 3).double())
    x, dy = torch.randn(6, 2, 2).double(), torch.randn(6, 2, 3).double()
    state, none = tuple(torch.randn(2, 3).double() for _ in cell.states), (None,) * n
    expected = manual.adjoint(manual.trace(cell, x, state, w), dy, none, 0.1)
    with engine.force("fused"):
        tr = engine.trace(cell, x, state, w)
        with pytest.raises(RuntimeError, match="do not clip"):
            engine.adjoint(tr, dy, none, 0.1)
    torch.testing.assert_close(engine.adjoint(tr, dy, none, 0.1).dstate, expected.dstate, **EXACT)


def test_a_watch_says_what_a_forced_rung_could_not_record() -> None:
    layer = uv.nn.LSTM(2, 3)
    layer.clip = 0.1
    with engine.force("manual"):
        y = layer(torch.randn(4, 2, 2))[0]
    assert math.isfinite(float(y.detach().sum()))
    with pytest.raises(RuntimeError, match="do not clip"), engine.force("fused"):
        layer(torch.randn(4, 2, 2))


def test_dropout_between_layers_inside_cudnn_is_named_and_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors without numbers stand for those of a GPU: they are not on the CPU either.
    monkeypatch.setattr("unvanish.capture.calls.unseen", lambda tensors: None)
    layer = nn.LSTM(3, 5, num_layers=2, dropout=0.5, device="meta")
    with uv.watch(layer) as flow:
        layer(torch.randn(4, 2, 3, device="meta"))
    assert "drawn inside cuDNN" in flow.skipped[""]


@pytest.mark.parametrize("name", TORCHS)
def test_a_layers_own_pass_goes_back_as_often_as_its_graph_is_kept(name: str) -> None:
    torch.manual_seed(0)
    cell = CELLS[name]
    G, lengths = len(cell.gates), torch.tensor([0, 5, 3])
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    w = Weights(*(torch.randn(G * 4, n, dtype=torch.float64, requires_grad=True) for n in (2, 4)))
    state = tuple(torch.randn(3, 4, dtype=torch.float64) for _ in cell.states)
    y, final = engine.run(cell, x, state, w, lengths, rung="fused")
    error = y.square().sum() + final[-1].sum()
    wanted: list[Any] = [x, w.w_hh]
    first = torch.autograd.grad(error, wanted, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(error, wanted), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(error, wanted)
    assert not first[0][:, 0].any()
    with torch.no_grad():
        assert not engine.run(cell, x, state, w, lengths, rung="fused")[0].requires_grad
