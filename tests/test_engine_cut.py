"""`cut` in the engine: at the steps that it names the recurrent matrices hand nothing back, on every rung that can."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import plain_loops
from tests.strategies import LayerCase, layer_cases, runs
from unvanish import engine
from unvanish.cells import CELLS, Weights
from unvanish.engine import native, stepped

RUNGS = ["native", "manual", "reference"]
pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=f"native rung: {native.MISSING}")


def errors(case: LayerCase, seed: int) -> list[Tensor]:
    """∂E/∂(y, final states)"""
    make = torch.Generator().manual_seed(seed)
    like = (torch.empty(*case.x.shape[:2], case.state[0].shape[1]), *case.state)
    return [torch.randn(v.shape, generator=make, dtype=case.x.dtype) for v in like]


def outcome(case: LayerCase, cut: Tensor | None, rung: str, seed: int, clip: float | None = None) -> list[Tensor]:
    """Outputs and all gradients."""
    y, final = engine.run(
        case.cell, case.x, case.state, case.weights, case.lengths, case.reverse, clip, rung=rung, cut=cut
    )
    found = torch.autograd.grad((y, *final), case.inputs, errors(case, seed), allow_unused=True, materialize_grads=True)
    return [v.detach() for v in (y, *final, *found)]


def plain(case: LayerCase, cut: Tensor, seed: int) -> list[Tensor]:
    lengths = None if case.lengths is None else case.lengths.tolist()
    y, final = plain_loops.run(case.cell.name, case.x, case.state, case.weights, lengths, case.reverse, cut.tolist())
    found = torch.autograd.grad((y, *final), case.inputs, errors(case, seed), allow_unused=True, materialize_grads=True)
    return [v.detach() for v in (y, *final, *found)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """To rounding, of what the largest entry of each tensor or 1 is."""
    for a, b in zip(found, expected, strict=True):
        size = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a.to(b.dtype), b, rtol=tolerance, atol=tolerance * size)


def cuts(T: int) -> st.SearchStrategy[Tensor]:
    """Mostly some of the steps: lists that hypothesis makes of booleans are all alike too often."""

    def drawn(p: float, seed: int) -> Tensor:
        return torch.rand(T, generator=torch.Generator().manual_seed(seed)) < p

    return st.builds(drawn, st.sampled_from([0.5, 0.3, 0.7, 0.5, 0.0, 1.0]), st.integers(0, 2**31))


@pytest.mark.parametrize("rung", RUNGS)
@given(case=layer_cases(), data=st.data(), seed=st.integers(0, 99))
def test_is_the_loop_that_detaches_h(rung: str, case: LayerCase, data: Any, seed: int) -> None:
    cut = data.draw(cuts(len(case.x)))
    close(outcome(case, cut, rung, seed), plain(case, cut, seed), 1e-12)


@given(case=layer_cases(), data=st.data(), seed=st.integers(0, 99))
def test_float32_is_close_to_it(case: LayerCase, data: Any, seed: int) -> None:
    def narrow(v: Tensor | None) -> Any:
        return None if v is None else v.detach().float().requires_grad_()

    cut = data.draw(cuts(len(case.x)))
    weights = Weights(*map(narrow, case.weights))
    same = LayerCase(case.cell, narrow(case.x), tuple(map(narrow, case.state)), weights, case.lengths, case.reverse)
    wide = [v.double() for v in errors(same, seed)]
    lengths = None if case.lengths is None else case.lengths.tolist()
    y, final = plain_loops.run(case.cell.name, case.x, case.state, case.weights, lengths, case.reverse, cut.tolist())
    found = torch.autograd.grad((y, *final), case.inputs, wide, allow_unused=True, materialize_grads=True)
    close(outcome(same, cut, "native", seed), [v.detach() for v in (y, *final, *found)], 1e-4)


@pytest.mark.parametrize("rung", ["native", "manual"])
@given(case=layer_cases(), data=st.data(), clip=st.none() | st.floats(0.05, 2), seed=st.integers(0, 99))
def test_with_clip_it_is_the_reference(rung: str, case: LayerCase, data: Any, clip: float | None, seed: int) -> None:
    cut = data.draw(cuts(len(case.x)))
    close(outcome(case, cut, rung, seed, clip), outcome(case, cut, "reference", seed, clip), 1e-11)


def layer(name: str, T: int, B: int, n_in: int, H: int, dtype: torch.dtype = torch.float32) -> LayerCase:
    make, G = torch.Generator().manual_seed(0), len(CELLS[name].gates)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=make, dtype=dtype) / H**0.5).requires_grad_()

    weights = Weights(normal(G * H, n_in), normal(G * H, H), normal(G * H), normal(G * H))
    state = tuple(normal(B, H) for _ in CELLS[name].states)
    return LayerCase(CELLS[name], normal(T, B, n_in), state, weights, None, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize(("B", "H"), [(1, 200), (3, 130), (40, 33)])
def test_bits_do_not_depend_on_the_number_of_threads(name: str, B: int, H: int, dtype: torch.dtype) -> None:
    """A team of threads works on one block where there are few samples."""
    case = layer(name, 30, B, 20, H, dtype)
    cut = torch.rand(30, generator=torch.Generator().manual_seed(1)) < 0.5
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(outcome(case, cut, "native", 0))
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    close(found[0], outcome(case, cut, "reference", 0), tolerance)
    uncut = outcome(case, torch.zeros(30, dtype=torch.bool), "native", 0)
    without = outcome(case, None, "native", 0)
    assert all(torch.equal(a, b) for a, b in zip(uncut, without, strict=True))
    assert not torch.allclose(found[0][1 + len(case.state)], without[1 + len(case.state)])


@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru"])
def test_is_the_slope_where_what_is_read_at_cut_steps_stays_as_it_is(name: str) -> None:
    """Without autograd: E changes by ⟨∂E/∂W, D⟩ ε where W moves by ε D and the matrices go on reading the h that they
    read at the cut steps before."""
    case = layer(name, 6, 1, 2, 4, torch.float64)
    cut, d = [False, True, False, True, True, False], errors(case, 3)[0]
    w = case.weights
    move = torch.randn(w.w_hh.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # type: ignore[union-attr]

    def value(shift: float, frozen: list[Tensor] | None) -> tuple[float, list[Tensor]]:
        moved, state, read, total = w.w_hh + shift * move, tuple(s[0] for s in case.state), [], 0.0
        for t, stops in enumerate(cut):
            read.append(frozen[t] if frozen is not None and stops else state[0])
            state = plain_loops.step(name, w.w_ih @ case.x[t, 0] + w.b_ih, read[t], state, w, moved)
            total += float((d[t, 0] * state[0]).sum())
        return total, read

    with torch.no_grad():
        _, at_rest = value(0.0, None)
        slope = (value(1e-6, at_rest)[0] - value(-1e-6, at_rest)[0]) / 2e-6
    y, _ = engine.run(case.cell, case.x, case.state, w, rung="native", cut=torch.tensor(cut))
    (found,) = torch.autograd.grad(y, w.w_hh, d)  # type: ignore[arg-type]
    assert float((found * move).sum()) == pytest.approx(slope, rel=1e-7)


@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru"])
def test_gradients_of_the_gradient_are_the_reference_s(name: str) -> None:
    case = layer(name, 5, 2, 2, 3, torch.float64)
    cut, found = torch.tensor([False, True, True, False, True]), []
    for rung in RUNGS:
        y, _ = engine.run(case.cell, case.x, case.state, case.weights, rung=rung, cut=cut)
        first = torch.autograd.grad(y.square().sum(), case.inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(penalty, case.inputs, allow_unused=True, materialize_grads=True))  # type: ignore[arg-type]
    for other in found[:-1]:
        torch.testing.assert_close(other, found[-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("cut", "error", "message"),
    [
        (torch.ones(3, dtype=torch.bool), ValueError, r"cut: expected \(4,\), one per step"),
        (torch.ones(4, 2, dtype=torch.bool), ValueError, r"cut: expected \(4,\), one per step"),
        (torch.ones(4), RuntimeError, "cut: expected bool on the CPU"),
        (torch.ones(4, dtype=torch.bool).to_sparse(), RuntimeError, "cut: expected bool on the CPU"),
    ],
)
def test_operators_check_their_cut(cut: Tensor, error: type[Exception], message: str) -> None:
    case = layer("gru", 4, 2, 2, 3)
    given = (case.x, case.state[0], None, *case.weights[:5], None, cut)
    with pytest.raises(error, match=message):
        torch.ops.unvanish.forward(*given, native.NUMBER["gru"], False, 0.0, True, 0.0)


@pytest.mark.parametrize("cut", [torch.ones(4), torch.ones(3, dtype=torch.bool), torch.ones(4, 1, dtype=torch.bool)])
def test_the_engine_checks_its_cut(cut: Tensor) -> None:
    case = layer("gru", 4, 2, 2, 3)
    with pytest.raises(ValueError, match=r"^cut: expected \(4,\) of torch.bool on the CPU"):
        engine.run(case.cell, case.x, case.state, case.weights, cut=cut)
    tr = engine.trace(case.cell, case.x.detach(), tuple(s.detach() for s in case.state), case.weights.detach())
    with pytest.raises(ValueError, match=r"^cut: expected"):
        engine.adjoint(tr, None, (None,), cut=cut)
    ran = engine.Pass(
        case.cell, case.x.detach(), tuple(s.detach() for s in case.state), case.weights.detach(), None, False
    )
    with pytest.raises(ValueError, match=r"^cut: expected"):
        ran.back(None, (None,), None, want_dx=False, cut=cut)


def test_a_strided_cut_is_read_as_it_is() -> None:
    case = layer("lstm", 6, 2, 2, 3, torch.float64)
    wide = torch.tensor([True, False, True, True, False, False, True, True, False, False, True, True])
    for rung in RUNGS:
        close(outcome(case, wide[::2], rung, 0), outcome(case, wide[::2].clone(), "reference", 0), 1e-12)


def test_the_native_rung_runs_and_the_fused_one_says_why_it_can_not() -> None:
    x = torch.zeros(5, 2, 3)
    for name in ("rnn_tanh", "lstm", "gru"):
        assert engine.explain(CELLS[name], x, cut=True).rung == "native"
        with pytest.raises(
            RuntimeError, match="can't run here: torch's kernels hand the gradient through the recurrent"
        ):
            engine.explain(CELLS[name], x, "fused", cut=True)
    half = engine.explain(CELLS["lstm"], x.bfloat16(), cut=True)
    assert half.rung == "manual"
    elsewhere = engine.explain(CELLS["lstm"], torch.zeros(5, 2, 3, device="meta"), cut=True)
    assert elsewhere.rung == "manual"
    assert "recurrent matrices" in elsewhere.declined["fused"]


@contextmanager
def in_torch_operations() -> Iterator[None]:
    """No cell has programs of its step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepped, "obstacle", lambda *_: "none here")
        yield


