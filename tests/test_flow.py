"""Terms, Jacobians, exponents, gate statistics and source gradients: equal to autograd, and true to their laws."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import unvanish as uv
from tests.strategies import ModuleCase, module_cases
from tests.test_adjoint_map import outputs
from unvanish.flow.stack import run_stack


@given(case=module_cases(), data=st.data())
def test_terms_add_up_to_the_error_that_came_back(case: ModuleCase, data: Any) -> None:
    at = data.draw(st.sampled_from(case.names))
    terms = uv.flow.decompose(case.module, case.x, case.hx, at=at)
    T, B = max(case.lengths), len(case.lengths)
    shares = torch.stack([term.share for term in terms.terms.values()]).sum(0)
    carried = terms.total > 0
    torch.testing.assert_close(shares[carried], torch.ones_like(shares[carried]), rtol=1e-10, atol=1e-10)
    assert shares[~carried].isnan().all()
    assert terms.total.shape == (T, B)
    D = 2 if case.module.bidirectional else 1
    if at in case.names[-D:]:
        # One error per direction, at the last step it reads: everywhere else δ is what came back.
        samples, last = torch.arange(B), torch.tensor(case.lengths) - 1
        y, generator = outputs(case), torch.Generator().manual_seed(0)
        error = torch.zeros_like(y).unflatten(-1, (D, -1))
        for d in range(D):
            unit = torch.randn(error.shape[-1], generator=generator, dtype=torch.float64)
            error[torch.zeros_like(last) if d else last, samples, d] = torch.nn.functional.normalize(unit, dim=0)
        with uv.watch(case.module) as flow:
            (outputs(case) * error.flatten(-2)).sum().backward()
        record = flow[at]
        expected = (record.dh if record.dc is None else record.dc).clone()
        expected[torch.zeros_like(last) if at.endswith(".reverse") else last, samples] = 0
        torch.testing.assert_close(terms.total, expected, rtol=1e-10, atol=1e-14)


@given(case=module_cases())
def test_terms_as_matrices_make_the_norms(case: ModuleCase) -> None:
    terms = uv.flow.decompose(case.module, case.x, case.hx, matrices=True)
    stack = run_stack(case.module, case.x, case.hx)
    tr = stack.traces[stack.index(None)]
    if case.module.mode == "LSTM":
        assert torch.equal(terms.output_gate.matrix, torch.zeros_like(terms.output_gate.matrix))
        return
    total = sum(term.matrix for term in terms.terms.values())
    for t in range(len(tr.y) - 1):
        expected = uv.flow.jacobian(case.module, case.x, case.hx, t=t + 1)
        inside = torch.tensor(case.lengths) > t + 1
        torch.testing.assert_close(total[t][inside], expected[inside], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("projection", [0, 2])
def test_lstm_terms_equal_autograd_one_gate_at_a_time(projection: int) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 3, proj_size=projection, dtype=torch.float64)
    x = torch.randn(2, 1, 2, dtype=torch.float64)
    terms = uv.flow.decompose(lstm, x, matrices=True)
    w_i, w_f, w_g, w_o = lstm.weight_hh_l0.chunk(4)
    c0, (_, _, _, o0) = _step(lstm, x[0])
    c = c0.detach().requires_grad_()

    def h_of(c: Tensor) -> Tensor:
        m = o0.detach() * c.tanh()
        return m @ lstm.weight_hr_l0.T if projection else m

    base = x[1] @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
    frozen = h_of(c0.detach())
    gates = [base.chunk(4, -1)[n] + frozen @ w.T for n, w in enumerate((w_i, w_f, w_g, w_o))]
    paths = {
        "forget_gate": lambda c: (base.chunk(4, -1)[1] + h_of(c) @ w_f.T).sigmoid() * c0.detach(),
        "carry": lambda c: gates[1].sigmoid() * c,
        "input_gate": lambda c: (base.chunk(4, -1)[0] + h_of(c) @ w_i.T).sigmoid() * gates[2].tanh(),
        "candidate": lambda c: gates[0].sigmoid() * (base.chunk(4, -1)[2] + h_of(c) @ w_g.T).tanh(),
    }
    for name, path in paths.items():
        expected = torch.autograd.functional.jacobian(lambda v, path=path: path(v.unsqueeze(0))[0], c.detach()[0])
        torch.testing.assert_close(getattr(terms, name).matrix[0, 0], expected, rtol=1e-10, atol=1e-13)


def _step(lstm: nn.LSTM, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    a = x @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
    i, f, g, o = a.chunk(4, -1)
    gates = [i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()]
    return gates[0] * gates[2], gates


def test_without_recurrent_weights_only_the_carry_remains() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 3, dtype=torch.float64)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    terms = uv.flow.decompose(lstm, torch.randn(6, 2, 2, dtype=torch.float64), textbook=True)
    for name in ("forget_gate", "input_gate", "candidate", "output_gate"):
        assert (getattr(terms, name).norm == 0).all()
    torch.testing.assert_close(terms.carry.share[:-1], torch.ones(5, 2, dtype=torch.float64))
    assert terms.textbook is not None
    assert terms.textbook.apart.max() < 1e-12


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, -70.0), (torch.float64, -500.0)])
def test_shares_and_maps_are_right_where_squares_underflow(dtype: torch.dtype, bias: float) -> None:
    lstm = nn.LSTM(2, 3, dtype=dtype)
    with torch.no_grad():
        for p in lstm.parameters():
            p.zero_()
        lstm.bias_ih_l0[3:6] = bias
    x = torch.randn(40, 1, 2, dtype=dtype)
    terms = uv.flow.decompose(lstm, x)
    assert terms.carry.share[:-1].flatten().tolist() == [1.0] * 39
    torch.testing.assert_close(terms.log_total[:-1].diff(dim=0), torch.full((38, 1), -bias, dtype=torch.float64))
    for sources in ([-1], "all"):
        log_norms = uv.flow.adjoint_map(lstm, x, sources=sources).log_norms[-1]
        torch.testing.assert_close(log_norms.diff(dim=0), torch.full((39, 1), -bias, dtype=torch.float64))


def test_autocast_rounds_nothing_that_is_measured() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(2, 3), torch.randn(6, 2, 2)
    measures = (
        lambda: uv.flow.adjoint_map(lstm, x, sources=3).log_norms,
        lambda: uv.flow.decompose(lstm, x).carry.share[:-1],
        lambda: uv.flow.lyapunov(lstm, x).exponents,
        lambda: uv.flow.jacobian(lstm, x, t=3),
        lambda: uv.flow.singular_values(lstm, x, j=0, k=4),
        lambda: uv.flow.source_gradients(lstm, x, error=torch.ones(6, 2, 3)).log_norms,
        lambda: uv.flow.gate_statistics(lstm, x).mean,
    )
    for measure in measures:
        expected = measure()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(measure(), expected)


def test_the_textbook_product_is_exact_over_one_step_and_not_over_more() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(2, 3, dtype=torch.float64), torch.randn(5, 1, 2, dtype=torch.float64)
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(3)
    terms = uv.flow.decompose(lstm, x, matrices=True, textbook=True)
    product = terms.textbook
    assert product is not None
    assert product.apart[4] < 1e-12
    assert product.apart[3] < 1e-12
    assert (product.apart[:3] > 1e-4).all()
    stack = run_stack(lstm, x)
    tr = stack.traces[0]

    def last_cell_state(c: Tensor, t: int) -> Tensor:
        h = tr.gates[t, 0, tr.cell.gates.index("o")] * c.tanh()
        for s in range(t + 1, 5):
            h, c = torch._VF.lstm_cell(x[s], (h.unsqueeze(0), c.unsqueeze(0)), *lstm.parameters())
            h, c = h[0], c[0]
        return c

    for t in range(5):
        exact = torch.autograd.functional.jacobian(lambda c, t=t: last_cell_state(c, t), tr.after[1][t, 0])
        assert float(product.log_exact[t, 0]) == pytest.approx(math.log(float(exact.norm())), abs=1e-9)
        multiplied = torch.eye(3, dtype=torch.float64)
        for s in reversed(range(t, 4)):
            names = ("forget_gate", "carry", "input_gate", "candidate")
            multiplied = multiplied @ sum(getattr(terms, n).matrix[s, 0] for n in names)
        apart = float((multiplied - exact).norm() / exact.norm())
        assert float(product.apart[t, 0]) == pytest.approx(apart, abs=1e-9)


@given(case=module_cases(), data=st.data())
def test_jacobian_equals_autograd_of_the_module(case: ModuleCase, data: Any) -> None:
    if case.module.num_layers > 1 or case.module.bidirectional or not isinstance(case.x, Tensor) or case.x.dim() == 2:
        return
    module, x = case.module, case.padded
    t = data.draw(st.integers(0, len(x) - 1))
    twin = type(module)(
        module.input_size,
        module.hidden_size,
        bias=module.bias,
        dtype=torch.float64,
        **({"proj_size": module.proj_size} if module.proj_size else {}),
        **({"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}),
    )
    twin.load_state_dict(module.state_dict())
    hx = case.hx
    state = (hx if isinstance(hx, tuple) else (hx,)) if hx is not None else None
    if t:
        final = twin(x[:t], hx)[1]
        state = final if isinstance(final, tuple) else (final,)
    if state is None:
        return
    sizes = [s.shape[-1] for s in state]

    def advance(flat: Tensor) -> Tensor:
        parts = tuple(p.reshape(1, 1, -1) for p in flat.split(sizes))
        final = twin(x[t : t + 1, :1], parts if len(parts) > 1 else parts[0])[1]
        return torch.cat([p.flatten() for p in (final if isinstance(final, tuple) else (final,))])

    flat = torch.cat([s[0, 0].detach() for s in state])
    expected = torch.autograd.functional.jacobian(advance, flat)
    torch.testing.assert_close(uv.flow.jacobian(module, case.x, hx, t=t)[0], expected, rtol=1e-10, atol=1e-12)


def test_exponents_of_a_linear_network_are_its_eigenvalues() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(2, 5, nonlinearity="relu", dtype=torch.float64)
    w = torch.rand(5, 5, dtype=torch.float64)
    w = (w + w.T) / 4 + torch.eye(5, dtype=torch.float64)
    with torch.no_grad():
        for p in rnn.parameters():
            p.zero_()
        rnn.weight_hh_l0.copy_(w / torch.linalg.eigvalsh(w).max())
        rnn.bias_ih_l0.fill_(1.0)
    x = torch.zeros(600, 2, 2, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(rnn.weight_hh_l0).abs().log().sort(descending=True).values.detach()
    torch.testing.assert_close(uv.flow.lyapunov(rnn, x, warmup=300).exponents, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(uv.flow.lyapunov(rnn, x, n=2, warmup=300).exponents, expected[:2], rtol=0, atol=1e-6)


@given(case=module_cases())
def test_exponents_add_up_to_the_mean_log_determinant(case: ModuleCase) -> None:
    if case.module.mode == "RNN_RELU" or case.module.proj_size or len(set(case.lengths)) > 1:
        return
    T = max(case.lengths)
    found = uv.flow.lyapunov(case.module, case.x, case.hx).exponents
    logs = [torch.linalg.slogdet(uv.flow.jacobian(case.module, case.x, case.hx, t=t)).logabsdet for t in range(T)]
    assert float(found.sum()) == pytest.approx(float(torch.stack(logs).mean()), rel=1e-8, abs=1e-8)


def test_history_ends_at_the_estimate() -> None:
    torch.manual_seed(0)
    found = uv.flow.lyapunov(nn.GRU(2, 4, dtype=torch.float64), torch.randn(30, 3, 2, dtype=torch.float64), n=3)
    torch.testing.assert_close(found.history[-1], found.exponents)
    assert found.history.shape == (30, 3)
    torch.testing.assert_close(found.per_sample.mean(0), found.exponents)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_singular_values_of_a_product(kind: Any) -> None:
    torch.manual_seed(0)
    layer, x = kind(2, 4, dtype=torch.float64), torch.randn(8, 2, 2, dtype=torch.float64)
    product = torch.eye(8 if kind is nn.LSTM else 4, dtype=torch.float64).expand(2, -1, -1)
    for t in range(3, 7):
        product = uv.flow.jacobian(layer, x, t=t) @ product
    expected = torch.linalg.svdvals(product).log()[:, :2]
    found = uv.flow.singular_values(layer, x, j=2, k=6, n=2, iterations=60)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_singular_values_hundreds_of_decades_apart() -> None:
    rnn = nn.RNN(1, 3, dtype=torch.float64)
    with torch.no_grad():
        for p in rnn.parameters():
            p.zero_()
        rnn.weight_hh_l0.copy_(torch.diag(torch.tensor([0.9, 0.1, 0.001], dtype=torch.float64)))
    found = uv.flow.singular_values(rnn, torch.zeros(201, 1, 1, dtype=torch.float64), j=0, k=200, n=3)
    torch.testing.assert_close(found[0], 200 * torch.tensor([0.9, 0.1, 0.001], dtype=torch.float64).log())


def test_gate_statistics_of_known_biases() -> None:
    lstm = nn.LSTM(1, 4, dtype=torch.float64)
    tau = torch.tensor([2.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    with torch.no_grad():
        for p in lstm.parameters():
            p.zero_()
        lstm.bias_ih_l0[4:8] = (tau - 1).log()
        lstm.bias_ih_l0[12:16] = 30.0
    stats = uv.flow.gate_statistics(lstm, torch.zeros(5, 2, 1, dtype=torch.float64))
    torch.testing.assert_close(stats.mean[1], 1 - 1 / tau)
    torch.testing.assert_close(stats.time_constant, -1 / (1 - 1 / tau).log())
    torch.testing.assert_close(stats.half_life, -math.log(2) / (1 - 1 / tau).log())
    assert (stats.saturation[3] == 1).all()
    assert (stats.saturation[0] == 0).all()
    counts, edges = stats.histogram(bins=6)
    assert counts.sum() == 4
    assert edges[0] <= stats.time_constant.min() * 1.001
    with pytest.raises(ValueError, match="no gate that carries"):
        _ = uv.flow.gate_statistics(nn.RNN(1, 2), torch.zeros(3, 1, 1)).time_constant


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_gate_statistics_do_not_depend_on_how_the_steps_are_read(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = kind(2, 3, dtype=torch.float64), 5 * torch.randn(20, 3, 2, dtype=torch.float64)
    expected = uv.flow.gate_statistics(layer, x, lengths=[20, 7, 12])
    alone = [uv.flow.gate_statistics(layer, x[:n, b : b + 1]) for b, n in enumerate((20, 7, 12))]
    for what in ("mean", "saturation"):
        mean = sum(n * getattr(s, what) for n, s in zip((20, 7, 12), alone, strict=True)) / 39
        torch.testing.assert_close(getattr(expected, what), mean, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr("unvanish.flow.gates.STRETCH", 6)
    found = uv.flow.gate_statistics(layer, x, lengths=[20, 7, 12])
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.saturation, expected.saturation)
    if expected.log_carry is not None:
        assert found.log_carry is not None
        torch.testing.assert_close(found.log_carry, expected.log_carry, rtol=1e-12, atol=1e-12)


def test_source_gradients_equal_autograd() -> None:
    torch.manual_seed(0)
    lstm, x = nn.LSTM(2, 3, num_layers=2, dtype=torch.float64), torch.randn(5, 2, 2, dtype=torch.float64)
    error = torch.randn(5, 2, 3, dtype=torch.float64)
    error[1] = 0
    found = uv.flow.source_gradients(lstm, x, error=error, at="l0")
    assert found.sources == (0, 2, 3, 4)
    weights, total = [lstm.weight_hh_l0, lstm.weight_ih_l0], None
    for i, k in enumerate(found.sources):
        grads = torch.cat([g.flatten() for g in torch.autograd.grad((lstm(x)[0][k] * error[k]).sum(), weights)])
        total = grads if total is None else total + grads
        assert float(found.norms[i]) == pytest.approx(float(grads.norm()), rel=1e-10)
        assert float(found.partial_sums[i]) == pytest.approx(float(total.norm()), rel=1e-10)
    with uv.watch(lstm) as flow:
        (lstm(x)[0][4] * error[4]).sum().backward()
    assert float(found.longest_path[-1]) == pytest.approx(float(flow["l0"].dweight[0]), rel=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, x: uv.flow.jacobian(g, x, t=9), "t: expected a step from 0 to 3"),
        (lambda g, x: uv.flow.jacobian(g, x, t=1.5), "t: expected a step from 0 to 3"),
        (lambda g, x: uv.flow.lyapunov(g, x, n=4), "n: expected 1 to 3"),
        (lambda g, x: uv.flow.lyapunov(g, x, n=1.5), "n: expected 1 to 3"),
        (lambda g, x: uv.flow.singular_values(g, x, j=0, k=1, n=1.5), "n: expected 1 to 3"),
        (lambda g, x: uv.flow.singular_values(g, x, j=0, k=1, iterations=0), "iterations: expected one turn at least"),
        (lambda g, x: uv.flow.lyapunov(g, x, warmup=4), "warmup: expected 0 to 3"),
        (lambda g, x: uv.flow.singular_values(g, x, j=3, k=1), "j read before k"),
        (lambda g, x: uv.flow.decompose(g, x, textbook=True), "textbook: expected a cell whose output is made from"),
        (lambda g, x: uv.flow.decompose(g, x, error=torch.zeros(1)), r"error: expected \[T, B, D·R\] = \(4, 2, 3\)"),
        (lambda g, x: uv.flow.source_gradients(g, x, error=torch.zeros(4, 2, 3)), "error: expected a non-zero error"),
        (lambda g, x: uv.flow.decompose(g, x.double()), "x: expected the layer's dtype"),
        (lambda g, x: uv.flow.decompose(g, x[..., :1]), "x: expected 2 features"),
        (lambda g, x: uv.flow.adjoint_map(g, x[:, :0]), "x: expected one sample at least, got an empty batch"),
        (lambda g, x: uv.flow.lyapunov(g, x, torch.zeros(1, 2, 3).double()), "hx: expected the layer's dtype"),
    ],
)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(nn.GRU(2, 3), torch.randn(4, 2, 2))


def test_unknown_terms_are_named() -> None:
    with pytest.raises(AttributeError, match="the terms of gru are carry, reset_gate, update_gate, candidate"):
        _ = uv.flow.decompose(nn.GRU(2, 3), torch.randn(4, 2, 2)).forget_gate


@pytest.mark.parametrize(
    ("kind", "titles"),
    [
        (nn.RNN, {"recurrent": "through the recurrent weights"}),
        (nn.GRU, {"carry": "carry, diag(z)", "candidate": "through the candidate's weights"}),
        (nn.LSTM, {"carry": "B · carry, diag(f)", "forget_gate": "A · through the forget gate's weights"}),
        (nn.LSTM, {"output_gate": "O · through the output gate's weights"}),
    ],
)
def test_terms_are_called_by_what_they_are(kind: Any, titles: dict[str, str]) -> None:
    terms = uv.flow.decompose(kind(2, 3), torch.randn(4, 2, 2))
    assert {name: terms.terms[name].title for name in titles} == titles
    assert {text.get_text() for text in terms.plot().texts} >= set(titles.values())


def test_terms_of_any_cell_are_called_by_what_they_are() -> None:
    class Single(uv.Cell):
        gates, states = ("f", "n"), ("h",)

        def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
            f = (p.f + q.f).sigmoid()
            return (1 - f) * s.h + f * (p.n + q.n).tanh()

    terms = uv.flow.decompose(uv.nn.Recurrent(Single(), 2, 3), torch.randn(4, 2, 2)).terms
    assert {name: term.title for name, term in terms.items()} == {
        "carry": "carry, diag(1 − f)",
        "f": "through the weights of gate f",
        "n": "through the weights of gate n",
    }


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (nn.LSTM, ["input_gate", "forget_gate", "candidate", "output_gate"]),
        (nn.GRU, ["reset_gate", "update_gate", "candidate"]),
    ],
)
def test_removing_one_gates_recurrence_removes_its_term_alone(kind: Any, names: list[str]) -> None:
    for position, name in enumerate(names):
        torch.manual_seed(0)
        layer = kind(2, 3, dtype=torch.float64)
        with torch.no_grad():
            layer.weight_hh_l0.chunk(len(names))[position].zero_()
        terms = uv.flow.decompose(layer, torch.randn(6, 2, 2, dtype=torch.float64))
        # An LSTM's error at h_T reaches o_T directly; the terms start one step later.
        for other, term in terms.terms.items():
            assert bool((term.norm[:-1] == 0).all()) == (other == name), (name, other)
