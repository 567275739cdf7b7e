"""Every rung against torch's own modules and against the reference."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.strategies import RUNG_CELLS, LayerCase, layer_cases, runs
from unvanish import engine
from unvanish.cells import CELLS, Cell, Weights

FAST = [rung for rung in engine.RUNGS if rung != "reference"]
FAST_CELLS = [(rung, name) for rung, name in RUNG_CELLS if rung != "reference"]


def outcome(case: LayerCase, rung: str, clip: float | None, seed: int) -> list[torch.Tensor]:
    """Outputs, final state and every gradient under a random error."""
    y, final = engine.run(case.cell, case.x, case.state, case.weights, case.lengths, case.reverse, clip, rung)
    generator = torch.Generator().manual_seed(seed)
    out = [y, *final]
    d = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in out]
    return [*out, *torch.autograd.grad(out, case.inputs, d, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("rung", FAST)
@given(case=layer_cases(), clip=st.none() | st.floats(0.1, 2), seed=st.integers(0, 99))
def test_rungs_agree_with_the_reference(rung: str, case: LayerCase, clip: float | None, seed: int) -> None:
    assume(runs(rung, case))
    clip = None if rung == "fused" else clip
    torch.testing.assert_close(
        outcome(case, rung, clip, seed), outcome(case, "reference", clip, seed), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("rung", FAST)
@given(case=layer_cases(), seed=st.integers(0, 99))
def test_rungs_agree_where_an_input_is_nan(rung: str, case: LayerCase, seed: int) -> None:
    assume(runs(rung, case))
    x = case.x.detach().clone()
    x[len(x) // 2, 0, 0] = torch.nan
    case = replace(case, x=x.requires_grad_())
    torch.testing.assert_close(
        outcome(case, rung, None, seed), outcome(case, "reference", None, seed), rtol=1e-11, atol=1e-11, equal_nan=True
    )


@given(case=layer_cases(), clip=st.none() | st.floats(0.1, 2), seed=st.integers(0, 99))
def test_gradients_of_weights_alone_are_those_of_the_adjoint(case: LayerCase, clip: float | None, seed: int) -> None:
    with torch.no_grad():
        tr = engine.trace(case.cell, case.x, case.state, case.weights.detach(), case.lengths, case.reverse)
    generator = torch.Generator().manual_seed(seed)
    dy, *dfinal = (torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in (tr.y, *tr.final))
    alone = engine.gradients_of_weights(tr, dy, tuple(dfinal), clip)
    every = engine.weight_gradients(tr, engine.adjoint(tr, dy, tuple(dfinal), clip))
    for mine, theirs in zip(alone, every, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def torchs(case: LayerCase) -> torch.nn.RNNBase:
    """torch's module with the weights of this case."""
    w, (_, n_in) = case.weights, case.weights.w_ih.shape
    H, R = case.state[-1].shape[-1], case.state[0].shape[-1]
    options: dict[str, Any] = {"bias": w.b_ih is not None, "dtype": torch.float64}
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}.get(case.cell.name, torch.nn.RNN)
    if kind is torch.nn.RNN:
        options["nonlinearity"] = case.cell.name.removeprefix("rnn_")
    if w.w_hr is not None:
        options["proj_size"] = R
    module = kind(n_in, H, **options)
    with torch.no_grad():
        for mine, theirs in zip([v for v in w if v is not None], module.parameters(), strict=True):
            theirs.copy_(mine)
    return module


@pytest.mark.parametrize("rung", list(engine.RUNGS))
@given(case=layer_cases(torch.float64, ("rnn_tanh", "rnn_relu", "lstm", "gru")), seed=st.integers(0, 99))
def test_equal_to_torch_modules(rung: str, case: LayerCase, seed: int) -> None:
    assume(case.weights.w_hr is None or case.state[0].shape[-1] < case.state[-1].shape[-1])
    case.lengths, case.reverse = None, False
    module = torchs(case)
    hx = tuple(s.unsqueeze(0) for s in case.state)
    y, final = module(case.x, hx if len(hx) > 1 else hx[0])
    out = [y, *(s[0] for s in (final if isinstance(final, tuple) else (final,)))]
    generator = torch.Generator().manual_seed(seed)
    errors = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in out]
    gradients = torch.autograd.grad(out, [case.x, *case.state, *module.parameters()], errors)
    torch.testing.assert_close(outcome(case, rung, None, seed), [*out, *gradients], rtol=1e-12, atol=1e-12)


def drawn(cell: Cell, T: int) -> Iterator[torch.Tensor]:
    """x `[T, 2, 2]`, W_ih and W_hh."""
    torch.manual_seed(0)
    rows = 2 * len(cell.gates)
    return (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((T, 2, 2), (rows, 2), (rows, 2)))


