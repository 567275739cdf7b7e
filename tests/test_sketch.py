"""Gradients compared by a few random combinations of their rows."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import unvanish as uv
from tests.strategies import LayerCase, layer_cases, runs
from tests.test_native import isa, layer, threads
from unvanish import engine
from unvanish.cells import CELLS, Weights
from unvanish.engine import native
from unvanish.flow import module_sequence
from unvanish.flow.sketch import probes, sketch, sketches_of
from unvanish.nn.modules import LayerDirection

__all__ = ["isa", "threads"]

NATIVE = pytest.mark.skipif(bool(native.MISSING), reason=f"native rung: {native.MISSING}")


def test_the_norm_of_a_sketch_is_that_of_the_gradient_on_average() -> None:
    """The worst case is a gradient of one column: each probe gives one number."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for rows in range(20, 520):
        g = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
        ratios.append(float(sketch(g).square().sum() / g.square().sum()))
    found = torch.tensor(ratios)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(found.std()) == pytest.approx((2 / native.PROBES) ** 0.5, rel=0.15)


def test_probes_are_independent_of_each_other_and_always_the_same() -> None:
    u = probes(4096, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(u.mT @ u / 256, torch.eye(native.PROBES, dtype=torch.float64), rtol=0, atol=0.06)
    probes.cache_clear()
    assert torch.equal(u, probes(4096, torch.float64, torch.device("cpu")))


@NATIVE
@pytest.mark.parametrize("name", list(CELLS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    ("T", "B", "n_in", "H", "P", "ragged"),
    [(200, 9, 5, 17, 0, True), (9, 70, 3, 33, 7, False), (130, 2, 4, 8, 0, True), (200, 1, 40, 200, 0, False)],
)
def test_the_kernels_sketch_is_that_of_the_gradients(
    isa: str, name: str, dtype: torch.dtype, tolerance: float, T: int, B: int, n_in: int, H: int, P: int, ragged: bool
) -> None:
    case = layer(name, T, B, n_in, H, dtype, P if name == "lstm" else 0)
    lengths = torch.randint(0, T + 1, (B,), generator=torch.Generator().manual_seed(T)) if ragged else None
    state = tuple(s.detach() for s in case.state)
    ran = engine.Pass(case.cell, case.x.detach(), state, case.weights.detach(), lengths, ragged)
    errors = torch.randn_like(ran.y), tuple(torch.randn_like(s) for s in ran.final)
    dx, norms, whole = ran.back(*errors, None, True)
    u = probes(len(case.weights.w_ih), dtype, ran.y.device)
    same_dx, same_norms, found = ran.back(*errors, None, True, probes=u)
    assert dx is not None
    assert same_dx is not None
    assert torch.equal(same_dx, dx)
    assert all(a is b or torch.equal(a, b) for a, b in zip(same_norms, norms, strict=True))  # type: ignore[arg-type]
    for sketched, gradient in ((found.w_ih, whole.w_ih), (found.w_hh, whole.w_hh)):
        assert sketched is not None
        assert gradient is not None
        right = sketch(gradient)
        assert float((sketched - right).norm()) <= tolerance * float(right.norm())


@pytest.mark.parametrize("rung", ["native", "fused", "manual"])
@given(case=layer_cases(), seed=st.integers(0, 99))
def test_sketches_without_gradients_are_those_of_the_gradients(rung: str, case: LayerCase, seed: int) -> None:
    assume(runs(rung, case))
    state, generator = tuple(s.detach() for s in case.state), torch.Generator().manual_seed(seed)
    with engine.force(rung), torch.no_grad():
        tr = engine.trace(case.cell, case.x.detach(), state, case.weights.detach(), case.lengths, case.reverse)
        dy = torch.randn(tr.y.shape, generator=generator, dtype=torch.float64)
        flow = engine.adjoint(tr, dy, (None,) * len(state))
    whole = engine.weight_gradients(tr, flow)
    for found, gradient in zip(sketches_of(tr, replace(flow, weights=None)), whole[:2], strict=True):
        assert found is not None
        assert gradient is not None
        torch.testing.assert_close(found, sketch(gradient), rtol=1e-10, atol=1e-10)


@NATIVE
@pytest.mark.parametrize("name", list(CELLS))
@pytest.mark.parametrize("B", [1, 33])
def test_sketches_are_bitwise_the_same_for_any_number_of_threads(name: str, B: int, threads: None) -> None:
    case, found = layer(name, 100, B, 40, 150), []
    state = tuple(s.detach() for s in case.state)
    ran = engine.Pass(case.cell, case.x.detach(), state, case.weights.detach(), None, False)
    error, u = torch.randn_like(ran.y), probes(len(case.weights.w_ih), torch.float32, ran.y.device)
    for count in (1, 2, 3, 4, 3, 4, 3, 4, 2):
        torch.set_num_threads(count)
        # Memory that a pass reads too early holds another one's numbers.
        for sign in (-1, 1):
            _, _, gradients = ran.back(sign * error, (None,) * len(state), None, False, probes=u)
        found.append(gradients[:2])
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, found[0], strict=True))


