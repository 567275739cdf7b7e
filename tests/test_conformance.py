"""The laws that hold for every cell; a new one is held to them by its line in `unvanish.cells.ZOO`."""

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unvanish as uv
from unvanish.cells import CELLS, ZOO, Cell, Point, State, Weights, calculus
from unvanish.cells.activations import activations
from unvanish.cells.derived import partials, structure
from unvanish.flow import kernel_rows
from unvanish.train.models import RECIPES, Shape
from unvanish.train.tasks import make_task

DOUBLE = torch.float64
every_cell = pytest.mark.parametrize("name", list(ZOO))


class Stages(Cell):
    """Not in the zoo: two vectors, a gate without an input, one without a matrix, and a state handed on unchanged."""

    gates, states, vectors = ("a", "b", "k"), ("y", "m", "old"), ("u", "w")
    inputs, recurrent = ("a", "k"), {"a": "m", "b": "y"}
    memory, initial = "m", {"m": 0.3}

    def __init__(self, rate: float = 0.7) -> None:
        self.rate = rate

    def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, ...]:
        k = p.k.sigmoid()
        m = k * s.m + (1 - k) * (p.a + v.u * q.a).tanh() + self.rate * (q.b * v.w).sin() * s.old
        return m.tanh() * q.b.sigmoid(), m, s.y


def make(name: str) -> Cell:
    return Stages() if name == "stages" else ZOO[name]()


def weights(cell: Cell, n_in: int, H: int, generator: torch.Generator, bias: bool = True) -> Weights:
    def draw(*shape: int) -> Tensor:
        return 0.8 * torch.randn(*shape, generator=generator, dtype=DOUBLE)

    G, Q, V = len(cell.input_gates), len(cell.sources), len(cell.vectors)
    w_hh, b_hh = (draw(Q * H, H), draw(Q * H)) if Q else (None, None)
    w = Weights(draw(G * H, n_in), w_hh, draw(G * H), b_hh, None, draw(V, H) if V else None)
    return w if bias else w._replace(b_ih=None, b_hh=None)


def a_point(cell: Cell, B: int = 3, n_in: int = 2, H: int = 4, seed: int = 0) -> Point:
    generator = torch.Generator().manual_seed(seed)
    w = weights(cell, n_in, H, generator)
    x = torch.randn(B, n_in, generator=generator, dtype=DOUBLE)
    before = tuple(torch.randn(B, H, generator=generator, dtype=DOUBLE) for _ in cell.states)
    return Point(cell, w, x, before, cell.advance(cell.project(x, w), before, w))


