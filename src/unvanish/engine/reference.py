"""The reference rung: a loop of cell steps, differentiated by autograd. Any dtype, any device, any order of
derivative."""

from typing import Any

import torch
from torch import Tensor

from unvanish.cells import Cell, State, Weights
from unvanish.engine.sequence import active_steps, clip_rows, cut_steps, steps, vjp, without_padding


class _ClipError(torch.autograd.Function):
    """The identity, whose backward clips the gradient per sample."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return clip_rows(grads[0], ctx.limit), None


def run(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None = None,
    reverse: bool = False,
    clip: float | None = None,
    cut: Tensor | None = None,
) -> tuple[Tensor, State]:
    """(y, final state) for x `[T, B, I]`; see `unvanish.engine.run`."""
    T = x.shape[0]
    active = active_steps(lengths, T, x.device)
    # unbind instead of indexing each step: the gradient of an indexed step is as long as the sequence.
    projected = cell.project(without_padding(x, active), w).unbind(0)
    y: list[Tensor] = [state[0]] * T
    cuts = cut_steps(cut, T)
    for t in steps(T, reverse):
        previous = state
        read = previous if clip is None else tuple(_ClipError.apply(s, clip) for s in previous)
        state = cell.advance(projected[t], read, w, cuts[t])
        y[t] = state[0]
        if active is not None:
            y[t] = torch.where(active[t], state[0], 0.0)
            state = tuple(torch.where(active[t], new, old) for new, old in zip(state, previous, strict=True))
    return torch.stack(y), state


def gradients(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None,
    reverse: bool,
    clip: float | None,
    dy: Tensor | None,
    dfinal: tuple[Tensor | None, ...],
    cut: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients with respect to (x, *state, *w), None where nothing flows: the double backward of the
    other rungs."""
    n = len(state)
    with torch.enable_grad():
        # Views: a state computed from the same weights must not lead back to them, a path outside this call.
        inputs = [None if v is None else v.view_as(v) for v in (x, *state, *w)]
        part, *rest = inputs
        y, final = run(cell, part, tuple(rest[:n]), Weights(*rest[n:]), lengths, reverse, clip, cut)  # type: ignore[arg-type]
        wanted = [v is not None and v.requires_grad for v in inputs]
        return tuple(vjp((y, *final), (dy, *dfinal), inputs, wanted, graph=True))
