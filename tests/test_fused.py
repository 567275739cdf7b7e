"""The fused rung: torch's own kernels give, through the gradient of their input, all that the manual rung does."""

from typing import cast

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import unvanish as uv
from tests.fused_traces import EXACT, TORCHS, everything, pieces_of, present, traced
from tests.low_precision import skip_where_torch_raises
from tests.strategies import LayerCase, ModuleCase, layer_cases, module_cases, runs
from tests.test_watch import CellLoop, project_out
from unvanish import engine
from unvanish.cells import CELLS, Weights
from unvanish.engine.scan import scan_


@given(
    case=layer_cases(torch.float64, tuple(TORCHS)),
    seed=st.integers(0, 99),
    which=st.integers(0, 7),
    steps=st.sampled_from([1, 2, 100]),
    follows=st.booleans(),
)
def test_states_gates_and_errors_are_those_of_the_manual_rung(
    case: LayerCase, seed: int, which: int, steps: int, follows: bool
) -> None:
    assume(runs("fused", case))
    generator = torch.Generator().manual_seed(seed)
    outputs = (case.x.new_empty(*case.x.shape[:2], case.state[0].shape[1]), *case.state)
    drawn = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in outputs]
    dy, *dfinal = (d if which >> i & 1 else None for i, d in enumerate(drawn))
    expected = everything(*traced(case, "manual", dy, tuple(dfinal), follows))
    with pieces_of(steps):
        tr, flow = traced(case, "fused", dy, tuple(dfinal), follows)
        torch.testing.assert_close(everything(tr, flow), expected, **EXACT)
        assert all(torch.equal(v, cast(Tensor, present(v, tr))) for v in (*tr.after, *flow.dstate, flow.da))
        # Again: the graphs are used up.
        assert not tr.fused.graphs
        torch.testing.assert_close(everything(tr, engine.adjoint(tr, dy, tuple(dfinal))), expected, **EXACT)


@given(case=module_cases(projections=False), seed=st.integers(0, 99), partial=st.booleans())
def test_a_watch_records_the_same_as_on_the_manual_rung(case: ModuleCase, seed: int, partial: bool) -> None:
    flows = []
    for rung in ("manual", "fused"):
        with engine.force(rung), uv.watch(case.module, partial=partial) as flow:
            project_out(case.module(case.x, case.hx), seed).backward()
        flows.append(flow)
    assert not flows[1].skipped
    for name, record in flows[0].items():
        assert flows[1][name].valid
        assert flows[1][name].residual < 1e-10
        for field, value in record.tensors().items():
            if field != "residual":
                torch.testing.assert_close(
                    flows[1][name].tensors()[field], value, rtol=1e-11, atol=1e-12, equal_nan=True
                )


@given(case=module_cases(), seed=st.integers(0, 99))
def test_a_watch_records_what_a_loop_of_cells_with_retain_grad_gives(case: ModuleCase, seed: int) -> None:
    with engine.force("fused"), uv.watch(case.module) as flow:
        project_out(case.module(case.x, case.hx), seed).backward()
    loop = CellLoop(case)
    project_out(loop.run(), seed).backward()
    for name in case.names:
        record = flow[name]
        torch.testing.assert_close(record.dh, loop.norms(loop.h, name), rtol=1e-12, atol=1e-15)
        if record.dc is not None:
            torch.testing.assert_close(record.dc, loop.norms(loop.c, name), rtol=1e-12, atol=1e-15)
        assert record.residual <= 1e-12


@given(T=st.integers(1, 40), seed=st.integers(0, 99), backwards=st.booleans(), zeros=st.booleans())
def test_a_scan_is_the_recurrence(T: int, seed: int, backwards: bool, zeros: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep, add = torch.randn(2, T, 3, generator=generator, dtype=torch.float64)
    if zeros:
        keep = keep * (keep > 0)
    expected, now = torch.empty_like(add), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(T)) if backwards else range(T):
        expected[t] = now = keep[t] * now + add[t]
    torch.testing.assert_close(scan_(keep, add.clone(), backwards), expected, **EXACT)


