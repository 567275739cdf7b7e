"""What the tests of test_operators*.py share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import CELLS, Weights
from unvanish.engine import native

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=f"native rung: {native.MISSING}")

FORWARD = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "lengths", "cut")
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
        "cut": None,
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
    leaves = [k for k in FORWARD[:-2] if inputs[k] is not None]
    for k in leaves:
        inputs[k].requires_grad_()  # type: ignore[union-attr]
    state: Any = tuple(inputs[k] for k in ("h0", "c0") if inputs[k] is not None)
    x: Any = inputs["x"]
    how = {"rung": "reference", "cut": inputs["cut"]}
    y, final = engine.run(CELLS[name], x, state, weights_of(inputs), inputs["lengths"], reverse, clip or None, **how)
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
