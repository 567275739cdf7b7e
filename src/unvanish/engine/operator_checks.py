"""Checks of the operators' arguments before a kernel reads memory at an address."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unvanish.engine import native

_Shape = tuple[int, ...] | None


class LayerTensors(NamedTuple):
    """The arguments that describe a layer to both operators, in order; shapes as in `unvanish.engine.native`."""

    x: Tensor
    h0: Tensor
    c0: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    lengths: Tensor | None
    cut: Tensor | None


SCHEMA = ", ".join(f"Tensor{'' if kind is Tensor else '?'} {v}" for v, kind in LayerTensors.__annotations__.items())
"""their declaration"""


def check_forward(layer: LayerTensors, *, cell: int, clip: float, save: bool, closed: float) -> None:
    """Check that the arguments of `unvanish::forward` fit each other; strides are free.

    Raises:
        ValueError: a shape or value does not fit, or an argument is missing or superfluous.
        RuntimeError: a dtype, device or layout does not fit.
    """
    _check_layer(layer, cell, clip)
    if not 0 <= closed <= 1:
        raise ValueError(f"closed: expected a share from 0 to 1, got {closed}")
    if closed and not save:
        raise ValueError("save: expected True where the gates are measured (closed > 0), got False")


def check_backward(
    errors: Sequence[Tensor | None], layer: LayerTensors, kept: Sequence[Tensor], *, cell: int, clip: float
) -> None:
    """Check that the arguments of `unvanish::backward` fit each other and what forward returned; strides are free.

    Args:
        errors: dy, dh, dc.
        layer: what forward was given.
        kept: y, gates, cells of forward.
        cell, clip: as forward's.

    Raises:
        ValueError: a shape or value does not fit, or an argument is missing or superfluous.
        RuntimeError: a dtype, device or layout does not fit.
    """
    T, B, H, R = _check_layer(layer, cell, clip)
    x, mathematics = layer.x, native.cell_of(cell)
    widths = native.layout(mathematics, H, x.dtype)
    has_c = len(mathematics.states) > 1
    gates = T * B * widths.saved if native.keeps_gates(mathematics, H, widths) else 0
    # A cell without c returns an empty one, and compiled graphs hand back zeros of that shape.
    arriving = (T, B, R), (B, R), (B, H) if has_c else (0,)
    for name, v, shape in zip(("dy", "dh", "dc"), errors, arriving, strict=True):
        if v is not None:
            _check(name, v, shape, x)
    returned = (T, B, R), (gates,), (T * B * widths.padded if has_c else 0,)
    for name, v, shape in zip(("y", "gates", "cells"), kept, returned, strict=True):
        _check(name, v, shape, x)


def _check_layer(given: LayerTensors, cell: int, clip: float) -> tuple[int, int, int, int]:
    """T, B, H, R of a layer whose arguments fit each other."""
    x, _, _, w_ih, w_hh, _, _, w_hr, lengths, cut = given
    names = tuple(native.NUMBER)
    if not 0 <= cell < len(names):
        raise ValueError(f"cell: expected 0 to {len(names) - 1} ({', '.join(names)}), got {cell}")
    for name, v, form in (("x", x, "[T, B, I]"), ("w_ih", w_ih, "[G·H, I]"), ("w_hh", w_hh, "[G·H, R]")):
        if v.dim() != form.count(",") + 1 or v.numel() == 0:
            raise ValueError(f"{name}: expected {form}, not empty, got {tuple(v.shape)}")
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"x: expected float32 or float64 on the CPU, got {x.dtype} on {x.device}")
    layer = native.cell_of(cell)
    T, B, n_in, H, R = native.sizes(x, w_ih, w_hh, cell)
    G, has_c = len(layer.gates), len(layer.states) > 1
    projected = has_c and w_hr is not None
    if not projected:
        R = H
    expected: dict[str, _Shape] = {
        "x": (T, B, n_in),
        "w_ih": (G * H, n_in),
        "w_hh": (G * H, R),
        "h0": (B, R),
        "c0": (B, H) if has_c else None,
        "b_ih": (G * H,),
        "b_hh": (G * H,),
        "w_hr": (R, H) if projected else None,
    }
    for name, shape in expected.items():
        v = getattr(given, name)
        if v is not None:
            _check(name, v, shape, x, layer.name)
        elif name == "c0" and has_c:
            raise ValueError(f"{name}: expected {shape} for a {layer.name}, got None")
    if not (clip >= 0 and math.isfinite(clip)):
        raise ValueError(f"clip: expected a finite norm, or 0 for none, got {clip}")
    if lengths is not None:
        _check_lengths(lengths, T, B)
    if cut is not None:
        _check_cut(cut, T)
    return T, B, H, R


def _check(name: str, v: Tensor, shape: _Shape, x: Tensor, cell: str = "layer") -> None:
    if v.shape != shape:
        expected = f"None, a {cell} has no such argument" if shape is None else str(shape)
        raise ValueError(f"{name}: expected {expected}, got {tuple(v.shape)}")
    if v.dtype != x.dtype or v.device != x.device or v.layout is not torch.strided:
        found = f"{v.dtype} on {v.device}" + ("" if v.layout is torch.strided else f", {v.layout}")
        raise RuntimeError(f"{name}: expected {x.dtype} on {x.device}, as x, dense, got {found}")


def _check_lengths(lengths: Tensor, T: int, B: int) -> None:
    if lengths.dtype != torch.int64 or lengths.device.type != "cpu" or lengths.layout is not torch.strided:
        raise RuntimeError(f"lengths: expected int64 on the CPU, got {lengths.dtype} on {lengths.device}")
    if lengths.shape != (B,):
        raise ValueError(f"lengths: expected ({B},), one per sample, got {tuple(lengths.shape)}")
    if int(lengths.max()) > T or int(lengths.min()) < 0 or bool((lengths[1:] > lengths[:-1]).any()):
        raise ValueError(f"lengths: expected 0 to {T}, the longest first, got {lengths.tolist()}")


def _check_cut(cut: Tensor, T: int) -> None:
    if cut.dtype != torch.bool or cut.device.type != "cpu" or cut.layout is not torch.strided:
        raise RuntimeError(f"cut: expected bool on the CPU, got {cut.dtype} on {cut.device}")
    if cut.shape != (T,):
        raise ValueError(f"cut: expected ({T},), one per step, got {tuple(cut.shape)}")