def test_a_scan_keeps_its_relative_precision_down_to_the_end_of_float32() -> None:
    torch.manual_seed(0)
    T = 1000
    keep, add = 0.88 + 0.05 * torch.rand(T, 64), torch.zeros(T, 64)
    add[-1] = torch.randn(64)
    exact = scan_(keep.double(), add.double(), backwards=True)
    found = scan_(keep, add.clone(), backwards=True)
    there = exact.abs() > 1e-37
    assert float(exact[there].abs().min()) < 2e-37
    assert float(((found - exact) / exact)[there].abs().max()) < 2e-6


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_gradient_that_has_vanished_to_1e37_is_right_in_float32(name: str, reverse: bool) -> None:
    torch.manual_seed(0)
    cell, (T, B, H) = CELLS[name], (400, 2, 8)
    G = len(cell.gates)
    w = Weights(torch.zeros(G * H, 3), 0.05 * torch.randn(G * H, H), torch.zeros(G * H), torch.zeros(G * H))
    assert w.b_ih is not None
    w.b_ih[H : 2 * H] = 1.4  # f or z ≈ 0.8
    x, state = torch.randn(T, B, 3), tuple(torch.zeros(B, H) for _ in cell.states)
    dy = torch.zeros(T, B, H)
    dy[0 if reverse else -1] = torch.randn(B, H)
    case = LayerCase(cell, x, state, w, None, reverse)
    exact = LayerCase(cell, x.double(), tuple(s.double() for s in state), w.to(torch.float64), None, reverse)
    none = (None,) * len(state)
    right = traced(exact, "reference", dy.double(), none, False)[1].dstate[-1]
    found = traced(case, "fused", dy, none, False)[1].dstate[-1]
    sizes = right.norm(dim=-1)
    seen = (sizes > 1e-36) & (sizes < 1e-30)
    assert seen.any()
    assert float(((found - right).norm(dim=-1) / sizes)[seen].max()) < 1e-4
    assert float(((found - right).norm(dim=-1) / sizes)[sizes > 1e-20].max()) < 5e-5


def test_infinite_pre_activations_saturate_their_gate_alone() -> None:
    torch.manual_seed(0)
    cell, H = CELLS["lstm"], 3
    w = Weights(torch.randn(4 * H, 2), torch.randn(4 * H, H))
    w.w_ih[4, 0] = torch.inf
    x = torch.randn(5, 2, 2).abs()
    case = LayerCase(cell, x, (torch.zeros(2, H), torch.zeros(2, H)), w, None, False)
    dy = torch.randn(5, 2, H)
    found, right = (traced(case, rung, dy, (None, None), False) for rung in ("fused", "manual"))
    for a, b in zip((*found[0].after, *found[1].dstate), (*right[0].after, *right[1].dstate), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["eval", "frozen", "autocast"])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_layer_in_another_state_than_training_in_float32(kind: str, form: str) -> None:
    if form == "autocast":
        skip_where_torch_raises(kind)
    torch.manual_seed(0)
    layer, x = getattr(nn, kind)(3, 4, num_layers=2, dropout=0.5 if form == "eval" else 0.0), torch.randn(6, 2, 3)
    x.requires_grad_()
    if form == "eval":
        layer.eval()
    if form == "frozen":
        layer.requires_grad_(False)
    flows = []
    for rung in ("manual", "fused"):
        with engine.force(rung), uv.watch(layer) as flow:
            with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
                y = layer(x)[0]
            y.float().square().sum().backward()
        flows.append(flow)
    assert not flows[1].skipped
    for name in ("l0", "l1"):
        for field in ("dh", "dgates", "dweight", "gates"):
            found, right = (getattr(flow[name], field) for flow in flows)
            torch.testing.assert_close(found, right, rtol=2e-5, atol=1e-7)


