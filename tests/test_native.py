"""The kernels: right on every instruction set and shape, and bitwise the same whoever runs them."""

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import unvanish as uv
from tests.strategies import LayerCase, layer_cases
from tests.test_engine import outcome
from unvanish.cells import CELLS, Weights
from unvanish.engine import native, native_trace, operators
from unvanish.engine.sequence import sort

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=f"native rung: {native.MISSING}")


def runs(isa: str) -> bool:
    os.environ["UNVANISH_ISA"] = isa
    try:
        native.layout(CELLS["lstm"], 4, torch.float32)
    except ValueError:
        return False
    finally:
        del os.environ["UNVANISH_ISA"]
    return True


ISAS = [isa for isa in ("baseline", "avx2", "avx512") if not native.MISSING and runs(isa)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("UNVANISH_ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layer(name: str, T: int, B: int, n_in: int, H: int, dtype: torch.dtype = torch.float32, P: int = 0) -> LayerCase:
    """A layer whose states stay bounded, so that rounding errors do too."""
    torch.manual_seed(T + B + H)
    cell, R = CELLS[name], P or H
    G = len(cell.gates)
    shapes = [(G * H, n_in), (G * H, R), (G * H,), (G * H,)] + [(P, H)] * bool(P)
    weights = Weights(*((torch.randn(s, dtype=dtype) / (2 * s[-1] ** 0.5)).requires_grad_() for s in shapes))
    state = tuple(torch.randn(B, n, dtype=dtype).requires_grad_() for n in (R, H)[: len(cell.states)])
    return LayerCase(cell, torch.randn(T, B, n_in, dtype=dtype).requires_grad_(), state, weights, None, False)


@pytest.mark.parametrize("name", list(CELLS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("T", "B", "n_in", "H"), [(1, 1, 1, 1), (3, 7, 1, 17), (40, 33, 5, 64), (9, 70, 65, 15), (200, 4, 3, 130)]
)
def test_every_instruction_set_equals_the_reference(
    isa: str, name: str, dtype: torch.dtype, tolerance: float, T: int, B: int, n_in: int, H: int
) -> None:
    case = layer(name, T, B, n_in, H, dtype)
    found, expected = outcome(case, "native", None, 1), outcome(case, "reference", None, 1)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())


def test_the_projection_of_several_blocks_equals_the_reference(isa: str) -> None:
    torch.manual_seed(0)
    layer, x = uv.nn.LSTM(3, 9, proj_size=4, dtype=torch.float64), torch.randn(50, 40, 3, dtype=torch.float64)
    found = []
    for rung in ("native", "reference"):
        layer.zero_grad()
        with uv.engine.force(rung):
            layer(x)[0].sin().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", list(CELLS))
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 9, 6, 4, 1, 0])])
def test_the_output_given_away_is_the_one_that_is_kept(isa: str, name: str, lengths: Tensor | None) -> None:
    for P in (0, 4) if name == "lstm" else (0,):
        case = layer(name, 9, 6, 3, 17, P=P)
        # Freed at once, so that whatever is left unwritten shows.
        poison = [torch.full((9, 6, P or 17), torch.nan) for _ in range(8)]
        del poison
        given = sort(case.x, case.state, lengths)
        with torch.no_grad():
            y, *_, kept = native.forward(
                *native.prepared(given, case.weights), native.NUMBER[name], False, 0.0, True, 0.0, twice=True
            )  # fmt: skip
        assert y.data_ptr() != kept.data_ptr()
        assert y.isfinite().all()
        torch.testing.assert_close(y, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in CELLS if name != "rnn_relu"])
@pytest.mark.parametrize("H", [9, 16, 64])
def test_an_infinite_input_spoils_the_gradients_that_it_is_a_factor_of(isa: str, name: str, H: int) -> None:
    """Its units are saturated, so no error reaches them: ∂E/∂W_ih has 0 · ∞ in one column, nothing else is spoilt."""
    case = layer(name, 3, 5, 2, H)
    with torch.no_grad():
        case.x[1, 0, 0] = torch.inf
    y, _ = uv.engine.run(case.cell, case.x, case.state, case.weights, rung="native")
    y[:, 1:].square().sum().backward()
    grads = [w.grad for w in case.weights if w is not None]
    assert grads[0][:, 0].isnan().all()
    assert grads[0][:, 1].isfinite().all()
    assert all(g.isfinite().all() for g in grads[1:])


