"""The manual rung: the hand-written adjoint of every cell, in torch operations. Any device; real floating dtypes.

forward   p = W_ih x + b_ih for all steps at once, then saved_t, s_t = cell.step(p_t, s_{t-1})
backward  δh_t = ∂E_t/∂h_t + (what step t+1 hands back),  the cell's adjoint gives δa_t
weights   ∂E/∂W_ih = Σ_t δa_tᵀ x_t,  ∂E/∂W_hh = Σ_t δa_hh_tᵀ h_{t-1}: one matrix product over all steps
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unvanish.cells import LSTM, Cell, State, Weights
from unvanish.engine import reference
from unvanish.engine.sequence import active_steps, clip_rows, steps, without_padding


@dataclass(frozen=True)
class Trace:
    """One layer and direction run forward, with everything its adjoint needs."""

    cell: Cell
    weights: Weights
    x: Tensor
    """[T, B, I], 0 at inactive steps"""
    y: Tensor
    """[T, B, R], 0 at inactive steps"""
    final: State
    saved: Any
    """the cell's `Saved`, stacked over time: `[T, B, ...]`"""
    active: Tensor | None
    """[T, B, 1], or None when all samples have T steps"""
    reverse: bool
    kept: Any = None
    """what the native rung needs to go back; None when the manual rung ran"""


@dataclass(frozen=True)
class Flow:
    """δ at every step of a trace; 0 where a sample is inactive."""

    dstate: State
    """(δh [T, B, R],) or (δh, δc [T, B, H])"""
    da: Tensor
    """[T, B, G·H]"""
    da_hh: Tensor
    """[T, B, G·H]"""
    dinitial: State
    """with respect to the initial state"""
    weights: Weights | None = None
    """Σ_t g_t, where the rung that ran has it at hand"""


def trace(
    cell: Cell, x: Tensor, state: State, w: Weights, lengths: Tensor | None = None, reverse: bool = False
) -> Trace:
    """Run forward and keep every state and gate."""
    T = x.shape[0]
    active = active_steps(lengths, T, x.device)
    x = without_padding(x, active)
    projected = cell.project(x, w)
    y: list[Tensor] = [state[0]] * T
    saved: list[Any] = [None] * T
    for t in steps(T, reverse):
        previous = state
        state, saved[t] = cell.step(projected[t], previous, w)
        y[t] = state[0]
        if active is not None:
            y[t] = torch.where(active[t], state[0], 0.0)
            state = tuple(torch.where(active[t], new, old) for new, old in zip(state, previous, strict=True))
    stacked = type(saved[0])(*(torch.stack(field) for field in zip(*saved, strict=True)))
    return Trace(cell, w, x, torch.stack(y), state, stacked, active, reverse)


def adjoint(tr: Trace, dy: Tensor | None, dfinal: tuple[Tensor | None, ...], clip: float | None = None) -> Flow:
    """Backpropagation through time, from dy `[T, B, R]` = ∂E_t/∂h_t and dfinal = ∂E/∂(final state); None is zero."""
    T = tr.x.shape[0]
    later = tuple(torch.zeros_like(s) if d is None else d for s, d in zip(tr.final, dfinal, strict=True))
    dstate: list[State] = [()] * T
    da: list[Tensor] = [tr.x] * T
    da_hh: list[Tensor] = [tr.x] * T
    for t in steps(T, not tr.reverse):
        d = later if dy is None else (later[0] + dy[t], *later[1:])
        step = tr.cell.adjoint(d, type(tr.saved)(*(field[t] for field in tr.saved)), tr.weights)
        dstate[t], da[t], da_hh[t], back = step
        if clip is not None:
            back = tuple(clip_rows(b, clip) for b in back)
        if tr.active is None:
            later = back
        else:
            on = tr.active[t]
            dstate[t] = tuple(torch.where(on, s, 0.0) for s in dstate[t])
            da[t], da_hh[t] = torch.where(on, da[t], 0.0), torch.where(on, da_hh[t], 0.0)
            later = tuple(torch.where(on, new, old) for new, old in zip(back, later, strict=True))
    stacked = tuple(torch.stack(s) for s in zip(*dstate, strict=True))
    return Flow(stacked, torch.stack(da), torch.stack(da_hh), later)


def weight_gradients(tr: Trace, flow: Flow) -> Weights:
    """∂E/∂W = Σ_t g_t for every weight present."""
    if flow.weights is not None:
        return flow.weights
    w = tr.weights
    da, da_hh = flow.da.flatten(0, 1), flow.da_hh.flatten(0, 1)
    dw_hr = None
    if w.w_hr is not None:
        assert isinstance(tr.cell, LSTM)
        dw_hr = flow.dstate[0].flatten(0, 1).mT @ tr.cell.output(tr.saved).flatten(0, 1)
    return Weights(
        da.mT @ tr.x.flatten(0, 1),
        da_hh.mT @ tr.saved.h_prev.flatten(0, 1),
        None if w.b_ih is None else da.sum(0),
        None if w.b_hh is None else da_hh.sum(0),
        dw_hr,
    )


class _Manual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Cell, lengths: Tensor | None, reverse: bool, clip: float | None, *inputs: Any) -> Any:
        x, *rest = inputs
        state, w = tuple(rest[: len(cell.states)]), Weights(*rest[len(cell.states) :])
        tr = trace(cell, x, state, w, lengths, reverse)
        ctx.save_for_backward(*inputs, lengths, tr.active, *tr.saved)
        ctx.cell, ctx.reverse, ctx.clip, ctx.saved_type = cell, reverse, clip, type(tr.saved)
        ctx.set_materialize_grads(False)
        return (tr.y, *tr.final)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy, *dfinal = grads
        cell, n = ctx.cell, len(ctx.cell.states)
        kept = ctx.saved_tensors
        x, state, w = kept[0], kept[1 : 1 + n], Weights(*kept[1 + n : 6 + n])
        lengths, active, *saved = kept[6 + n :]
        if torch.is_grad_enabled():
            found = reference.gradients(cell, x, state, w, lengths, ctx.reverse, ctx.clip, dy, tuple(dfinal))
            return None, None, None, None, *found
        final = tuple(torch.empty_like(s) for s in state)
        tr = Trace(cell, w, without_padding(x, active), x, final, ctx.saved_type(*saved), active, ctx.reverse)
        flow = adjoint(tr, dy, tuple(dfinal), ctx.clip)
        dx = flow.da @ w.w_ih if ctx.needs_input_grad[4] else None
        return None, None, None, None, dx, *flow.dinitial, *weight_gradients(tr, flow)


def run(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None = None,
    reverse: bool = False,
    clip: float | None = None,
) -> tuple[Tensor, State]:
    """(y, final state) for x `[T, B, I]`; see `unvanish.engine.run`."""
    y, *final = _Manual.apply(cell, lengths, reverse, clip, x, *state, *w)
    return y, tuple(final)
