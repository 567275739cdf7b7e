"""The fused rung as a layer's own pass: torch's kernel on the weights as they are, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from unvanish import torch_internals
from unvanish.cells import Cell, State, Weights
from unvanish.engine import reference, torch_kernels
from unvanish.engine.precision import without_autocast
from unvanish.engine.reading import Reading


class _Fused(torch.autograd.Function):
    """torch's kernel on the weights as they are. Its own backward can't be differentiated on every device."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, lengths: Tensor | None, reverse: bool, *inputs: Any) -> Any:
        ctx.save_for_backward(*inputs)
        ctx.cell, ctx.lengths, ctx.reverse = cell, lengths, reverse
        ctx.set_materialize_grads(False)
        n = len(cell.states)
        x, state, w = inputs[0], inputs[1 : 1 + n], Weights(*inputs[1 + n :])
        T, B = x.shape[:2]
        reading = Reading(T, B, lengths, reverse, x.device)
        weights = torch_kernels.flat(cell, w)
        ctx.wanted = [i for i, wanted in enumerate(ctx.needs_input_grad[3:]) if wanted]
        with without_autocast(), torch.set_grad_enabled(bool(ctx.wanted)):
            leaf = x.detach()
            states = [s.detach() for s in state]
            ctx.leaves = dict(enumerate([leaf, *states]))
            ctx.leaves |= dict(zip(_places(w, 1 + n), weights, strict=True))
            for i in ctx.wanted:
                ctx.leaves[i].requires_grad_()
            y = x.new_zeros(T, B, state[0].shape[1])
            now = reading.sorted(tuple(states))
            for piece in reading.pieces(T):
                samples = piece.samples(B)
                part, final = torch_kernels.run(
                    cell, reading.take(leaf, piece), piece.sizes, tuple(s[:samples] for s in now), weights
                )
                reading.put(y, piece, part)
                now = tuple(torch.cat([new, s[samples:]]) for new, s in zip(final, now, strict=True))
            ctx.outputs = (y, *reading.unsorted(now))
        return tuple(v.detach() for v in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *errors: Any) -> Any:
        x, *rest = ctx.saved_tensors
        n = len(ctx.cell.states)
        if torch.is_grad_enabled():
            found = reference.gradients(
                ctx.cell, x, tuple(rest[:n]), Weights(*rest[n:]), ctx.lengths, ctx.reverse, None, errors[0], errors[1:]
            )
            return None, None, None, *found
        pairs = [(v, d) for v, d in zip(ctx.outputs, errors, strict=True) if d is not None and v.requires_grad]
        gradients: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        if pairs:
            outputs, arriving = zip(*pairs, strict=True)
            leaves = [ctx.leaves[i] for i in ctx.wanted]
            with without_autocast():
                found = torch.autograd.grad(
                    outputs, leaves, arriving, retain_graph=torch_internals.keeps_graph(), allow_unused=True
                )
            for i, d in zip(ctx.wanted, found, strict=True):
                gradients[i] = d
        return None, None, None, *gradients


def _places(w: Weights, first: int) -> list[int]:
    """Where, among all inputs, the weights stand that a kernel is given; a bias that is missing stands nowhere."""
    biased = w.b_ih is not None or w.b_hh is not None
    return [first + i for i, v in enumerate(w[:5]) if v is not None or (biased and i in (2, 3))]


def run(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None = None,
    reverse: bool = False,
    clip: float | None = None,
) -> tuple[Tensor, State]:
    """(y, final state) for x `[T, B, I]` that `fused.obstacle` admits; see `unvanish.engine.run`. Products are
    rounded as torch's own layers round them (TF32)."""
    assert clip is None
    y, *final = _Fused.apply(cell, lengths, reverse, x, *state, *w)  # type: ignore[misc]
    return y, tuple(final)