def layer_of(name: str, n_in: int = 2, H: int = 4, seed: int = 0, **options: Any) -> uv.nn.Recurrent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return uv.nn.Recurrent(make(name), n_in, H, dtype=DOUBLE, **options)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("name", [*ZOO, "stages"])
@given(seed=st.integers(0, 999), B=st.integers(1, 3), H=st.integers(1, 5))
@settings(max_examples=8)
def test_adjoint_jvp_and_jacobian_are_autograds(name: str, seed: int, B: int, H: int) -> None:
    cell = make(name)
    at = a_point(cell, B, H=H, seed=seed)
    sizes = (H,) * len(cell.states)

    def advance(s: Tensor) -> Tensor:
        return torch.cat(cell.advance(at.p, s.split(sizes, -1), at.weights), -1)

    whole = jacobian(advance, torch.cat(at.before, -1))
    expected = torch.stack([whole[b, :, b] for b in range(B)])  # type: ignore[index]
    found = calculus.jacobian(cell, at.partials, at.weights, sizes)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    tangent = tuple(noise(B, H, seed=seed + i) for i in range(len(sizes)))
    column = torch.cat(tangent, -1).unsqueeze(-1)
    moved = torch.cat(calculus.jvp(cell, at.partials, tangent, at.weights), -1)
    torch.testing.assert_close(moved, (expected @ column).squeeze(-1), rtol=1e-10, atol=1e-12)
    back = torch.cat(calculus.adjoint(cell, at.partials, tangent, at.weights).previous, -1)
    torch.testing.assert_close(back, (expected.mT @ column).squeeze(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", list(CELLS))
@given(seed=st.integers(0, 999))
@settings(max_examples=8)
def test_what_is_written_by_hand_equals_what_is_derived(name: str, seed: int) -> None:
    cell = CELLS[name]
    at = a_point(cell, seed=seed)
    mine, derived = at.partials, partials(cell, at)
    for kind in ("made", "q", "p", "s", "v"):
        torch.testing.assert_close(getattr(mine, kind), getattr(derived, kind), rtol=1e-12, atol=1e-14)
    values = activations(cell, at)
    torch.testing.assert_close((at.gates, cell.sensitivity(at)), tuple(values), rtol=1e-12, atol=1e-14)
    assert cell.carry_gate == structure(cell).carry_gate
    assert cell.carries == ((cell.remembers,) * 2 in structure(cell).s)
    torch.testing.assert_close(cell.output(at), Cell.output(cell, at))


@pytest.mark.parametrize("name", [*ZOO, "stages"])
def test_many_steps_are_derived_as_one_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, T = make(name), 7
    steps = [a_point(cell, seed=s) for s in range(T)]
    w = steps[0].weights
    before, after = (
        tuple(map(torch.stack, zip(*(getattr(p, k) for p in steps), strict=True))) for k in ("before", "after")
    )
    many = Point(cell, w, torch.stack([p.x for p in steps]), before, after)
    for elements in (2**16, 20):
        monkeypatch.setattr("unvanish.cells.derived.CHUNK_ELEMENTS", elements)
        found = partials(cell, many)
        assert (found.stacked is not None) == (elements == 20)
        for t in (0, T - 1):
            alone = partials(cell, Point(cell, w, many.x[t], *(tuple(s[t] for s in k) for k in (before, after))))
            for kind in ("made", "q", "p", "s", "v"):
                torch.testing.assert_close(getattr(found.at(t), kind), getattr(alone, kind), rtol=1e-13, atol=1e-15)
        for a, (gates, k) in found.by_state(cell).items():
            for i, gate in enumerate(gates):
                assert torch.equal(k[..., i, :], found.q[a, gate])


@pytest.mark.parametrize("name", [*ZOO, "stages"])
@given(
    seed=st.integers(0, 999),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    ragged=st.booleans(),
    clip=st.none() | st.just(0.5),
)
@settings(max_examples=6)
def test_the_manual_rung_equals_autograd(
    name: str, seed: int, layers: int, bidirectional: bool, bias: bool, ragged: bool, clip: float | None
) -> None:
    layer = layer_of(name, seed=seed, num_layers=layers, bidirectional=bidirectional, bias=bias)
    layer.clip = clip
    x = noise(6, 3, 2, seed=seed).requires_grad_()
    rows = layers * (2 if bidirectional else 1)
    hx: Any = tuple(noise(rows, 3, 4, seed=seed + i).requires_grad_() for i in range(len(layer.cell.states)))
    inputs = [x, *hx, *layer.parameters()]
    found = []
    for rung in ("manual", "reference"):
        with uv.engine.force(rung):
            y, final = layer(x, hx if len(hx) > 1 else hx[0], lengths=[6, 0, 3] if ragged else None)
        outs = (y, *(final if isinstance(final, tuple) else (final,)))
        d = [noise(*out.shape, seed=seed + 9) for out in outs]
        reached = [(o, e) for o, e in zip(outs, d, strict=True) if o.requires_grad]
        ends, errors = zip(*reached, strict=True)
        grads = torch.autograd.grad(ends, inputs, errors, materialize_grads=True, allow_unused=True)
        found.append([*outs, *grads])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


def stepped(layer: uv.nn.Recurrent, x: Tensor) -> list[State]:
    """The layer's states as a user's own loop makes them, each a part of the graph."""
    w, cell = layer.direction_weights(0, False), layer.cell
    state = cell.start(x[0], (layer.hidden_size,) * len(cell.states))
    found = []
    for p in cell.project(x, w):
        state = cell.advance(p, state, w)
        found.append(state)
    return found


@every_cell
def test_the_adjoint_map_is_autograds(name: str) -> None:
    layer, x = layer_of(name), noise(6, 2, 2)
    memory = layer.cell.states.index(layer.cell.remembers)
    error = noise(6, 2, 4, seed=3)
    for few in ([5], list(range(6)) * 1):
        found = uv.flow.adjoint_map(layer, x, sources=few, error=error[: len(few)])
        for i, k in enumerate(few):
            states = stepped(layer, x)
            reached = [s[memory] for s in states[: k + 1]]
            grads = torch.autograd.grad(
                (states[k][0] * error[i]).sum(), reached, allow_unused=True, materialize_grads=True
            )
            expected = torch.stack([g.norm(dim=-1) for g in grads])
            torch.testing.assert_close(found.norms[i, : k + 1], expected, rtol=1e-9, atol=1e-13)
            assert not found.norms[i, k + 1 :].any()


@every_cell
def test_collapsed_rows_equal_direct_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(name, num_layers=2), noise(40, 2, 2)
    collapsed = uv.flow.adjoint_map(layer, x).log_norms
    monkeypatch.setattr(kernel_rows, "MANY", 1000)
    torch.testing.assert_close(collapsed, uv.flow.adjoint_map(layer, x).log_norms, rtol=1e-9, atol=1e-9)


@every_cell
def test_terms_sum_to_the_error_that_comes_back(name: str) -> None:
    layer, x, error = layer_of(name), noise(5, 2, 2), noise(5, 2, 4, seed=1)
    terms = uv.flow.decompose(layer, x, error=error, matrices=True)
    memory = layer.cell.states.index(layer.cell.remembers)
    states = stepped(layer, x)
    loss = sum((s[0] * e).sum() for s, e in zip(states, error, strict=True))
    total = torch.autograd.grad(
        loss, [s[memory] for s in states], retain_graph=True, allow_unused=True, materialize_grads=True
    )
    own = [
        torch.autograd.grad((s[0] * e).sum(), s[memory], retain_graph=True, allow_unused=True, materialize_grads=True)[
            0
        ]
        if s[0] is not s[memory]
        else e
        for s, e in zip(states, error, strict=True)
    ]
    back = torch.stack([a - b for a, b in zip(total, own, strict=True)])
    torch.testing.assert_close(terms.total, back.norm(dim=-1), rtol=1e-9, atol=1e-12)
    shares = torch.stack([term.share for term in terms.terms.values()]).sum(0)
    there = ~shares.isnan()
    torch.testing.assert_close(shares[there], torch.ones_like(shares[there]))
    assert ("carry" in terms.terms) == layer.cell.carries
    gates = {g for g in layer.cell.sources if g not in layer.cell.same_step}
    paths = {f"{way}_{s}" for s in layer.cell.states for way in ("from", "through")}
    assert set(terms.terms) - {"carry"} <= {layer.cell.titles.get(g, g) for g in gates} | paths


@every_cell
def test_subgradients_and_sources_sum_to_autograds_gradient(name: str) -> None:
    layer, x, error = layer_of(name), noise(5, 2, 2), noise(5, 2, 4, seed=1)
    w = layer.direction_weights(0, False)
    matrices = [m.detach().requires_grad_() for m in w[:2] if m is not None]
    layer.direction_weights = lambda *_: Weights(*[*matrices, None][:2], *w[2:])  # type: ignore[method-assign]
    whole = torch.autograd.grad((layer(x)[0] * error).sum(), matrices)
    sources = uv.flow.source_gradients(layer, x, error=error)
    assert float(sources.partial_sums[-1]) == pytest.approx(math.hypot(*(float(g.norm()) for g in whole)), rel=1e-9)
    own = torch.autograd.grad((stepped(layer, x)[3][0] * error[3]).sum(), matrices)
    assert float(sources.norms[3]) == pytest.approx(math.hypot(*(float(g.norm()) for g in own)), rel=1e-9)


@every_cell
def test_exponents_add_up_to_the_mean_log_determinant(name: str) -> None:
    layer, x = layer_of(name), noise(6, 2, 2)
    spectrum = uv.flow.lyapunov(layer, x)
    logs = [torch.linalg.slogdet(uv.flow.jacobian(layer, x, t=t)).logabsdet for t in range(6)]
    expected, found = float(torch.stack(logs).mean()), float(spectrum.exponents.sum())
    if math.isfinite(expected) and expected > -30:
        assert found == pytest.approx(expected, abs=1e-7)
    else:
        assert found < -20


@every_cell
def test_singular_values_are_those_of_the_product(name: str) -> None:
    layer, x = layer_of(name), noise(5, 2, 2)
    product = uv.flow.jacobian(layer, x, t=2)
    for t in (3, 4):
        product = uv.flow.jacobian(layer, x, t=t) @ product
    expected = torch.linalg.svdvals(product)[:, 0].log()
    torch.testing.assert_close(uv.flow.singular_values(layer, x, j=1, k=4)[:, 0], expected, rtol=1e-6, atol=1e-6)


@every_cell
def test_a_factor_on_the_error_and_the_order_of_samples_change_nothing(name: str) -> None:
    layer, x, error = layer_of(name), noise(5, 3, 2), noise(1, 3, 4, seed=2)
    plain = uv.flow.adjoint_map(layer, x, sources=[-1], error=error).log_norms
    scaled = uv.flow.adjoint_map(layer, x, sources=[-1], error=1e-200 * error).log_norms
    torch.testing.assert_close(scaled - math.log(1e-200), plain, rtol=0, atol=1e-9)
    order = torch.tensor([2, 0, 1])
    moved = uv.flow.adjoint_map(layer, x[:, order], sources=[-1], error=error[:, order]).log_norms
    torch.testing.assert_close(moved, plain[..., order], rtol=1e-9, atol=1e-9)


@every_cell
def test_gates_and_memory(name: str) -> None:
    layer, x = layer_of(name), noise(8, 3, 2)
    stats = uv.flow.gate_statistics(layer, x)
    states = layer.states(x)["l0"]
    assert tuple(states.gates) == layer.cell.gates == stats.gate_names
    assert tuple(states.states) == layer.cell.states
    torch.testing.assert_close(states.h, layer(x)[0])
    for i, gate in enumerate(layer.cell.gates):
        torch.testing.assert_close(stats.mean[i], states.gates[gate].mean((0, 1)))
    assert ((stats.saturation >= 0) & (stats.saturation <= 1)).all()
    if not layer.cell.carries:
        assert stats.log_carry is None
        with pytest.raises(TypeError, match="a cell that carries its memory"):
            uv.flow.survival(layer, x, lag=3)
        return
    assert stats.time_constant.shape == (4,)
    if layer.cell.carry_gate is not None and not layer.cell.vectors:
        gate, sign = layer.cell.carry_gate
        open_ = states.gates[gate] if sign > 0 else 1 - states.gates[gate]
        torch.testing.assert_close(stats.log_carry, open_.log().mean((0, 1)), rtol=1e-9, atol=1e-9)
    memory = layer.cell.states.index(layer.cell.remembers)
    jacobians = [uv.flow.jacobian(layer, x, t=t) for t in (5, 6, 7)]
    product = jacobians[2] @ jacobians[1] @ jacobians[0]
    # Independent coordinates at the start, the whole derivative of the memory at the end.
    block = product[:, 4 * memory : 4 * memory + 4, 4 * memory : 4 * memory + 4]
    expected = math.sqrt(float(block.square().sum((1, 2)).mean()) / 4)
    assert uv.flow.survival(layer, x, lag=3, paths="exact") == pytest.approx(expected, rel=1e-8)


@every_cell
def test_cures_act_on_the_cells_own_gates(name: str) -> None:
    layer, x = layer_of(name, H=16), noise(30, 2, 2)
    cell = layer.cell
    if cell.carry_gate is None:
        for cure in (uv.cures.forget_bias_, lambda m: uv.cures.chrono_(m, 50), uv.cures.uniform_gate_):
            with pytest.raises(TypeError, match="no gate that alone carries its state"):
                cure(layer)
    else:
        uv.cures.chrono_(layer, max_lag=50, generator=torch.Generator().manual_seed(0))
        bare = copy.deepcopy(layer)
        with torch.no_grad():
            for key, weight in bare.named_parameters():
                if not key.startswith("bias"):
                    weight.zero_()
        carry = uv.flow.gate_statistics(bare, torch.zeros_like(x)).log_carry.exp()  # type: ignore[union-attr]
        tau = 1 / (1 - carry)
        assert ((tau >= 2 - 1e-6) & (tau <= 50 + 1e-6)).all()
        assert float(tau.max()) > 20
        uv.cures.uniform_gate_(bare, torch.Generator().manual_seed(0))
        carry = uv.flow.gate_statistics(bare, torch.zeros_like(x)).log_carry.exp()  # type: ignore[union-attr]
        assert ((carry >= 1 / 16 - 1e-9) & (carry <= 15 / 16 + 1e-9)).all()
        uv.cures.forget_bias_(layer, -1.0)
        uv.cures.rescue_(layer, x, lag=20, target=0.4)
        assert uv.flow.survival(layer, x, lag=20) == pytest.approx(0.4, rel=0.01)
    if cell.sources:
        uv.cures.orthogonal_(layer)
        for block in layer.weight_hh_l0.chunk(len(cell.sources)):
            torch.testing.assert_close(block.mT @ block, torch.eye(16, dtype=DOUBLE), rtol=0, atol=1e-12)
        uv.cures.spectral_radius_(layer, 0.5)
        for block in layer.weight_hh_l0.chunk(len(cell.sources)):
            assert float(torch.linalg.eigvals(block).abs().max()) == pytest.approx(0.5)
        uv.cures.constrain_(layer, "spectral", 0.9)
        layer(x)[0].sum().backward()
    else:
        with pytest.raises(TypeError, match="no recurrent matrix"):
            uv.cures.orthogonal_(layer)


def training_steps(layer: uv.nn.Recurrent, x: Tensor) -> Iterator[float]:
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x)[0][-1].mean(-1) - x[-1, :, 0].clamp(-0.5, 0.5)).square().mean()
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