@given(case=layer_cases(), data=st.data(), seed=st.integers(0, 99))
def test_in_torch_operations_it_is_the_loop_too(case: LayerCase, data: Any, seed: int) -> None:
    cut = data.draw(cuts(len(case.x)))
    with in_torch_operations():
        close(outcome(case, cut, "manual", seed), plain(case, cut, seed), 1e-12)


@pytest.mark.parametrize("way", ["native", "programs", "torch operations", "fused"])
@settings(max_examples=30)
@given(case=layer_cases(), data=st.data(), seed=st.integers(0, 99))
def test_the_adjoint_of_a_trace_is_that_of_the_loop(way: str, case: LayerCase, data: Any, seed: int) -> None:
    """The fused rung's trace is taken back by the manual one."""
    rung = way if way in engine.RUNGS else "manual"
    assume(runs(rung, case))
    cut = data.draw(cuts(len(case.x)))
    with in_torch_operations() if way == "torch operations" else nullcontext():
        state = tuple(s.detach() for s in case.state)
        with engine.force(rung):
            tr = engine.trace(case.cell, case.x.detach(), state, case.weights.detach(), case.lengths, case.reverse)
        dy, *dfinal = errors(case, seed)
        flow = engine.adjoint(tr, dy, tuple(dfinal), cut=cut)
    steps = plain_loops.Steps()
    lengths = None if case.lengths is None else case.lengths.tolist()
    y, final = plain_loops.run(
        case.cell.name, case.x, case.state, case.weights, lengths, case.reverse, cut.tolist(), steps
    )
    tolerance = 1e-11 if way == "fused" else 1e-12
    asked = [*steps.h.values(), *steps.c.values(), *steps.a.values()]
    found = (
        torch.autograd.grad((y, *final), asked, [dy, *dfinal], allow_unused=True, materialize_grads=True)
        if asked
        else []
    )
    by_kind = zip((steps.h, steps.c, steps.a), (flow.dstate[0], flow.dstate[-1], flow.da), strict=True)
    k = 0
    for kind, delta in by_kind:
        size = max(1.0, float(delta.abs().max()))
        for t, b in kind:
            torch.testing.assert_close(delta[t, b], found[k], rtol=tolerance, atol=tolerance * size)
            k += 1
    expected = outcome(case, cut, "reference", seed)[1 + len(case.state) :]
    weights = [g for g in engine.weight_gradients(tr, flow) if g is not None]
    close([*flow.dinitial, *weights], expected[1:], 1e-11)


