"""The cells' equations against torch's own cells, their adjoints and Jacobians against autograd."""

import torch
from hypothesis import given
from torch import nn
from torch.autograd.functional import jacobian

from tests.strategies import LayerCase, layer_cases
from unvanish.cells import CELLS, Weights

TORCH_CELLS = {
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda i, h, **kw: nn.RNNCell(i, h, nonlinearity="relu", **kw),
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
}


def test_steps_equal_torch_cells() -> None:
    torch.manual_seed(0)
    for name, make in TORCH_CELLS.items():
        theirs, cell = make(3, 5, dtype=torch.float64), CELLS[name]
        x = torch.randn(4, 3, dtype=torch.float64)
        state = tuple(torch.randn(4, 5, dtype=torch.float64) for _ in cell.states)
        expected = theirs(x, state if len(state) > 1 else state[0])
        weights = Weights(theirs.weight_ih, theirs.weight_hh, theirs.bias_ih, theirs.bias_hh)
        new, _ = cell.step(cell.project(x, weights), state, weights)
        torch.testing.assert_close(
            new, expected if isinstance(expected, tuple) else (expected,), rtol=1e-13, atol=1e-14
        )


@given(case=layer_cases())
def test_adjoint_is_the_vector_jacobian_product(case: LayerCase) -> None:
    cell, w, x = case.cell, case.weights, case.x[0]
    p = cell.project(x, w)
    new, saved = cell.step(p, case.state, w)
    d = tuple(torch.randn_like(s) for s in new)
    expected = torch.autograd.grad(new, [p, *case.state], d)
    step = cell.adjoint(d, saved, w)
    torch.testing.assert_close((step.da, *step.previous), expected, rtol=1e-11, atol=1e-12)
    if w.b_hh is not None:
        new, _ = cell.step(cell.project(x, w), case.state, w)
        (db,) = torch.autograd.grad(new, [w.b_hh], d)
        torch.testing.assert_close(step.da_hh.sum(0), db, rtol=1e-11, atol=1e-12)


@given(case=layer_cases())
def test_jacobian_equals_autograd(case: LayerCase) -> None:
    cell, w = case.cell, case.weights.detach()
    p, state = cell.project(case.x[0], w).detach(), tuple(s.detach() for s in case.state)
    _, saved = cell.step(p, state, w)
    for b in range(len(p)):
        blocks = jacobian(lambda *s, b=b: cell.step(p[b], s, w)[0], tuple(s[b] for s in state))
        expected = torch.cat([torch.cat(row, dim=1) for row in blocks], dim=0)
        torch.testing.assert_close(cell.jacobian(saved, w)[b], expected, rtol=1e-11, atol=1e-12)


@given(case=layer_cases())
def test_sensitivity_is_the_relative_slope_of_each_gate(case: LayerCase) -> None:
    _, saved = case.cell.step(case.cell.project(case.x[0], case.weights), case.state, case.weights)
    values, slope = case.cell.activations(saved), case.cell.sensitivity(saved)
    assert values.shape == slope.shape == (*case.x.shape[1:2], len(case.cell.gates), case.state[-1].shape[-1])
    assert ((slope >= 0) & (slope <= 1 + 1e-12)).all()
    phi = case.cell.name.removeprefix("rnn_")
    for i, gate in enumerate(case.cell.gates):
        v = values[:, i]
        if gate in "ifozr" or phi == "sigmoid":
            torch.testing.assert_close(slope[:, i], 4 * v * (1 - v))
        elif gate in "gn" or phi == "tanh":
            torch.testing.assert_close(slope[:, i], 1 - v * v)
        else:
            assert torch.equal(slope[:, i], (v > 0).to(v.dtype))
