"""The registered operators, called as a graph or another program would: right for any strides, an error for anything
that does not fit, and no tensor without plain memory ever reaches a kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

import unvanish as uv
from unvanish import engine, torch_internals
from unvanish.cells import CELLS, Weights
from unvanish.engine import native, operators

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=f"native rung: {native.MISSING}")

FORWARD = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "lengths")
BACKWARD = ("dy", "dh", "dc", *FORWARD, "y", "gates", "cells")
NAMES = list(native.NUMBER)


def draw_layer(
    name: str, T: int, B: int, n_in: int, H: int, P: int = 0, bias: bool = True, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor | None]:
    """The tensors that `unvanish::forward` takes, by name."""
    make = torch.Generator().manual_seed(T * 100 + B * 10 + H)
    G, R, lstm = len(CELLS[name].gates), P or H, name == "lstm"

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, dtype=dtype) / 2

    return {
        "x": randn(T, B, n_in),
        "h0": randn(B, R),
        "c0": randn(B, H) if lstm else None,
        "w_ih": randn(G * H, n_in),
        "w_hh": randn(G * H, R),
        "b_ih": randn(G * H) if bias else None,
        "b_hh": randn(G * H) if bias else None,
        "w_hr": randn(P, H) if P else None,
        "lengths": None,
    }


def forward(name: str, given: dict[str, Tensor | None], save: bool = True, closed: float = 0.0, **how: Any) -> Any:
    number = how.get("cell", native.NUMBER[name])
    reverse, clip = how.get("reverse", False), how.get("clip", 0.0)
    return torch.ops.unvanish.forward(*(given[k] for k in FORWARD), number, reverse, clip, save, closed)


def backward(name: str, given: dict[str, Tensor | None], **how: Any) -> Any:
    number = how.get("cell", native.NUMBER[name])
    reverse, clip = how.get("reverse", False), how.get("clip", 0.0)
    return torch.ops.unvanish.backward(*(given[k] for k in BACKWARD), number, reverse, clip, True)


def weights_of(given: dict[str, Any]) -> Weights:
    return Weights(*(given[k] for k in FORWARD[3:8]))


def with_errors(name: str, given: dict[str, Tensor | None], **how: Any) -> dict[str, Tensor | None]:
    """What `unvanish::backward` takes after a forward pass, with errors of ones."""
    y, h, c, gates, cells, *_ = forward(name, given, **how)
    dc = torch.ones_like(c) if name == "lstm" else None
    return {
        **given,
        "dy": torch.ones_like(y),
        "dh": torch.ones_like(h),
        "dc": dc,
        "y": y,
        "gates": gates,
        "cells": cells,
    }


def reference(
    name: str, given: dict[str, Tensor | None], reverse: bool, clip: float
) -> tuple[list[Tensor], list[Tensor]]:
    """(y and the final states, gradients of the sum of them all) of the reference rung, in the operators' order."""
    inputs = {k: None if v is None else v.detach().clone() for k, v in given.items()}
    leaves = [k for k in FORWARD[:-1] if inputs[k] is not None]
    for k in leaves:
        inputs[k].requires_grad_()  # type: ignore[union-attr]
    state: Any = tuple(inputs[k] for k in ("h0", "c0") if inputs[k] is not None)
    x: Any = inputs["x"]
    y, final = engine.run(
        CELLS[name], x, state, weights_of(inputs), inputs["lengths"], reverse, clip or None, rung="reference"
    )
    total = y.sum() + sum(s.sum() for s in final)
    found = torch.autograd.grad(total, [inputs[k] for k in leaves], allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    return [v.detach() for v in (y, *final)], list(found)


def restrided(v: Tensor, how: str) -> Tensor:
    """The same values, laid out otherwise."""
    if how == "transposed":
        return v.mT.contiguous().mT if v.dim() > 1 else v
    if how == "strided":
        wide = v.new_full((*v.shape[:-1], 2 * v.shape[-1]), torch.nan)
        wide[..., ::2] = v
        return wide[..., ::2]
    if how == "offset":
        long = torch.cat([v.new_full((3,), torch.nan), v.flatten()])
        return long[3:].view(v.shape)
    if how == "negated":
        return torch.complex(torch.zeros_like(v), -v).conj().imag
    if how == "permuted":
        order = list(reversed(range(v.dim())))
        return v.permute(order).contiguous().permute(order)
    return v


LAYOUTS = ("as it is", "transposed", "strided", "offset", "negated", "permuted")


@settings(max_examples=120)
@given(data=st.data())
def test_any_strides_equal_the_reference(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    T, B, n_in, H = (data.draw(st.integers(1, n)) for n in (6, 9, 7, 20))
    P = data.draw(st.integers(0, H + 2)) if name == "lstm" else 0
    given = draw_layer(name, T, B, n_in, H, P, data.draw(st.booleans()))
    if data.draw(st.booleans()):
        drawn = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
        given["lengths"] = torch.tensor(sorted(drawn, reverse=True))
    if data.draw(st.booleans()):
        # Repeated without a copy: a stride of 0.
        given["x"] = given["x"][:, :1].expand(T, B, n_in)  # type: ignore[index]
        given["h0"] = given["h0"][:1].expand(B, -1)  # type: ignore[index]
    how: dict[str, Any] = {"reverse": data.draw(st.booleans()), "clip": data.draw(st.sampled_from([0.0, 0.7]))}
    expected, expected_gradients = reference(name, given, **how)

    def scatter(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        kinds = {k: data.draw(st.sampled_from(LAYOUTS)) for k in tensors}
        floating = {k: v is not None and v.is_floating_point() for k, v in tensors.items()}
        kinds = {
            k: kind if floating[k] or kind not in ("negated", "strided") else "as it is" for k, kind in kinds.items()
        }
        return {k: None if v is None or k == "lengths" else restrided(v, kinds[k]) for k, v in tensors.items()} | {
            "lengths": None if tensors["lengths"] is None else tensors["lengths"].repeat_interleave(2)[::2]
        }

    found = forward(name, scatter(given), **how)
    for a, b in zip(found[: len(expected)], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    gradients = backward(name, scatter(with_errors(name, given, **how)), **how)
    present = [g for g, k in zip(gradients, FORWARD[:-1], strict=True) if given[k] is not None]
    for a, b in zip(present, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def wrong(v: Tensor | None, kind: str) -> Tensor | None:
    """v, so that it no longer fits; v itself where this kind of fault does not apply."""
    if v is None:
        return None
    faults: dict[str, Callable[[Tensor], Tensor]] = {
        "short": lambda v: v.narrow(0, 0, v.shape[0] - 1),
        "narrow": lambda v: v.narrow(-1, 0, v.shape[-1] - 1),
        "long": lambda v: torch.cat([v, v]),
        "flat": lambda v: v.flatten() if v.dim() > 1 else v.unsqueeze(0),
        "scalar": lambda v: v.flatten()[0],
        "empty": lambda v: v[:0],
        "half": lambda v: v.to(torch.bfloat16),
        "other precision": lambda v: v.float() if v.dtype == torch.float64 else v.double(),
        "whole": lambda v: v.to(torch.int32),
        "complex": lambda v: v.to(torch.complex128),
        "sparse": lambda v: v.to_sparse(),
        "meta": lambda v: v.to("meta"),
    }
    return faults[kind](v)


FAULTS = ("short", "narrow", "long", "flat", "scalar", "empty", "half", "other precision", "whole", "complex", "sparse")


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("name", ["rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("kind", FAULTS)
def test_what_does_not_fit_is_refused_by_name(name: str, kind: str) -> None:
    given = draw_layer(name, 4, 3, 2, 16, P=5 if name == "lstm" else 0)
    given["lengths"] = torch.tensor([4, 2, 2])
    for operator, names in ((forward, FORWARD), (backward, BACKWARD)):
        whole = given if operator is forward else with_errors(name, given)
        for k in names:
            v = whole[k]
            # More steps than the lengths name are a layer, too.
            if v is None or v.numel() == 0 or (operator is forward and k == "x" and kind == "long"):
                continue
            with pytest.raises((ValueError, RuntimeError, NotImplementedError)) as error:
                operator(name, {**whole, k: wrong(v, kind)})
            # A wrong x or weight may show first in what is compared with it.
            related = names if k in ("x", "w_ih", "w_hh", "w_hr") else (k,)
            assert str(error.value).startswith(tuple(f"{r}: " for r in related)) or "Sparse" in str(error.value)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1, 2, 4]), r"lengths: expected 0 to 4, the longest first, got \[1, 2, 4\]"),
        (torch.tensor([5, 2, 1]), r"lengths: expected 0 to 4, the longest first, got \[5, 2, 1\]"),
        (torch.tensor([4, 2, -1]), r"lengths: expected 0 to 4, the longest first"),
        (torch.tensor([4, 2]), r"lengths: expected \(3,\), one per sample, got \(2,\)"),
        (torch.tensor([4, 2, 1], dtype=torch.int32), "lengths: expected int64 on the CPU, got torch.int32"),
        (torch.tensor([4.0, 2.0, 1.0]), "lengths: expected int64 on the CPU, got torch.float32"),
    ],
)
def test_lengths_are_checked(lengths: Tensor, message: str) -> None:
    given = draw_layer("lstm", 4, 3, 2, 5)
    with pytest.raises((ValueError, RuntimeError), match=message):
        forward("lstm", {**given, "lengths": lengths})
    with pytest.raises((ValueError, RuntimeError), match=message):
        backward("lstm", {**with_errors("lstm", given), "lengths": lengths})


@pytest.mark.parametrize("operator", [forward, backward])
def test_what_a_cell_needs_and_does_not_have(operator: Callable[..., Any]) -> None:
    lstm, gru = draw_layer("lstm", 4, 3, 2, 5), draw_layer("gru", 4, 3, 2, 5)
    if operator is backward:
        lstm, gru = with_errors("lstm", lstm), with_errors("gru", gru)
    with pytest.raises(ValueError, match=r"c0: expected \(3, 5\) for a lstm, got None"):
        operator("lstm", {**lstm, "c0": None})
    with pytest.raises(ValueError, match="c0: expected None, a gru has no such argument"):
        operator("gru", {**gru, "c0": lstm["c0"]})
    with pytest.raises(ValueError, match="w_hr: expected None, a gru has no such argument"):
        operator("gru", {**gru, "w_hr": torch.zeros(5, 5, dtype=torch.float64)})
    for cell in (-1, 5):
        with pytest.raises(ValueError, match=rf"cell: expected 0 to 4 .*, got {cell}"):
            operator("gru", gru, cell=cell)
    for clip in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"clip: expected a finite norm, or 0 for none, got {clip}"):
            operator("gru", gru, clip=clip)


def test_gates_are_measured_only_where_they_are_kept() -> None:
    given = draw_layer("lstm", 4, 3, 2, 5)
    with pytest.raises(ValueError, match="save: expected True"):
        forward("lstm", given, save=False, closed=0.05)
    with pytest.raises(ValueError, match="closed: expected a share from 0 to 1, got nan"):
        forward("lstm", given, closed=float("nan"))


def test_what_forward_did_not_keep_is_missed() -> None:
    given = draw_layer("lstm", 4, 3, 2, 5)
    whole = with_errors("lstm", given)
    for name in ("gates", "cells"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            backward("lstm", {**whole, name: torch.empty(0, dtype=torch.float64)})


@pytest.mark.parametrize("name", ["rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("ragged", [False, True])
def test_both_operators_pass_torchs_own_checks(name: str, ragged: bool) -> None:
    given = draw_layer(name, 3, 2, 2, 3)
    given["lengths"] = torch.tensor([3, 1]) if ragged else None
    # Statistics of steps without input are NaN, which opcheck takes for a difference.
    number, closed = native.NUMBER[name], 0.0 if ragged else 0.05
    torch.library.opcheck(operators.forward_operator, (*(given[k] for k in FORWARD), number, True, 0.5, True, closed))
    whole = with_errors(name, given, reverse=True)
    torch.library.opcheck(operators.backward_operator, (*(whole[k] for k in BACKWARD), number, True, 0.5, True))


def test_vmap_over_an_operator_runs_it_for_each() -> None:
    given = draw_layer("gru", 4, 3, 2, 5)
    many = torch.randn(4, 3, 2, 6, dtype=torch.float64)
    rest = [given[k] for k in FORWARD[1:]]

    def y(x: Tensor) -> Tensor:
        return torch.ops.unvanish.forward(x, *rest, native.NUMBER["gru"], False, 0.0, False, 0.0)[0]

    expected = torch.stack([y(x) for x in many.unbind(-1)])
    torch.testing.assert_close(torch.vmap(y, in_dims=-1)(many), expected)


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


def test_kernels_take_their_arrays_by_name() -> None:
    call = native._native.forward_float32
    with pytest.raises(TypeError, match="reverse: missing"):
        call(None, 1)
    numbers = dict.fromkeys(("cell", "T", "B", "I", "H", "R", "lengths", *FORWARD, "y", "gates", "cells", "h", "c"), 0)
    complete = {**numbers, "reverse": False, "closed": 0.0, "mean": 0, "saturated": 0, "log_carry": 0}
    with pytest.raises(TypeError, match="an argument that the kernels do not know"):
        call(None, 1, **complete, weights=0)
    with pytest.raises(TypeError, match="T: wrong type"):
        call(None, 1, **{**complete, "T": "4"})


def test_every_use_of_torchs_internals_stands_in_one_file() -> None:
    from pathlib import Path

    folder = Path(torch_internals.__file__).parent
    private = (
        "torch._C",
        "torch._dynamo",
        "torch._functorch",
        "_functorch",
        "forward_ad._",
        "torch._guards",
        "torch._subclasses",
        "torch._decomp",
        "_cdata",
        "_DropoutNd",
    )
    found = {
        f"{file.name}: {word}"
        for file in folder.rglob("*.py")
        if file.name != "torch_internals.py"
        for word in private
        if word in file.read_text()
    }
    assert found == set()
    assert torch_internals.odd_one((torch.zeros(1), None)) is None