@every_cell
def test_it_trains_copies_pickles_and_loads(name: str) -> None:
    layer, x = layer_of(name, H=16), noise(5, 16, 2)
    losses = list(training_steps(layer, x))
    assert min(losses[-5:]) < losses[0]
    twin = pickle.loads(pickle.dumps(layer))
    again = layer_of(name, H=16, seed=5)
    again.load_state_dict(layer.state_dict())
    for other in (twin, copy.deepcopy(layer), again):
        assert torch.equal(other(x)[0], layer(x)[0])
    lengths = torch.tensor([5, 2, *[3] * 14])
    packed = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    y, final = layer(x, lengths=lengths)
    assert torch.equal(pad_packed_sequence(packed[0])[0], y)
    for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in (packed[1], final)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.removesuffix("-chrono") in ZOO])
def test_it_can_be_compared_and_trained_by_name(name: str) -> None:
    model = RECIPES[name].build(make_task("adding", 10), hidden=4)
    assert model(torch.randn(2, 10, 2)).shape == (2, 1)
    shape = Shape(name, inputs=2, outputs=3, hidden=4, layers=2, bidirectional=True, clip_recurrence=1.0)
    assert shape.build(10)(torch.randn(2, 10, 2), torch.tensor([10, 4])).shape == (2, 3)
