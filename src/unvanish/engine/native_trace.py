"""The native rung with every state, gate and δ kept, as `unvanish.engine.manual` keeps them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unvanish.cells import Cell, State, Weights
from unvanish.engine import manual, native
from unvanish.engine.sequence import Sorted, active_steps, sort, states_before, without_padding


class _Kept(NamedTuple):
    """A forward pass as the kernels left it."""

    given: Sorted
    y: Tensor
    gates: Tensor
    cells: Tensor


@torch.no_grad()
def trace(
    cell: Cell, x: Tensor, state: State, w: Weights, lengths: Tensor | None = None, reverse: bool = False
) -> manual.Trace:
    """As `unvanish.engine.manual.trace`, outside any graph."""
    given = sort(x, state, lengths)
    inputs: Any = native.prepared(given, w)
    how: Any = {"cell": native.NUMBER[cell.name], "reverse": reverse, "clip": 0.0}
    y, h, c, gates, cells, *_ = native.forward(*inputs, **how, save=True, closed=0.0)
    T, B, H = *x.shape[:2], w.w_ih.shape[0] // len(cell.gates)
    kept = native.layout(cell, H, x.dtype)
    active = active_steps(lengths, T, x.device)

    def values(steps: slice) -> Tensor:
        if len(cell.gates) == 1:
            found = y[steps].unsqueeze(2)
        else:
            some = torch.cat([block[steps] for block in _blocks(gates, T, B)], dim=1)
            panels = some.view(*some.shape[:2], kept.padded // kept.lanes, -1, kept.lanes)
            found = panels.transpose(2, 3).reshape(*some.shape[:2], -1, kept.padded)[..., :H]
        found = found if given.back is None else found.index_select(1, given.back)
        return found if active is None else torch.where(active[steps].unsqueeze(-1), found, 0.0)

    states = [y, *([_by_step(cells, T, B)[..., :H]] if len(cell.states) > 1 else [])]
    final = (h, c)[: len(cell.states)]
    if given.back is not None:
        states = [s.index_select(1, given.back) for s in states]
        final = tuple(s.index_select(0, given.back) for s in final)
    if active is not None:
        # The kernels write nothing there, and the uninitialised memory may hold a NaN.
        states = [torch.where(active, s, 0.0) for s in states]
    before = tuple(states_before(s, s0, lengths, reverse) for s, s0 in zip(states, state, strict=True))
    left = _Kept(given, y, gates, cells)
    x = without_padding(x, active)
    return manual.Trace(cell, w, x, before, tuple(states), final, active, reverse, kept=values, native=left)


@torch.no_grad()
def adjoint_of_steps(tr: manual.Trace, steps: slice, dafter: State) -> tuple[State, State]:
    """(δs_t at these steps `[n, B, ·]`, ∂E/∂(state before the first read of them)), from dafter = ∂E/∂(state after the
    last read of them), for a trace of this rung without lengths:

        δs_t = (∂s_{t+1}/∂s_t)ᵀ δs_{t+1},  no error being made on the way
    """
    kept, (T, B) = tr.native, tr.x.shape[:2]
    first_read = steps.stop - 1 if tr.reverse else steps.start
    h0, c0 = (*(s[first_read].contiguous() for s in tr.before), None)[:2]
    dh, dc = (*(d.contiguous() for d in dafter), None)[:2]
    gates, cells = (
        torch.cat([block[steps].flatten() for block in _blocks(v, T, B)]) if v.numel() else v
        for v in (kept.gates, kept.cells)
    )
    _, _, _, *rest = native.prepared(kept.given, tr.weights)
    saved: Any = (tr.x[steps].contiguous(), h0, c0, *rest, kept.y[steps].contiguous(), gates, cells)
    how: Any = {"cell": native.NUMBER[tr.cell.name], "reverse": tr.reverse, "clip": 0.0}
    out = native.backward(None, dh, dc, *saved, **how, want_dx=False, want_delta=True, want_norms=False)
    n = len(dafter)
    return tuple(out[8 : 8 + n]), tuple(out[1 : 1 + n])


@torch.no_grad()
def propagate(
    tr: manual.Trace,
    steps: slice,
    matrices: Tensor,
    scale: Tensor | None,
    made: Tensor | None,
    carried: Tensor | None,
    sources: Tensor,
    rows: Tensor,
    exponents: Tensor,
    log_norms: Tensor,
    state: int,
) -> None:
    """Many errors taken back over these steps, each alone; rows and exponents, and ln‖δs_t‖ of one state at the steps
    that they reach, are written in place:

        δc += made_t ⊙ δh,    δh ← [δh ⊙ scale_t, δc] M_t,    δc ← δc ⊙ carried_t,

    for the rows with sources[k] ≥ t (≤ t where the layer reads backwards), without c for a layer of one state.

    Shapes: matrices `[n, B, S·H, H]` of n steps and S states, or `[S·H, H]` for all; scale, made, carried `[n, B, H]`;
    sources `[K]` int64, increasing; rows `[B, K, S·H]` times 2^exponents, `[B, K]` float64; log_norms `[T, B, K]`
    float64. All contiguous.
    """
    B, K, _ = rows.shape
    native.call(
        "propagate",
        rows.dtype,
        native.forced_isa(),
        torch.get_num_threads(),
        reverse=tr.reverse,
        first=steps.start,
        steps=steps.stop - steps.start,
        B=B,
        K=K,
        H=matrices.shape[-1],
        states=len(tr.final),
        measured=state,
        sources=sources.data_ptr(),
        matrices=matrices.data_ptr(),
        shared=matrices.dim() == 2,
        scale=native.address(scale),
        made=native.address(made),
        carried=native.address(carried),
        rows=rows.data_ptr(),
        exponents=exponents.data_ptr(),
        log_norms=log_norms.data_ptr(),
    )


def _blocks(kept: Tensor, T: int, B: int) -> list[Tensor]:
    """`[T, samples, ·]` of what the kernels keep, block by block of samples."""
    rows, width = native.block_rows(B), kept.numel() // (T * B)
    parts = kept.split(T * rows * width)
    return [part.view(T, min(rows, B - rows * k), width) for k, part in enumerate(parts)]


def _by_step(kept: Tensor, T: int, B: int) -> Tensor:
    """`[T, B, ·]` of what the kernels keep block by block of samples."""
    return torch.cat(_blocks(kept, T, B), dim=1)


@torch.no_grad()
def adjoint(
    tr: manual.Trace,
    dy: Tensor | None,
    dfinal: tuple[Tensor | None, ...],
    clip: float | None = None,
    cut: Tensor | None = None,
) -> manual.Deltas:
    """As `unvanish.engine.manual.adjoint`, for a trace of this rung; also returns the weights' gradients."""
    (_, dh0, dc0, *grads), delta = _back(tr, dy, dfinal, clip, cut, want_delta=True)
    given = tr.native.given
    if given.back is not None:
        delta = [d.index_select(1, given.back) if d.numel() else d for d in delta]
        dh0, dc0 = (d.index_select(0, given.back) if d.numel() else d for d in (dh0, dc0))
    n = len(tr.cell.states)
    weights = _present(tr, grads)
    da_hh = delta[3] if delta[3].numel() else delta[2]
    return manual.Deltas((delta[0], delta[1])[:n], delta[2], da_hh, (dh0, dc0)[:n], weights)