@NATIVE
def test_probes_that_do_not_fit_are_refused() -> None:
    case = layer("gru", 3, 2, 2, 4)
    ran = engine.Pass(case.cell, case.x.detach(), (case.state[0].detach(),), case.weights.detach(), None, False)
    u = probes(12, torch.float32, ran.y.device)
    with pytest.raises(ValueError, match=r"probes: expected \(12, 16\), got \(11, 16\)"):
        ran.back(None, (None,), None, False, probes=u[:11])
    with pytest.raises(ValueError, match="probes: expected contiguous"):
        ran.back(None, (None,), None, False, probes=u.mT.contiguous().mT)
    with pytest.raises(RuntimeError, match=r"probes: expected torch\.float32"):
        ran.back(None, (None,), None, False, probes=u.double())


@NATIVE
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_residual_is_the_relative_difference_of_the_whole_gradients(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.RNNBase]
) -> None:
    torch.manual_seed(0)
    model, x = kind(6, 20, dtype=torch.float64), torch.randn(12, 5, 6, dtype=torch.float64)
    right, error = module_sequence.layer_directions, torch.randn(12, 5, 20, dtype=torch.float64)

    def changed(module: nn.RNNBase, weights: Any) -> list[LayerDirection]:
        (only,) = right(module, weights)
        w_ih, w_hh, *biases = (None if w is None else w.detach() for w in only.weights)
        return [only._replace(weights=Weights(w_ih, 1.1 * w_hh, *biases))]  # type: ignore[arg-type, operator]

    monkeypatch.setattr(module_sequence, "layer_directions", changed)
    with uv.watch(model) as flow:
        (model(x)[0] * error).sum().backward()
    ((cell, weights, *_),) = changed(model, model._flat_weights)
    state = cell.start(x, (20, 20)[: len(cell.states)])
    _, _, mine = engine.Pass(cell, x, state, weights, None, False).back(error, (None,) * len(state), None, False)
    pairs = (mine.w_ih, model.weight_ih_l0.grad), (mine.w_hh, model.weight_hh_l0.grad)
    apart = sum(float((a - b).square().sum()) for a, b in pairs)  # type: ignore[operator]
    exact = (apart / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5  # type: ignore[union-attr]
    assert exact > 1e-2
    assert flow["l0"].residual == pytest.approx(exact, rel=0.4)


@NATIVE
def test_a_weight_of_recorded_and_replayed_calls_has_both_gradients() -> None:
    layer, x = uv.nn.GRU(3, 5, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)
    with uv.watch(layer) as flow:
        # The kernels can't read a tensor with its negation pending.
        (layer(x)[0].sum() + layer(torch._neg_view(x))[0].square().sum()).backward()
    recorded, replayed = flow.passes("l0")
    assert math.isnan(recorded.residual)
    assert replayed.residual <= 1e-12


def test_a_residual_is_not_rounded_by_autocast() -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(8, 32), torch.randn(20, 4, 8)
    with uv.watch(model) as flow:
        loss = model(x)[0].square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
    assert flow["l0"].residual < 1e-5