def test_several_backwards_through_a_graph_that_is_kept_add_up() -> None:
    torch.manual_seed(0)
    layer, x = nn.LSTM(3, 4, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)
    flows = []
    for rung in ("manual", "fused"):
        with engine.force(rung), uv.watch(layer) as flow:
            y, (h, _) = layer(x)
            y[2].square().sum().backward(retain_graph=True)
            h.sum().backward()
        flows.append([record for name in ("l0",) for record in flow.passes(name)])
    for found, right in zip(*flows, strict=True):
        torch.testing.assert_close(found.tensors(), right.tensors(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_every_measure_is_the_same(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = getattr(nn, kind)(3, 4, num_layers=2, dtype=torch.float64), torch.randn(7, 2, 3, dtype=torch.float64)
    error = torch.randn(7, 2, 4, dtype=torch.float64)
    found = []
    for rung in ("manual", "fused"):
        with engine.force(rung):
            found.append(
                [
                    uv.flow.adjoint_map(layer, x, error=error, at="l0").log_norms,
                    *(term.log_norm for term in uv.flow.decompose(layer, x, error=error).terms.values()),
                    uv.flow.gate_statistics(layer, x).mean,
                    uv.flow.gate_statistics(layer, x).saturation,
                    uv.flow.source_gradients(layer, x, error=error).log_norms,
                    uv.flow.lyapunov(layer, x, n=2).exponents,
                ]
            )
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_states_of_our_layers_come_from_the_output() -> None:
    torch.manual_seed(0)
    layer, x = uv.nn.LSTM(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64), torch.randn(6, 3, 3).double()
    found = []
    with torch.no_grad():
        for rung in ("manual", "fused"):
            with engine.force(rung):
                states = layer.states(x, lengths=[6, 0, 4])
            found.append([v for one in states.values() for v in (*one.states.values(), *one.gates.values())])
    torch.testing.assert_close(*found, **EXACT)


@given(case=layer_cases(torch.float64, tuple(TORCHS)), seed=st.integers(0, 99))
def test_states_and_gates_are_differentiable(case: LayerCase, seed: int) -> None:
    assume(runs("fused", case))
    found = []
    for rung in ("manual", "fused"):
        with engine.force(rung):
            tr = engine.trace(case.cell, case.x, case.state, case.weights, case.lengths, case.reverse)
        out = [present(v, tr) for v in (*tr.before, *tr.after, tr.gates)] + [*tr.final]
        generator = torch.Generator().manual_seed(seed)
        error = sum(
            (torch.randn(v.shape, generator=generator, dtype=v.dtype) * v).square().sum() for v in out if v is not None
        )
        assert isinstance(error, Tensor)
        gradients = torch.autograd.grad(
            error, case.inputs, allow_unused=True, materialize_grads=True, create_graph=True
        )
        again = sum(g.square().sum() for g in gradients)
        assert isinstance(again, Tensor)
        second = torch.autograd.grad(again, case.inputs, allow_unused=True, materialize_grads=True)
        found.append([*out, *gradients, *second])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_differentiable_states_of_ragged_samples_start_and_end_where_theirs_do(reverse: bool) -> None:
    torch.manual_seed(0)
    x, state = torch.randn(5, 3, 2).double(), (torch.randn(3, 4).double(), torch.randn(3, 4).double())
    w = Weights(torch.randn(16, 2).double().requires_grad_(), torch.randn(16, 4).double())
    found = []
    for rung in ("manual", "fused"):
        with engine.force(rung):
            tr = engine.trace(CELLS["lstm"], x, state, w, torch.tensor([2, 5, 0]), reverse)
        found.append([*tr.after, *tr.final, *(present(s, tr) for s in tr.before)])
    torch.testing.assert_close(*found, **EXACT)