@pytest.mark.parametrize("lengths", [None, [2, 6, 4]])
@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru"])
def test_a_recorded_pass_computed_again_is_cut_as_it_was(name: str, lengths: list[int] | None) -> None:
    """Where a NaN turns up, the pass is computed again with every δ kept."""
    case = layer(name, 6, 3, 2, 4, torch.float64)
    case.lengths = None if lengths is None else torch.tensor(lengths)
    cut = torch.tensor([False, True, True, False, True, False])
    again: list[Any] = []

    class Heard:
        awaits_backward = True

        def forward(self, statistics: engine.Statistics) -> None:
            pass

        def backward(self, norms: engine.Norms, gradients: Weights, recompute: engine.Recompute) -> None:
            again.extend((norms, recompute()))

    given = (case.cell, case.x, case.state, case.weights, case.lengths)
    y, final = engine.run(*given, record=Heard(), cut=cut)
    torch.autograd.backward((y, *final), errors(case, 2))
    detached = (case.cell, case.x.detach(), tuple(s.detach() for s in case.state), case.weights.detach(), case.lengths)
    ran = engine.Pass(*detached, False)
    dy, *dfinal = errors(case, 2)
    ran.back(dy, tuple(dfinal), None, False, cut)
    norms, (_, _, flow) = again
    for found in (flow, ran.recompute(dy, tuple(dfinal), None, cut)[2]):
        torch.testing.assert_close(found.dstate[0].norm(dim=-1), norms.h, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.da.unflatten(-1, (-1, 4)).norm(dim=-1), norms.a, rtol=1e-12, atol=1e-14)