@settings(max_examples=int(os.environ.get("UNVANISH_SHAPES", "150")))
@given(case=layer_cases(torch.float32), clip=st.none() | st.floats(0.1, 2), seed=st.integers(0, 99))
def test_random_float32_layers_equal_float64(case: LayerCase, clip: float | None, seed: int) -> None:
    double = LayerCase(
        case.cell,
        case.x.detach().double().requires_grad_(),
        tuple(s.detach().double().requires_grad_() for s in case.state),
        Weights(*(None if v is None else v.detach().double().requires_grad_() for v in case.weights)),
        case.lengths,
        case.reverse,
    )
    generator = torch.Generator().manual_seed(seed)

    def result(c: LayerCase, rung: str, d: list[Tensor]) -> list[Tensor]:
        y, final = uv.engine.run(c.cell, c.x, c.state, c.weights, c.lengths, c.reverse, clip, rung)
        cotangents = [v.to(y.dtype) for v in d]
        grads = torch.autograd.grad([y, *final], c.inputs, cotangents, allow_unused=True, materialize_grads=True)
        return [y, *final, *grads]

    y, final = uv.engine.run(case.cell, case.x, case.state, case.weights, case.lengths, case.reverse)
    d = [torch.randn(v.shape, generator=generator, dtype=torch.float64).float().double() for v in (y, *final)]
    for a, b in zip(result(case, "native", d), result(double, "reference", d), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", list(CELLS))
@pytest.mark.parametrize("B", [1, 5, 33])
def test_bitwise_the_same_for_any_number_of_threads_and_every_time(name: str, B: int, threads: None) -> None:
    case = layer(name, 30, B, 6, 40)
    same_for_any_number_of_threads(case, None)


def same_for_any_number_of_threads(case: LayerCase, clip: float | None) -> None:
    results = []
    for count in (1, 2, 3, 4, 2):
        torch.set_num_threads(count)
        results.append(outcome(case, "native", clip, 1))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("name", "P"), [(name, 0) for name in CELLS] + [("lstm", 70)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_bitwise_the_same_where_threads_share_out_the_hidden_units(
    name: str, P: int, clip: float | None, threads: None
) -> None:
    case = layer(name, 12, 3, 6, 150, P=P)
    same_for_any_number_of_threads(case, clip)
    lengths = torch.tensor([12, 7, 0])
    ragged = LayerCase(case.cell, case.x, case.state, case.weights, lengths, True)
    same_for_any_number_of_threads(ragged, clip)
    torch.set_num_threads(2)
    for a, b in zip(outcome(ragged, "native", clip, 1), outcome(ragged, "reference", clip, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(CELLS))
def test_not_a_number_stays_in_its_sample_and_huge_inputs_saturate(isa: str, name: str) -> None:
    case = layer(name, 6, 5, 3, 19)
    expected = uv.engine.run(case.cell, case.x, case.state, case.weights, rung="native")[0].detach()
    x = case.x.detach().clone()
    x[2, 1, 0] = torch.nan
    y = uv.engine.run(case.cell, x, case.state, case.weights, rung="native")[0].detach()
    assert y[2:, 1].isnan().all()
    y[2:, 1] = expected[2:, 1]
    assert torch.equal(y, expected)
    for huge in (1e30, -1e30, torch.inf) if name != "rnn_relu" else ():
        x[2, 1, 0] = huge
        a, b = (uv.engine.run(case.cell, x, case.state, case.weights, rung=r)[0] for r in ("native", "reference"))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(CELLS))
@pytest.mark.parametrize("ragged", [False, True])
def test_a_samples_result_does_not_depend_on_its_neighbours(name: str, ragged: bool) -> None:
    T, B = 12, 37
    case = layer(name, T, B, 6, 40)
    lengths = torch.randint(1, T + 1, (B,), generator=torch.Generator().manual_seed(0)) if ragged else None

    def run(rows: slice) -> list[Tensor]:
        x = case.x.detach()[:, rows].contiguous().requires_grad_()
        state = tuple(s.detach()[rows].clone().requires_grad_() for s in case.state)
        part = None if lengths is None else lengths[rows]
        y, final = uv.engine.run(case.cell, x, state, case.weights, part, rung="native")
        total = y.square().sum() + sum(s.square().sum() for s in final)
        grads = torch.autograd.grad(total, [x, *state])
        return [v.transpose(0, 1) if v.dim() == 3 else v for v in (y, *final, *grads)]

    whole = run(slice(0, B))
    for b in (0, 17, 36):
        assert all(torch.equal(a[b], alone[0]) for a, alone in zip(whole, run(slice(b, b + 1)), strict=True))


@pytest.mark.parametrize("name", list(CELLS))
@pytest.mark.parametrize("lengths", [torch.tensor([4, 9, 1, 0, 9, 6]), torch.arange(37) % 10])
def test_trace_and_adjoint_equal_the_manual_ones(name: str, lengths: Tensor) -> None:
    # Fill the pool with NaN, so that whatever is read without having been written shows.
    for count in range(1, 4000, 64):
        native.call("empty", torch.float64, count).fill_(torch.nan)
    for P in (0, 3) if name == "lstm" else (0,):
        for reverse in (False, True):
            case = layer(name, 9, len(lengths), 4, 19, torch.float64, P)
            args = (
                case.cell,
                case.x.detach(),
                tuple(s.detach() for s in case.state),
                case.weights.detach(),
                lengths,
                reverse,
            )
            one, two = native_trace.trace(*args), uv.engine.manual.trace(*args)
            dy = torch.randn_like(two.y)
            final = tuple(torch.randn_like(s) for s in two.final)
            flows = [native_trace.adjoint(one, dy, final, 0.5), uv.engine.manual.adjoint(two, dy, final, 0.5)]
            torch.testing.assert_close([one.y, *one.final], [two.y, *two.final], rtol=1e-12, atol=1e-13)
            inside = two.active
            kept = [[*tr.before, *tr.after, *tr.gates.unbind(-2), *tr.partials.q.values()] for tr in (one, two)]
            assert all(v.isfinite().all() for v in kept[0])
            for a, b in zip(*kept, strict=True):
                torch.testing.assert_close(
                    torch.where(inside, a, 0.0), torch.where(inside, b, 0.0), rtol=1e-12, atol=1e-13
                )
            for a, b in zip(flows[0].dstate + flows[0].dinitial, flows[1].dstate + flows[1].dinitial, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(
                [flows[0].da, flows[0].da_hh], [flows[1].da, flows[1].da_hh], rtol=1e-11, atol=1e-13
            )
            pairs = zip(
                uv.engine.weight_gradients(one, flows[0]), uv.engine.weight_gradients(two, flows[1]), strict=True
            )
            for a, b in pairs:
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_concurrent_callers(threads: None) -> None:
    torch.set_num_threads(2)
    case = layer("lstm", 60, 40, 8, 32)
    expected = outcome(case, "native", None, 1)
    wrong: list[int] = []

    def work(number: int) -> None:
        mine = LayerCase(
            case.cell,
            case.x.detach().requires_grad_(),
            tuple(s.detach().requires_grad_() for s in case.state),
            Weights(*(None if v is None else v.detach().requires_grad_() for v in case.weights)),
            None,
            False,
        )
        results = [outcome(mine, "native", None, 1) for _ in range(10)]
        wrong.extend(number for r in results if not all(map(torch.equal, r, expected)))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.parametrize(("B", "H"), [(40, 32), (2, 150)])
def test_a_forked_child_can_run(B: int, H: int, threads: None) -> None:
    torch.set_num_threads(2)
    case = layer("gru", 20, B, 8, H)
    with torch.no_grad():
        expected = uv.engine.run(case.cell, case.x, case.state, case.weights, rung="native")[0]
        child = os.fork()
        if child == 0:
            found = uv.engine.run(case.cell, case.x, case.state, case.weights, rung="native")[0]
            os._exit(0 if torch.equal(found, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["rnn_relu", "lstm", "gru"])
def test_operators_pass_torchs_own_checks(name: str) -> None:
    case = layer(name, 3, 2, 2, 3, torch.float64)
    h0, c0 = (*case.state, None)[:2]
    number = native.NUMBER[name]
    arguments = (case.x, h0, c0, *case.weights[:5], None, None, number, False, 0.0, True, 0.05)
    torch.library.opcheck(operators.forward_operator, arguments)


def test_modes_see_the_operators_and_change_no_number() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    case = layer("lstm", 5, 3, 2, 4)
    alone = outcome(case, "native", 0.5, 0)
    with Mode():
        watched = outcome(case, "native", 0.5, 0)
    assert [name for name in seen if "unvanish" in name] == ["unvanish.forward.default", "unvanish.backward.default"]
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_compiles_into_one_graph(kind: str) -> None:
    torch.manual_seed(0)
    ours = getattr(uv.nn, kind)(3, 4, num_layers=2, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    expected = ours(x)[0].square().sum()
    (gradient,) = torch.autograd.grad(expected, x)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(lambda x: ours(x)[0].square().sum(), fullgraph=True, backend="aot_eager")
        found = compiled(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, x)[0], gradient)


def test_without_dynamos_setting_compiled_code_leaves_the_layer_outside_its_graphs() -> None:
    torch.manual_seed(0)
    ours = uv.nn.GRU(3, 4, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)

    def total(x: Tensor) -> Tensor:
        return ours(x)[0].square().sum()

    # A frame that has run without fullgraph is not looked at again.
    with pytest.raises(RuntimeError, match="allow_rnn"):
        torch.compile(total, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(torch.compile(total, backend="eager")(x), total(x), rtol=1e-13, atol=0)


def test_without_kernels_there_is_no_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MISSING", "the extension is not built")
    with pytest.raises(RuntimeError, match="isa: no kernels run here, the extension is not built"):
        uv.engine.isa()


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNVANISH_ISA", "sse9")
    with pytest.raises(ValueError, match="this machine has no 'sse9'"):
        native.layout(CELLS["lstm"], 4, torch.float32)