@torch.no_grad()
def gradients_of_weights(
    tr: manual.Trace, dy: Tensor | None, dfinal: tuple[Tensor | None, ...], clip: float | None
) -> Weights:
    """∂E/∂W of every weight present, without δ, which takes more memory than all the rest."""
    (_, _, _, *grads), _ = _back(tr, dy, dfinal, clip, None, want_delta=False)
    return _present(tr, grads)


def _back(
    tr: manual.Trace,
    dy: Tensor | None,
    dfinal: tuple[Tensor | None, ...],
    clip: float | None,
    cut: Tensor | None,
    want_delta: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """(dx, dh_0, dc_0 and the weights' gradients, δ) as the kernels return them."""
    assert tr.native is not None
    given, y, gates, cells = tr.native
    order = None if given.back is None else torch.argsort(given.back)

    def arrange(v: Tensor | None, dim: int) -> Tensor | None:
        return native.arrived(v if v is None or order is None else v.index_select(dim, order))

    dh, dc = (*(arrange(d, 0) for d in dfinal), None)[:2]
    saved: Any = (*native.prepared(given, tr.weights, cut), y, gates, cells)
    how: Any = {"cell": native.NUMBER[tr.cell.name], "reverse": tr.reverse, "clip": clip or 0.0}
    out = native.backward(arrange(dy, 1), dh, dc, *saved, **how, want_dx=False, want_delta=want_delta, want_norms=False)
    return list(out[:8]), list(out[8:])


def _present(tr: manual.Trace, grads: list[Tensor]) -> Weights:
    return Weights(*(None if w is None else g for w, g in zip(tr.weights[:5], grads, strict=True)))  # type: ignore[arg-type]
