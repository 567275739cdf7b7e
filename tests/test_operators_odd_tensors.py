"""Operators and layers on tensors without plain memory: subclasses, fake and meta tensors, wrappers of transforms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

import unvanish as uv
from tests.operator_calls import (
    draw_layer,
    restrided,
    weights_of,
)
from unvanish import engine
from unvanish.cells import CELLS, Weights
from unvanish.engine import native

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=f"native rung: {native.MISSING}")


class Labelled(Tensor):
    """A subclass that only adds behaviour in Python."""


class Wrapping(Tensor):
    """A subclass without memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapping":
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.__dict__["held"] = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = _pytree.tree_map_only(Wrapping, lambda w: w.__dict__["held"], (args, kwargs or {}))
        return func(*unwrapped[0], **unwrapped[1])


def negative(v: Tensor) -> Tensor:
    return restrided(v, "negated")


def zeros(v: Tensor) -> Tensor:
    return torch._efficientzerotensor(v.shape, dtype=v.dtype)  # type: ignore[attr-defined]


ODD = {
    "negation pending": negative,
    "zeros without memory": zeros,
    "a subclass of Tensor": lambda v: v.as_subclass(Labelled),
    "Wrapping": Wrapping,
}


@pytest.mark.parametrize("reason", list(ODD))
@pytest.mark.parametrize("place", ["x", "h0", "w_hh"])
def test_tensors_without_plain_memory_are_declined_and_right(reason: str, place: str) -> None:
    given = draw_layer("lstm", 4, 3, 2, 5)
    odd, plain = ODD[reason](given[place]), given[place]  # type: ignore[arg-type]
    if reason == "zeros without memory":
        plain = torch.zeros_like(plain)  # type: ignore[arg-type]

    def arguments(v: Any) -> tuple[Any, ...]:
        all_of = {**given, place: v}
        return all_of["x"], (all_of["h0"], all_of["c0"]), weights_of(all_of)  # type: ignore[arg-type]

    x, state, w = arguments(odd)
    choice = engine.explain(CELLS["lstm"], x, others=(*state, *w))
    assert choice.rung != "native"
    assert reason in choice.declined["native"]
    with pytest.raises(RuntimeError, match="plain memory"):
        engine.run(CELLS["lstm"], x, state, w, rung="native")
    with pytest.raises(RuntimeError, match="plain memory"):
        engine.Pass(CELLS["lstm"], x, state, w, None, False)
    found, _ = engine.run(CELLS["lstm"], x, state, w)
    expected, _ = engine.run(CELLS["lstm"], *arguments(plain), rung="native")
    torch.testing.assert_close(found.as_subclass(Tensor), expected, rtol=1e-12, atol=1e-14)
    y = engine.trace(CELLS["lstm"], x, state, w).y
    torch.testing.assert_close(y.as_subclass(Tensor), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reason", ["negation pending", "zeros without memory", "a subclass of Tensor"])
def test_odd_errors_come_back_right(reason: str) -> None:
    layer = uv.nn.LSTM(2, 5, dtype=torch.float64)
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    d = torch.randn_like(y)
    odd = ODD[reason](d)
    if reason == "zeros without memory":
        d = torch.zeros_like(d)
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad(y, inputs, d, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, odd, retain_graph=True), expected)
    start, state, w = _parts(layer, x)
    ran = engine.Pass(CELLS["lstm"], start, state, w, None, False)
    _, norms, gradients = ran.back(odd, (None, None), None, False)
    torch.testing.assert_close(gradients.w_hh, expected[2])
    assert norms.h.isfinite().all()


def _parts(layer: uv.nn.LSTM, x: Tensor) -> tuple[Any, ...]:
    state = (x.new_zeros(x.shape[1], layer.hidden_size),) * 2
    return x.detach(), state, Weights(*(p.detach() for p in layer.parameters()))


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_layers_have_shapes_where_there_is_no_memory(kind: str, where: str) -> None:
    def shapes(make: Any, convert: bool, device: str) -> list[Any]:
        layer = make(5, 12, num_layers=2, device=device)
        layer = uv.accelerate(layer) if convert else layer
        y, final = layer(torch.randn(20, 6, 5, device=device))
        y.square().mean().backward()
        assert not isinstance(y, nn.Parameter)
        return [
            y.shape,
            *(s.shape for s in (final if kind == "LSTM" else [final])),
            *(p.grad.shape for p in layer.parameters()),
        ]

    ours, torchs = getattr(uv.nn, kind), getattr(nn, kind)
    expected = shapes(torchs, False, "cpu")
    if where == "meta":
        found = [shapes(ours, False, "meta"), shapes(torchs, True, "meta")]
    else:
        with FakeTensorMode():
            found = [shapes(ours, False, "cpu"), shapes(torchs, True, "cpu")]
    assert all(each == expected for each in found)


