"""The cells' equations against torch's own cells, and the calculus of a step against autograd."""

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from tests.strategies import LayerCase, layer_cases
from unvanish.cells import CELLS, Partials, Point, ReluRNN, State, Weights, calculus, derived
from unvanish.cells.activations import activations

TORCH_CELLS = {
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda i, h, **kw: nn.RNNCell(i, h, nonlinearity="relu", **kw),
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}


def point(case: LayerCase) -> Point:
    """The case's first step, outside any graph."""
    cell, w, x = case.cell, case.weights.detach(), case.x[0].detach()
    before = tuple(s.detach() for s in case.state)
    return Point(cell, w, x, before, cell.advance(cell.project(x, w), before, w))


def drawn_like(state: State) -> State:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s.shape, generator=generator, dtype=s.dtype) for s in state)


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_steps_equal_torch_cells() -> None:
    torch.manual_seed(0)
    for name, make in TORCH_CELLS.items():
        theirs, cell = make(3, 5, dtype=torch.float64), CELLS[name]
        x = torch.randn(4, 3, dtype=torch.float64)
        state = tuple(torch.randn(4, 5, dtype=torch.float64) for _ in cell.states)
        expected = theirs(x, state if len(state) > 1 else state[0])
        weights = Weights(theirs.weight_ih, theirs.weight_hh, theirs.bias_ih, theirs.bias_hh)
        new = cell.advance(cell.project(x, weights), state, weights)
        torch.testing.assert_close(
            new, expected if isinstance(expected, tuple) else (expected,), rtol=1e-13, atol=1e-14
        )


@given(case=layer_cases())
def test_adjoint_is_the_vector_jacobian_product(case: LayerCase) -> None:
    cell, w, at = case.cell, case.weights, point(case)
    p = cell.project(case.x[0], w)
    new = cell.advance(p, case.state, w)
    d = drawn_like(new)
    expected = torch.autograd.grad(new, [p, *case.state], d)
    step = calculus.adjoint(cell, at.partials, d, at.weights)
    close((step.da, *step.previous), expected)
    if w.b_hh is not None:
        (db,) = torch.autograd.grad(cell.advance(cell.project(case.x[0], w), case.state, w), [w.b_hh], d)
        assert step.da_hh is not None
        close(step.da_hh.sum(0), db)


@given(case=layer_cases())
def test_total_derivatives_of_the_states_count_what_is_made_from_them(case: LayerCase) -> None:
    cell, at = case.cell, point(case)
    d = drawn_like(at.after)
    found = calculus.adjoint(cell, at.partials, d, at.weights).state
    expected = list(d)
    if cell.name == "lstm":
        c = at.after[1].clone().requires_grad_()
        h = at.gates[:, 3] * c.tanh()
        (through_h,) = torch.autograd.grad(h if at.weights.w_hr is None else h @ at.weights.w_hr.mT, c, d[0])
        expected[1] = d[1] + through_h
    close(found, tuple(expected))


@given(case=layer_cases())
def test_jacobian_and_its_products_equal_autograd(case: LayerCase) -> None:
    cell, at = case.cell, point(case)
    w, sizes = at.weights, tuple(s.shape[-1] for s in case.state)
    found = calculus.jacobian(cell, at.partials, w, sizes)
    tangent = drawn_like(at.before)
    moved = torch.cat(calculus.jvp(cell, at.partials, tangent, w), dim=-1)
    for b in range(len(at.x)):
        blocks = jacobian(lambda *s, b=b: cell.advance(at.p[b], s, w), tuple(s[b] for s in at.before))
        expected = torch.cat([torch.cat(row, dim=1) for row in blocks], dim=0)
        close(found[b], expected)
        close(moved[b], expected @ torch.cat([v[b] for v in tangent]))


def kinds(d: Partials) -> list[dict[tuple[str, str], Tensor]]:
    return [d.made, d.q, d.p, d.s, d.v]


@given(case=layer_cases())
def test_written_partials_equal_the_derived_ones(case: LayerCase) -> None:
    at = point(case)
    written, found = at.partials, derived.partials(case.cell, at)
    for mine, theirs in zip(kinds(written), kinds(found), strict=True):
        assert set(mine) == set(theirs)
        for key, d in mine.items():
            close(d, theirs[key])
    assert (written.p is written.q) == (found.p is found.q)
    memory = case.cell.remembers
    close(case.cell.carry(at), found.s.get((memory, memory)))


@pytest.mark.parametrize("name", list(CELLS))
def test_what_a_cell_says_of_itself_is_what_its_step_does(name: str) -> None:
    cell = CELLS[name]
    known = derived.structure(cell)
    assert cell.carry_gate == known.carry_gate
    assert cell.carries == ((cell.remembers, cell.remembers) in known.s)


@pytest.mark.parametrize("name", list(CELLS))
def test_derivatives_of_many_steps_in_parts_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cell, (T, B, H) = CELLS[name], (7, 3, 4)
    G = len(cell.gates)
    w = Weights(*(torch.randn(s, dtype=torch.float64) for s in ((G * H, 2), (G * H, H), (G * H,), (G * H,))))
    x = torch.randn(T, B, 2, dtype=torch.float64)
    before = tuple(torch.randn(T, B, H, dtype=torch.float64) for _ in cell.states)
    at = Point(cell, w, x, before, cell.advance(cell.project(x, w), before, w))
    whole = derived.partials(cell, at)
    monkeypatch.setattr(derived, "CHUNK_ELEMENTS", 2 * B * H)
    parts = derived.partials(cell, at)
    for mine, theirs in zip(kinds(parts), kinds(whole), strict=True):
        assert set(mine) == set(theirs)
        for key, d in mine.items():
            close(d, theirs[key])


@given(case=layer_cases())
def test_sensitivity_is_the_relative_slope_of_each_gate(case: LayerCase) -> None:
    at = point(case)
    values, slope = at.gates, case.cell.sensitivity(at)
    assert values.shape == slope.shape == (*case.x.shape[1:2], len(case.cell.gates), case.state[-1].shape[-1])
    assert ((slope >= 0) & (slope <= 1 + 1e-12)).all()
    if case.weights.w_hr is None:
        seen = activations(case.cell, at)
        close((values, slope), (seen.values, seen.sensitivity))
    phi = case.cell.name.removeprefix("rnn_")
    for i, gate in enumerate(case.cell.gates):
        v = values[:, i]
        if gate in "ifozr" or phi == "sigmoid":
            torch.testing.assert_close(slope[:, i], 4 * v * (1 - v))
        elif gate in "gn" or phi == "tanh":
            torch.testing.assert_close(slope[:, i], 1 - v * v)
        else:
            assert torch.equal(slope[:, i], (v > 0).to(v.dtype))


def test_the_slope_of_relu_is_autograds() -> None:
    a = torch.tensor([torch.nan, -1.0, 0.0, 2.0, torch.inf], requires_grad=True)
    h = torch.relu(a)
    (right,) = torch.autograd.grad(h.sum(), a)
    cell = CELLS["rnn_relu"]
    assert isinstance(cell, ReluRNN)
    assert torch.equal(cell.derivative(h.detach()), right)