@pytest.mark.parametrize(("rung", "name"), FAST_CELLS)
def test_gradients_of_gradients(rung: str, name: str) -> None:
    cell = CELLS[name]
    x, w_ih, w_hh = drawn(cell, 3)
    state = tuple(torch.randn(2, 2, dtype=torch.float64) for _ in cell.states)

    def run(x: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor) -> torch.Tensor:
        return engine.run(cell, x, state, Weights(w_ih, w_hh), rung=rung)[0]

    assert torch.autograd.gradcheck(run, (x, w_ih, w_hh))
    assert torch.autograd.gradgradcheck(run, (x, w_ih, w_hh))


@pytest.mark.parametrize(("rung", "name"), FAST_CELLS)
def test_a_state_that_was_carried_over_counts_once_where_a_graph_is_made(rung: str, name: str) -> None:
    cell = CELLS[name]
    x, w_ih, w_hh = drawn(cell, 6)
    found = []
    for create_graph in (False, True):
        state: tuple[torch.Tensor, ...] = tuple(torch.zeros(2, 2, dtype=torch.float64) for _ in cell.states)
        outputs = []
        for part in x.split(2):
            y, state = engine.run(cell, part, state, Weights(w_ih, w_hh), rung=rung)
            outputs.append(y)
        error = torch.cat(outputs).square().sum()
        found.append(torch.autograd.grad(error, (x, w_ih, w_hh), create_graph=create_graph))
    torch.testing.assert_close(found[1], found[0])


def test_dispatch_says_what_runs_and_why() -> None:
    x = torch.zeros(1, 1, 1)
    assert engine.explain(CELLS["lstm"], x).rung == next(iter(engine.RUNGS))
    with engine.force("reference"):
        assert engine.explain(CELLS["lstm"], x).rung == "reference"
    assert engine.explain(CELLS["lstm"], torch.zeros(1, 1, 1, dtype=torch.float16)).rung == "manual"
    assert "complex" in str(engine.explain(CELLS["lstm"], torch.zeros(1, 1, 1, dtype=torch.complex64)))
    with pytest.raises(RuntimeError, match="forced, but can't run"):
        engine.explain(CELLS["lstm"], torch.zeros(1, 1, 1, dtype=torch.complex64), "manual")
    with pytest.raises(ValueError, match="rung: expected one of"):
        engine.explain(CELLS["lstm"], x, "fast")


def test_torch_func_goes_to_the_reference() -> None:
    w = Weights(torch.randn(2, 2), torch.randn(2, 2))
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(engine.explain(CELLS["lstm"], x).rung)
        return engine.run(CELLS["rnn_tanh"], x, (torch.zeros(1, 2),), w)[0].sum()

    assert torch.func.grad(f)(torch.randn(3, 1, 2)).shape == (3, 1, 2)
    assert seen == ["reference"]


@pytest.mark.parametrize(
    ("x", "clip", "message"),
    [
        (torch.zeros(2, 3), None, r"x: expected \[T, B, I\]"),
        (torch.zeros(0, 3, 2), None, r"x: expected \[T, B, I\] with T ≥ 1"),
        (torch.zeros(2, 3, 5), None, "x: expected 2 features"),
        (torch.zeros(2, 3, 2), -1.0, "clip: expected a positive norm"),
        (torch.zeros(2, 3, 2), "1", "clip: expected a positive norm"),
        (torch.zeros(2, 3, 2), True, "clip: expected a positive norm"),
        (torch.zeros(2, 4, 2), None, r"h_0: expected \(4, 2\), got \(3, 2\)"),
    ],
)
def test_wrong_input_is_named(x: torch.Tensor, clip: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.run(CELLS["rnn_tanh"], x, (torch.zeros(3, 2),), Weights(torch.zeros(2, 2), torch.zeros(2, 2)), clip=clip)


@pytest.mark.parametrize("rung", list(engine.RUNGS))
@pytest.mark.parametrize("name", list(CELLS))
def test_no_rung_reads_what_does_not_fit(rung: str, name: str) -> None:
    cell = CELLS[name]
    G, n = len(cell.gates), len(cell.states)
    good = (torch.zeros(2, 3, 2), *[torch.zeros(3, 4)] * n, torch.zeros(G * 4, 2), torch.zeros(G * 4, 4))
    for k in range(1, len(good)):
        for bad, kind in ((good[k].double(), RuntimeError), (good[k][:-1], ValueError)):
            x, *rest = [*good[:k], bad, *good[k + 1 :]]
            if bad.shape != good[k].shape and k == n + 1:
                continue  # from W_ih the others take their shape
            with pytest.raises(kind, match=f"{(*cell.states, 'w_i', 'w_h')[k - 1][:1]}.*: expected"):
                engine.run(cell, x, tuple(rest[:n]), Weights(*rest[n:]), rung=rung)


@pytest.mark.parametrize("rung", list(engine.RUNGS))
@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("gru", [(10, 2), (10, 3)], r"w_ih: expected \[G·H, I\] with G = 3 gates of a gru, got \(10, 2\)"),
        ("rnn_tanh", [(4, 2), (4, 3)], r"w_hh: expected \(4, 4\), got \(4, 3\)"),
        ("gru", [(12, 2), (12, 3), None, None, (3, 4)], "w_hr: expected None, a gru has no projection"),
    ],
)
def test_weights_that_do_not_fit_each_other(rung: str, name: str, shapes: list[Any], message: str) -> None:
    weights = Weights(*(None if s is None else torch.zeros(s) for s in shapes))
    state = tuple(torch.zeros(3, shapes[1][1]) for _ in CELLS[name].states)
    with pytest.raises(ValueError, match=message):
        engine.run(CELLS[name], torch.zeros(2, 3, 2), state, weights, rung=rung)


