"""Checks of a call before it runs: the kernels read raw memory and take shape, dtype and device for granted."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unvanish import torch_internals
from unvanish.cells import Cell, State, Weights


def check_layer(cell: Cell, x: Tensor, state: State, w: Weights) -> None:
    """Check that x `[T, B, I]`, the initial state and the weights fit each other.

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
    (_, B, I), GH, G, Q = x.shape, w.w_ih.shape[0], len(cell.input_gates), len(cell.sources)
    H = GH // G
    if GH != G * H:
        raise ValueError(f"w_ih: expected [G·H, I] with G = {G} gates of a {cell.name}, got {tuple(w.w_ih.shape)}")
    if (w.w_hh is None) != (Q == 0):
        expected = f"[{Q}·H, H]" if Q else "None, as it has no recurrent matrix"
        raise ValueError(
            f"w_hh: a {cell.name} expects {expected}, got {None if w.w_hh is None else tuple(w.w_hh.shape)}"
        )
    if (w.v is None) != (not cell.vectors):
        expected = f"its vectors {', '.join(cell.vectors)}, [{len(cell.vectors)}, H]" if cell.vectors else "None"
        raise ValueError(f"v: a {cell.name} expects {expected}, got {None if w.v is None else tuple(w.v.shape)}")
    if w.w_hr is not None and cell.remembers == cell.states[0]:
        raise ValueError(f"w_hr: expected None, a {cell.name} has no projection, got {tuple(w.w_hr.shape)}")
    R = H if w.w_hr is None else w.w_hr.shape[0]
    states = zip((f"{s}_0" for s in cell.states), state, ((B, R), *((B, H),) * (len(state) - 1)), strict=True)
    shapes = ((GH, I), (Q * H, R), (GH,), (Q * H,), (R, H), (len(cell.vectors), H))
    dtype, device = x.dtype, x.device
    for name, v, shape in (*zip(w._fields, w, shapes, strict=True), *states):
        if v is not None and (v.shape != shape or v.dtype != dtype or v.device != device):
            _check_like(name, v, shape, x)


def check_errors(x: Tensor, y: Tensor, final: State, dy: Tensor | None, dfinal: tuple[Tensor | None, ...]) -> None:
    """Check that dy and dfinal fit the outputs y and final of a layer that read x.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: a dtype or device is not that of x.
    """
    names = ("dy", "dh", *(("dc",) if len(final) == 2 else (f"d(state {i})" for i in range(1, len(final)))))
    for name, d, out in zip(names, (dy, *dfinal), (y, *final), strict=True):
        if d is not None:
            _check_like(name, d, tuple(out.shape), x)


def check_probes(probes: Tensor | None, x: Tensor, w: Weights, columns: int) -> None:
    """Check that `probes` is `[G·H, columns]`, with a row for each of W_ih.

    Raises:
        ValueError: the shape does not fit, or it is not contiguous.
        RuntimeError: a dtype or device is not that of x.
    """
    if probes is None:
        return
    _check_like("probes", probes, (len(w.w_ih), columns), x)
    if not probes.is_contiguous():
        raise ValueError("probes: expected contiguous memory; call .contiguous()")


def check_cut(cut: Tensor | None, x: Tensor) -> None:
    """Check that `cut` has one flag for each step of x `[T, B, I]`.

    Raises:
        ValueError: it is not a bool tensor `[T]` on the CPU, or differs from sample to sample of a vmap.
    """
    if cut is None:
        return
    if torch_internals.batched(cut):
        raise ValueError(
            "cut: expected the same steps for all samples of a vmap, got other ones for each; h_detach draws them once "
            "with vmap(…, randomness='same')"
        )
    if cut.dtype != torch.bool or cut.shape != x.shape[:1] or cut.device.type != "cpu":
        found = f"{tuple(cut.shape)} of {cut.dtype} on {cut.device}"
        raise ValueError(f"cut: expected {(x.shape[0],)} of torch.bool on the CPU, got {found}")


def whole_lengths(lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
    """The lengths as `[B]` int64, on the device of x `[T, B, I]`.

    Raises:
        ValueError: they are not one whole number from 0 to T per sample.
    """
    given, (T, B) = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu"), x.shape[:2]
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
