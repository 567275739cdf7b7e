"""What a call must be before it runs: the kernels read raw memory, so nothing may differ from what they take it for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unvanish.cells import Cell, State, Weights


def check_layer(cell: Cell, x: Tensor, state: State, w: Weights) -> None:
    """x `[T, B, I]`, the initial state and the weights fit each other.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: a dtype or device is not that of x.
    """
    if x.dim() != 3 or x.shape[0] == 0:
        raise ValueError(f"x: expected [T, B, I] with T ≥ 1, got {tuple(x.shape)}")
    if x.shape[-1] != w.w_ih.shape[-1]:
        raise ValueError(f"x: expected {w.w_ih.shape[-1]} features (w_ih is {tuple(w.w_ih.shape)}), got {x.shape[-1]}")
    if len(state) != len(cell.states):
        raise ValueError(f"state: expected {', '.join(cell.states)}, got {len(state)} tensors")
    (_, B, I), GH, R = x.shape, w.w_ih.shape[0], w.w_hh.shape[1]
    H, G = GH // len(cell.gates), len(cell.gates)
    if GH != G * H:
        raise ValueError(f"w_ih: expected [G·H, I] with G = {G} gates of a {cell.name}, got {tuple(w.w_ih.shape)}")
    if w.w_hr is not None and cell.name != "lstm":
        raise ValueError(f"w_hr: expected None, a {cell.name} has no projection, got {tuple(w.w_hr.shape)}")
    if w.w_hr is None and R != H:
        raise ValueError(f"w_hh: expected {(GH, H)}, as there is no w_hr, got {tuple(w.w_hh.shape)}")
    states = zip(("h_0", "c_0"), state, ((B, R), (B, H)), strict=False)
    weights = zip(w._fields, w, ((GH, I), (GH, R), (GH,), (GH,), (R, H)), strict=True)
    for name, v, shape in (*states, *weights):
        if v is not None:
            _check_like(name, v, shape, x)


def check_errors(x: Tensor, y: Tensor, final: State, dy: Tensor | None, dfinal: tuple[Tensor | None, ...]) -> None:
    """dy and dfinal fit the outputs y and final of a layer that read x.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: a dtype or device is not that of x.
    """
    for name, d, out in zip(("dy", "dh", "dc"), (dy, *dfinal), (y, *final), strict=False):
        if d is not None:
            _check_like(name, d, tuple(out.shape), x)


def whole_lengths(lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
    """`[B]` int64, on the device of x `[T, B, I]`.

    Raises:
        ValueError: they are not one whole number from 0 to T per sample.
    """
    given, (T, B) = torch.as_tensor(lengths), x.shape[:2]
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or given.shape != (B,):
        found = f"{tuple(given.shape)} of {given.dtype}"
        raise ValueError(f"lengths: expected {B} whole numbers, one per sample, got {found}")
    given = given.to(torch.int64)  # unsigned types have no comparisons
    if B and not bool(((given >= 0) & (given <= T)).all()):
        raise ValueError(f"lengths: expected 0 to {T}, the steps of the input, got {given.tolist()}")
    return given.to(x.device)


def _check_like(name: str, v: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if v.shape != shape:
        raise ValueError(f"{name}: expected {shape}, got {tuple(v.shape)}")
    if v.dtype != x.dtype or v.device != x.device:
        here, there = f"{x.dtype} on {x.device}", f"{v.dtype} on {v.device}"
        raise RuntimeError(f"{name}: expected {here}, as the input, got {there}; convert one of them")