@pytest.mark.parametrize("rung", list(engine.RUNGS))
@pytest.mark.parametrize("lengths", [[3], [3.0, 2.0, 1.0], [3, -2, 1], [3, 6, 1]])
def test_lengths_that_do_not_fit_are_not_read(rung: str, lengths: list[float]) -> None:
    cell, x, state = CELLS["rnn_tanh"], torch.zeros(5, 3, 2), (torch.zeros(3, 4),)
    w, given = Weights(torch.zeros(4, 2), torch.zeros(4, 4)), torch.tensor(lengths)
    calls = [lambda: engine.run(cell, x, state, w, given, rung=rung), lambda: engine.trace(cell, x, state, w, given)]
    for call in [*calls, lambda: engine.Pass(cell, x, state, w, given, False)]:
        with pytest.raises(ValueError, match="lengths: expected"):
            call()


@pytest.mark.parametrize("name", list(CELLS))
def test_errors_that_do_not_fit_are_not_read(name: str) -> None:
    cell = CELLS[name]
    G, n = len(cell.gates), len(cell.states)
    x, state, w = torch.zeros(5, 3, 2), (torch.zeros(3, 4),) * n, Weights(torch.zeros(G * 4, 2), torch.zeros(G * 4, 4))
    none = (None,) * n
    tr, ran = engine.trace(cell, x, state, w), engine.Pass(cell, x, state, w, None, False)
    for dy, dfinal, kind, label in (
        (torch.zeros(5, 3, 4, dtype=torch.bfloat16), none, RuntimeError, "dy"),
        (torch.zeros(4, 3, 4), none, ValueError, "dy"),
        (None, (torch.zeros(3, 5), *none[1:]), ValueError, "dh"),
    ):
        with pytest.raises(kind, match=f"{label}: expected"):
            engine.adjoint(tr, dy, dfinal)
        with pytest.raises(kind, match=f"{label}: expected"):
            ran.back(dy, dfinal, None, False)


@pytest.mark.parametrize("rung", list(engine.RUNGS))
@given(case=layer_cases(), seed=st.integers(0, 99))
def test_what_stands_beyond_a_samples_end_is_not_read(rung: str, case: LayerCase, seed: int) -> None:
    assume(runs(rung, case))
    T, B = case.x.shape[:2]
    case.lengths = torch.randint(0, T + 1, (B,), generator=torch.Generator().manual_seed(seed))
    inside = torch.arange(T)[:, None] < case.lengths
    found = []
    for padding in (0.0, torch.nan):
        case.x = torch.where(inside.unsqueeze(-1), case.x.detach(), padding).requires_grad_()
        found.append(outcome(case, rung, None, seed))
        tr = engine.trace(case.cell, case.x.detach(), tuple(s.detach() for s in case.state), case.weights.detach(),
                          case.lengths, case.reverse)  # fmt: skip
        found[-1] += [tr.x, tr.y, *tr.final, *tr.before, *tr.after, tr.gates]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rung", [rung for rung in engine.RUNGS if rung != "fused"])
@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru"])
def test_errors_whose_squares_overflow_are_clipped_not_lost(rung: str, name: str) -> None:
    cell = CELLS[name]
    torch.manual_seed(0)
    G, n = len(cell.gates), len(cell.states)
    weights = Weights(torch.randn(G * 3, 2).double(), torch.randn(G * 3, 3).double())
    state = tuple(torch.zeros(1, 3, dtype=torch.float64, requires_grad=True) for _ in range(n))
    y, _ = engine.run(cell, torch.randn(4, 1, 2).double(), state, weights, clip=1.0, rung=rung)
    found = torch.autograd.grad(y, state, torch.full_like(y, 1e200))
    for d in found:
        assert 0 < float(d.norm()) <= 1 + 1e-12
