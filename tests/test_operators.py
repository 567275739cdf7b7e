"""The registered operators, called as a graph or another program would: right for any strides, an error for anything
that does not fit, and no tensor without plain memory ever reaches a kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.operator_calls import (
    BACKWARD,
    FORWARD,
    NAMES,
    backward,
    draw_layer,
    forward,
    reference,
    restrided,
    with_errors,
)
from unvanish import torch_internals
from unvanish.engine import native, operators

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=f"native rung: {native.MISSING}")


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
        given["cut"] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)))
    if data.draw(st.booleans()):
        # Repeated without a copy: a stride of 0.
        given["x"] = given["x"][:, :1].expand(T, B, n_in)  # type: ignore[index]
        given["h0"] = given["h0"][:1].expand(B, -1)  # type: ignore[index]
    how: dict[str, Any] = {"reverse": data.draw(st.booleans()), "clip": data.draw(st.sampled_from([0.0, 0.7]))}
    expected, expected_gradients = reference(name, given, **how)

    def scatter(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        kinds = {k: data.draw(st.sampled_from(LAYOUTS)) for k in tensors}
        return {
            k: v if v is None else restrided(v, kinds[k]) if v.is_floating_point() else v.repeat_interleave(2)[::2]
            for k, v in tensors.items()
        }

    found = forward(name, scatter(given), **how)
    for a, b in zip(found[: len(expected)], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    gradients = backward(name, scatter(with_errors(name, given, **how)), **how)
    present = [g for g, k in zip(gradients, FORWARD[:-2], strict=True) if given[k] is not None]
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
    given["lengths"], given["cut"] = torch.tensor([4, 2, 2]), torch.tensor([True, False, True, True])
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
    given["cut"] = torch.tensor([False, True, True]) if ragged else None
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


def test_kernels_take_their_arrays_by_name() -> None:
    call = native._native.forward_float32
    with pytest.raises(TypeError, match="reverse: missing"):
        call(None, 1)
    arrays = ("lengths", *FORWARD, "y", "y_again", "gates", "cells", "h", "c")
    numbers = dict.fromkeys(("cell", "T", "B", "I", "H", "R", *arrays), 0)
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
