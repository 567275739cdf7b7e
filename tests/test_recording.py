"""A recorded pass: the same numbers as an unrecorded one, bit for bit, and measurements equal to those of a replay."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.strategies import LayerCase, layer_cases
from tests.test_native import isa, layer
from unvanish import engine
from unvanish.cells import CELLS, Weights
from unvanish.engine import manual, native
from unvanish.flow.subgradients import dweight, weight_pairs

__all__ = ["isa"]

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=f"native rung: {native.MISSING}")


class Heard:
    """A recorder that keeps what it hears."""

    awaits_backward = True

    def __init__(self) -> None:
        self.statistics: list[engine.Statistics] = []
        self.norms: list[engine.Norms] = []
        self.gradients: list[Weights] = []

    def forward(self, statistics: engine.Statistics) -> None:
        self.statistics.append(statistics)

    def backward(self, norms: engine.Norms, gradients: Weights, recompute: engine.Recompute) -> None:
        self.norms.append(norms)
        self.gradients.append(gradients)


def errors_of(case: LayerCase, y: Tensor, final: tuple[Tensor, ...], scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(v.shape, generator=generator, dtype=v.dtype) * scale for v in (y, *final)]


def expected(
    case: LayerCase, errors: list[Tensor], clip: float | None = None, cut: Tensor | None = None
) -> tuple[engine.Statistics, engine.Norms]:
    """By the manual rung, in float64."""
    x, state, w = case.x.double(), tuple(s.double() for s in case.state), case.weights
    w = Weights(*(None if v is None else v.detach().double() for v in w))
    with torch.no_grad():
        tr = manual.trace(case.cell, x, state, w, case.lengths, case.reverse)
        dy, *dfinal = (e.double() for e in errors)
        flow = manual.adjoint(tr, dy, tuple(dfinal), clip, cut)
    G = len(case.cell.gates)
    mean = tr.gates.mean(-1)
    shut = (case.cell.sensitivity(tr) < engine.SATURATED).double().mean(-1)
    carry = None
    if case.cell.carries:
        kept = case.cell.carry(tr)
        assert kept is not None
        logs = kept.log()
        carry = (logs if tr.active is None else torch.where(tr.active, logs, 0.0)).sum((0, 1))
    if tr.active is not None:
        mean, shut = (torch.where(tr.active, v, torch.nan) for v in (mean, shut))
    norms = [d.norm(dim=-1) for d in flow.dstate]
    gates = flow.da.unflatten(-1, (G, -1)).norm(dim=-1)
    whole = dweight(weight_pairs(tr, flow.da, flow.da_hh))
    return engine.Statistics(mean, shut, carry), engine.Norms(norms[0], (*norms, None)[1], gates, whole)


def check(
    case: LayerCase, tolerance: float, scale: float = 1.0, clip: float | None = None, cut: Tensor | None = None
) -> None:
    heard = Heard()
    args = (case.cell, case.x, case.state, case.weights, case.lengths, case.reverse, clip)
    y, final = engine.run(*args, record=heard, cut=cut)
    plain_y, plain_final = engine.run(*args, cut=cut)
    for found, same in zip((y, *final), (plain_y, *plain_final), strict=True):
        assert torch.equal(found, same)
    errors = errors_of(case, y, final, scale)
    found_grads = torch.autograd.grad((y, *final), case.inputs, errors)
    for found, same in zip(found_grads, torch.autograd.grad((plain_y, *plain_final), case.inputs, errors), strict=True):
        assert torch.equal(found, same)
    statistics, norms = expected(case, errors, clip, cut)
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    for found, right in zip(heard.statistics[0], statistics, strict=True):
        assert (found is None) == (right is None)
        if found is not None and right is not None:
            torch.testing.assert_close(found, right, **close)
    close["atol"] = tolerance * scale
    for found, right in zip(heard.norms[0], norms, strict=True):
        assert (found is None) == (right is None)
        if found is not None and right is not None:
            torch.testing.assert_close(found, right, **close)
    state = tuple(s.detach() for s in case.state)
    again = engine.Pass(case.cell, case.x.detach(), state, case.weights.detach(), case.lengths, case.reverse)
    assert torch.equal(again.y, y)
    with torch.no_grad():
        dx, same_norms, gradients = again.back(errors[0], tuple(errors[1:]), clip, True, cut)
    assert dx is not None
    assert torch.equal(dx, found_grads[0])
    assert torch.equal(same_norms.w, heard.norms[0].w)
    given = [g for g, w in zip(gradients, case.weights, strict=True) if w is not None]
    assert all(torch.equal(a, b) for a, b in zip(given, found_grads[1 + len(final) :], strict=True))


@settings(deadline=None, max_examples=200)
@given(case=layer_cases())
def test_a_recorded_pass_is_the_same_pass_and_measures_it(case: LayerCase) -> None:
    check(case, 1e-10)


@pytest.mark.parametrize("name", list(CELLS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize(
    ("T", "B", "n_in", "H", "P"), [(70, 9, 5, 17, 0), (9, 70, 3, 33, 7), (9, 200, 3, 33, 7), (130, 2, 4, 8, 0)]
)
def test_on_every_instruction_set(
    isa: str, name: str, dtype: torch.dtype, tolerance: float, T: int, B: int, n_in: int, H: int, P: int
) -> None:
    case = layer(name, T, B, n_in, H, dtype, P if name == "lstm" else 0)
    if T != 70:
        lengths = torch.randint(0, T + 1, (B,), generator=torch.Generator().manual_seed(T))
        case = LayerCase(case.cell, case.x, case.state, case.weights, lengths, True)
    check(case, tolerance)
    check(case, tolerance, clip=0.5)
    check(case, tolerance, cut=torch.rand(T, generator=torch.Generator().manual_seed(B)) < 0.5)


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15, 1e25])
def test_norms_hold_where_their_squares_leave_float32(scale: float) -> None:
    for B in (5, 100):
        check(layer("lstm", 12, B, 3, 9), 2e-5, scale)
        check(layer("gru", 12, B, 3, 9), 2e-5, scale)


@pytest.mark.parametrize("B", [5, 100])
@pytest.mark.parametrize("name", list(CELLS))
@pytest.mark.parametrize("factor", [1e-25, 1e25, float("inf")])
def test_the_norm_of_g_t_holds_where_squares_of_inputs_leave_float32(
    isa: str, name: str, B: int, factor: float
) -> None:
    case, heard = layer(name, 12, B, 3, 9), Heard()
    x, w_ih = case.x.detach().clone(), case.weights.w_ih.detach()
    if factor == float("inf"):
        x[7, 2, 1] = factor
    else:
        x, w_ih = x * factor, w_ih / factor
    # Without an initial state the first g_t has only the input's part.
    state = tuple(torch.zeros_like(s) for s in case.state)
    case = LayerCase(case.cell, x, state, case.weights._replace(w_ih=w_ih.requires_grad_()), None, False)
    y, final = engine.run(case.cell, x, state, case.weights, record=heard)
    errors = errors_of(case, y, final)
    torch.autograd.backward((y, *final), errors)
    right = expected(case, errors)[1].w
    assert torch.equal(right.isfinite(), heard.norms[0].w.isfinite())
    finite = right.isfinite()
    torch.testing.assert_close(heard.norms[0].w[finite], right[finite], rtol=2e-5, atol=0.0)
    assert bool(finite.all()) == (factor != float("inf"))


@pytest.mark.parametrize("name", list(CELLS))
def test_a_nan_in_the_gradient_of_one_sample_makes_the_norm_of_g_t_nan(isa: str, name: str) -> None:
    case, heard = layer(name, 5, 3, 3, 9), Heard()
    y, _ = engine.run(case.cell, case.x, case.state, case.weights, record=heard)
    error = torch.zeros_like(y)
    error[-1, 0] = torch.nan
    y.backward(error)
    assert bool(heard.norms[0].w.isnan().all())


def test_a_second_backward_adds_its_errors() -> None:
    case = layer("lstm", 7, 3, 2, 5, torch.float64)
    heard = Heard()
    args = (case.cell, case.x, case.state, case.weights)
    y, final = engine.run(*args, record=heard)
    errors = errors_of(case, y, final)
    first = torch.autograd.grad((y, *final), case.inputs, errors, retain_graph=True)
    second = torch.autograd.grad((y, *final), case.inputs, [2 * e for e in errors])
    torch.testing.assert_close(heard.norms[1].h, 3 * heard.norms[0].h)
    torch.testing.assert_close(heard.norms[1].w, 3 * heard.norms[0].w)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(two, 2 * one)


def test_double_backward_goes_through_a_recorded_pass() -> None:
    case = layer("gru", 4, 2, 2, 3, torch.float64)

    def run(record: Heard | None) -> tuple[Tensor, ...]:
        y, _ = engine.run(case.cell, case.x, case.state, case.weights, record=record)
        grads = torch.autograd.grad(y.square().sum(), case.inputs, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in grads), torch.zeros(())), case.inputs)

    heard = Heard()
    for found, right in zip(run(heard), run(None), strict=True):
        torch.testing.assert_close(found, right)
    # The second backward also sends an error through y, on which the first gradients depend.
    assert len(heard.norms) == 2


def test_only_the_native_rung_records() -> None:
    case = layer("lstm", 3, 2, 2, 3)
    with pytest.raises(RuntimeError, match="only the native rung records"):
        engine.run(case.cell, case.x, case.state, case.weights, rung="manual", record=Heard())


@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if cell.carries])
def test_a_gate_that_is_no_number_gives_no_carry(name: str, isa: str) -> None:
    heard, case = Heard(), layer(name, 5, 3, 2, 4, torch.float32)
    x = case.x.detach().clone()
    x[2, 1] = torch.nan
    engine.run(case.cell, x, case.state, case.weights, record=heard)
    assert heard.statistics[0].log_carry is not None
    assert bool(heard.statistics[0].log_carry.isnan().all())
