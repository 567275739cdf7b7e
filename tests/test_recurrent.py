"""`unvanish.nn.Recurrent` keeps torch.nn's contract for any cell."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unvanish as uv
from unvanish.cells import CELLS, ZOO, Cell
from unvanish.nn import Recurrent

TORCH = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


def pair(name: str, **options: Any) -> tuple[Recurrent, nn.RNNBase]:
    theirs = TORCH[name](3, 5, dtype=torch.float64, **options)
    ours = Recurrent(CELLS[name], 3, 5, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", list(TORCH))
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equal_to_torchs_layers_under_the_same_names(name: str, batch_first: bool, bidirectional: bool) -> None:
    ours, theirs = pair(name, num_layers=2, batch_first=batch_first, bidirectional=bidirectional)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    rows, B = 2 * (2 if bidirectional else 1), 4 if batch_first else 6
    hx: Any = tuple(torch.randn(rows, B, 5, dtype=torch.float64) for _ in CELLS[name].states)
    hx = hx if name == "lstm" else hx[0]
    lengths = torch.tensor([3, 1, 2, 3] if batch_first else [4, 1, 2, 4, 3, 1])
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    alone = torch.randn(7, 3, dtype=torch.float64)
    for given in ((x,), (x, hx), (packed,), (packed, hx), (alone,)):
        mine, expected = ours(*given), theirs(*given)
        if given[0] is packed:
            mine, expected = ((pad_packed_sequence(out[0])[0], out[1]) for out in (mine, expected))
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-13)


def test_dropout_lies_between_layers_and_only_in_training() -> None:
    ours, theirs = pair("gru", num_layers=3, dropout=0.5)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    torch.manual_seed(3)
    expected = theirs(x)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(ours.eval()(x)[0], ours(x)[0])


@pytest.mark.parametrize("name", ["peephole", "indrnn", "lem", "lif"])
def test_double_backward(name: str) -> None:
    layer, x = Recurrent(ZOO[name](), 2, 3, dtype=torch.float64), torch.randn(4, 2, 2, dtype=torch.float64)
    parameters = list(layer.parameters())
    found = []
    for rung in ("manual", "reference"):
        with uv.engine.force(rung):
            y = layer(x)[0]
            grads = torch.autograd.grad(y.square().sum(), parameters, create_graph=True, allow_unused=True)
            penalty = sum(g.square().sum() for g in grads if g is not None)
            found.append(torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True))  # type: ignore[arg-type]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["mgu", "slstm", "indrnn"])
def test_per_sample_gradients_and_forward_mode(name: str) -> None:
    layer, x = Recurrent(ZOO[name](), 2, 3, dtype=torch.float64), torch.randn(4, 5, 2, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}

    def loss(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, p, (sample.unsqueeze(1),))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    for key, stacked in each.items():
        alone = [torch.func.grad(loss)(parameters, x[:, b])[key] for b in range(5)]
        torch.testing.assert_close(stacked, torch.stack(alone), rtol=1e-9, atol=1e-12)
    _, tangent = torch.func.jvp(lambda v: layer(v)[0].sum(), (x,), (torch.ones_like(x),))
    whole = torch.autograd.grad(layer(x.requires_grad_())[0].sum(), x)[0].sum()
    torch.testing.assert_close(tangent, whole)


@pytest.mark.parametrize("name", ["peephole", "mingru"])
def test_checkpointing_bounds_the_memory_and_changes_nothing(name: str) -> None:
    layer, x = (
        Recurrent(ZOO[name](), 2, 3, num_layers=2, bidirectional=True, dtype=torch.float64),
        torch.randn(11, 2, 2),
    )
    x = x.double().requires_grad_()
    plain = torch.autograd.grad(layer(x, lengths=[11, 4])[0].square().sum(), [x, *layer.parameters()])
    layer.checkpoint_every = 3
    pieces = torch.autograd.grad(layer(x, lengths=[11, 4])[0].square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(pieces, plain, rtol=1e-10, atol=1e-12)


def test_autocast_runs_in_float32_and_answers_in_its_dtype() -> None:
    layer, x = Recurrent(ZOO["mgu"](), 2, 3), torch.randn(5, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = layer(x)
    assert y.dtype == h.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x)[0], rtol=1e-2, atol=1e-2)


def test_compiled_and_exported() -> None:
    layer, x = Recurrent(ZOO["peephole"](), 2, 3), torch.randn(5, 2, 2)
    exported = torch.export.export(copy.deepcopy(layer).eval(), (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    expected = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    found = torch.autograd.grad(compiled(x)[0].square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, expected)


def test_initial_states_are_the_cells_own() -> None:
    class Counter(Cell):
        gates, states, initial = ("x",), ("n", "k"), {"n": 2.0}

        def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, Tensor]:
            return s.n + 0 * (p.x + q.x), s.k + 1

    y, (n, k) = Recurrent(Counter(), 1, 2)(torch.zeros(3, 4, 1))
    assert torch.equal(y, torch.full((3, 4, 2), 2.0))
    assert torch.equal(n[0], y[-1])
    assert torch.equal(k, torch.full((1, 4, 2), 3.0))


class Mixes(Cell):
    gates = ("h",)

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        return (p.h + q.h).softmax(-1)


class Wrong(Cell):
    gates, recurrent = ("h",), {"x": "h"}

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        return p.h


class Short(Cell):
    gates, states = ("h",), ("h", "c")

    def step(self, p: Any, q: Any, s: Any, v: Any) -> Tensor:
        return p.h


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Recurrent(Mixes(), 2, 3), ValueError, "expected every operation to act on each unit alone"),
        (lambda: Recurrent(Wrong(), 2, 3), ValueError, "recurrent: expected names among h, got 'x'"),
        (lambda: Recurrent(Short(), 2, 3), ValueError, r"step: expected h, c, each as large"),
        (lambda: Recurrent(ZOO["mgu"], 2, 3), TypeError, r"expected an instance, got the class MGU; pass MGU\(\)"),
        (lambda: Recurrent("mgu", 2, 3), TypeError, "cell: expected an unvanish.Cell, got str"),
        (lambda: Recurrent(ZOO["mgu"](), 0, 3), ValueError, "input_size: expected a whole number"),
        (lambda: Recurrent(ZOO["mgu"](), 2, 3, dropout=2), ValueError, "dropout: expected a probability"),
        (lambda: Recurrent(ZOO["mgu"](), 2, 3)(torch.zeros(2, 2, 5)), RuntimeError, "Expected 2, got 5"),
        (lambda: Recurrent(ZOO["mgu"](), 2, 3)(torch.zeros(2)), ValueError, "2-D or 3-D, got 1-D"),
        (lambda: Recurrent(ZOO["mgu"](), 2, 3)(torch.zeros(0, 2, 2)), RuntimeError, "larger than 0"),
        (lambda: Recurrent(ZOO["mgu"](), 2, 3)([1]), TypeError, "a Tensor or a PackedSequence, got list"),
        (
            lambda: Recurrent(ZOO["peephole"](), 2, 3)(torch.zeros(2, 2, 2), torch.zeros(1, 2, 3)),
            ValueError,
            r"hx: expected \(h_0, c_0\), got Tensor",
        ),
        (
            lambda: Recurrent(ZOO["mgu"](), 2, 3)(torch.zeros(2, 2, 2), torch.zeros(1, 3, 3)),
            RuntimeError,
            r"hx: expected h_0 of \(1, 2, 3\), got \(1, 3, 3\)",
        ),
        (
            lambda: Recurrent(ZOO["mgu"](), 2, 3)(torch.zeros(2, 2, 2), lengths=[3, 1]),
            ValueError,
            "lengths: expected 0 to 2",
        ),
    ],
)
def test_what_does_not_fit_is_named(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_it_shows_its_cell_and_what_differs() -> None:
    layer = Recurrent(ZOO["janet"](beta=2.0), 2, 3, num_layers=2)
    assert repr(layer) == "Recurrent(JANET(beta=2.0), 2, 3, num_layers=2)"