def test_fake_tensors_are_declined_but_not_while_a_graph_is_captured() -> None:
    cell, given = CELLS["gru"], draw_layer("gru", 4, 3, 2, 5)
    state, w = (given["h0"],), weights_of(given)
    with FakeTensorMode():
        x = torch.zeros(4, 3, 2, dtype=torch.float64)
        assert "FakeTensorMode is active" in engine.explain(cell, x).declined["native"]
        with pytest.raises(RuntimeError, match="FakeTensorMode is active"):
            engine.explain(cell, x, "native")
    # Also afterwards, when the mode is gone and the tensor is left.
    assert "FakeTensor, a subclass of Tensor" in engine.explain(cell, x).declined["native"]
    assert "on meta" in engine.explain(cell, torch.zeros(4, 3, 2, device="meta")).declined["native"]

    def y(x: Tensor) -> Tensor:
        return engine.run(cell, x, state, w)[0]  # type: ignore[arg-type]

    real: Any = given["x"]
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(y, tracing_mode=mode, _allow_non_fake_inputs=True)(real)
        assert "unvanish.forward" in graph.code
        torch.testing.assert_close(graph(real), y(real))


def test_wrappers_of_transforms_never_reach_a_kernel() -> None:
    cell, given = CELLS["gru"], draw_layer("gru", 4, 3, 2, 5)
    state, w = (given["h0"],), weights_of(given)
    x: Any = given["x"]
    left: list[Tensor] = []

    def y(x: Tensor) -> Tensor:
        left.append(x)
        return engine.run(cell, x, state, w)[0]  # type: ignore[arg-type]

    torch.testing.assert_close(torch.vmap(y)(x.expand(3, *x.shape)), y(x).expand(3, -1, -1, -1))
    assert "unvanish" not in engine.explain(cell, left[0]).rung
    assert engine.explain(cell, left[0]).rung != "native"
    torch.testing.assert_close(
        torch.func.jacrev(lambda x: y(x).sum())(x), torch.autograd.functional.jacobian(lambda x: y(x).sum(), x)
    )


def test_errors_in_a_batch_are_right_also_with_a_recorder() -> None:
    class Recorder:
        awaits_backward = True
        heard = 0

        def forward(self, statistics: Any) -> None: ...

        def backward(self, norms: Any, gradients: Any, recompute: Any) -> None:
            self.heard += 1

    layer = uv.nn.LSTM(2, 5, dtype=torch.float64)
    x, state, w = _parts(layer, torch.randn(4, 3, 2, dtype=torch.float64))
    x.requires_grad_()
    batch = torch.randn(6, 4, 3, 5, dtype=torch.float64)
    recorder = Recorder()
    plain, recorded = (engine.run(CELLS["lstm"], x, state, w, record=r)[0] for r in (None, recorder))
    expected = torch.stack([torch.autograd.grad(plain, x, d, retain_graph=True)[0] for d in batch])
    for y in (plain, recorded):
        (found,) = torch.autograd.grad(y, x, batch, retain_graph=True, is_grads_batched=True)
        torch.testing.assert_close(found, expected)
    assert recorder.heard == 0
    torch.testing.assert_close(torch.autograd.grad(recorded, x, batch[0])[0], expected[0])
    assert recorder.heard == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_what_hooks_on_saved_tensors_return_is_checked(recorded: bool) -> None:
    class Recorder:
        awaits_backward = True

        def forward(self, statistics: Any) -> None: ...

        def backward(self, norms: Any, gradients: Any, recompute: Any) -> None: ...

    layer = uv.nn.LSTM(2, 5, dtype=torch.float64)
    x, state, w = _parts(layer, torch.randn(4, 3, 2, dtype=torch.float64))
    x.requires_grad_()
    record = Recorder() if recorded else None

    def gradient(unpack: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda v: v, unpack):
            y, _ = engine.run(CELLS["lstm"], x, state, w, record=record)
        return torch.autograd.grad(y.sum(), x)[0]

    expected = torch.autograd.grad(engine.run(CELLS["lstm"], x, state, w)[0].sum(), x)[0]
    torch.testing.assert_close(gradient(lambda v: restrided(v, "permuted")), expected)
    with pytest.raises(RuntimeError, match=r"^x: expected float32 or float64"):
        gradient(lambda v: v.to(torch.bfloat16))
