"""The fused rung as a layer's own pass: torch's kernel on the weights as they are, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from unvanish import torch_internals
from unvanish.cells import Cell, State, Weights
from unvanish.engine import manual, reference, torch_kernels
from unvanish.engine.precision import full_precision, without_autocast
from unvanish.engine.reading import Reading
from unvanish.engine.scan import scan
from unvanish.engine.sequence import active_steps, states_before, without_padding


class _Fused(torch.autograd.Function):
    """torch's kernel on the weights as they are. Its own backward can't be differentiated on every device."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, lengths: Tensor | None, reverse: bool, exact: bool, *inputs: Any) -> Any:
        ctx.save_for_backward(*inputs)
        ctx.cell, ctx.lengths, ctx.reverse = cell, lengths, reverse
        ctx.precision = full_precision if exact else without_autocast
        ctx.set_materialize_grads(False)
        n = len(cell.states)
        x, state, w = inputs[0], inputs[1 : 1 + n], Weights(*inputs[1 + n :])
        T, B = x.shape[:2]
        reading = Reading(T, B, lengths, reverse, x.device)
        weights = torch_kernels.flat(cell, w)
        ctx.wanted = [i for i, wanted in enumerate(ctx.needs_input_grad[4:]) if wanted]
        with ctx.precision(), torch.set_grad_enabled(bool(ctx.wanted)):
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
            return None, None, None, None, *found
        pairs = [(v, d) for v, d in zip(ctx.outputs, errors, strict=True) if d is not None and v.requires_grad]
        gradients: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        if pairs:
            outputs, arriving = zip(*pairs, strict=True)
            leaves = [ctx.leaves[i] for i in ctx.wanted]
            with ctx.precision():
                found = torch.autograd.grad(
                    outputs, leaves, arriving, retain_graph=torch_internals.keeps_graph(), allow_unused=True
                )
            for i, d in zip(ctx.wanted, found, strict=True):
                gradients[i] = d
        return None, None, None, None, *gradients


def _places(w: Weights, first: int) -> list[int]:
    """The positions, among all inputs, of the weights that a kernel takes; a missing bias has none."""
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
    cut: Tensor | None = None,
    *,
    exact: bool = False,
) -> tuple[Tensor, State]:
    """(y, final state) for x `[T, B, I]` that `fused.obstacle` admits; see `unvanish.engine.run`. Products are
    rounded as torch's own layers round them (TF32), or, with `exact`, not at all."""
    assert clip is None
    assert cut is None
    y, *final = _Fused.apply(cell, lengths, reverse, exact, x, *state, *w)  # type: ignore[misc]
    return y, tuple(final)


def trace(
    cell: Cell, x: Tensor, state: State, w: Weights, lengths: Tensor | None = None, reverse: bool = False
) -> manual.Trace:
    """As `unvanish.engine.manual.trace`, differentiable: gates from h by one product, and the states that torch does
    not return by scans."""
    assert cell.torch_kernel is not None
    active = active_steps(lengths, len(x), x.device)
    x = without_padding(x, active)
    with full_precision():
        y, final = run(cell, x, state, w, lengths, reverse, exact=True)
        before = states_before(y, state[0], lengths, reverse)
        tr = manual.Trace(cell, w, x, (before,), (y,), final, active, reverse)
        for (keep, add), initial in zip(cell.torch_kernel.others(tr.gates), state[1:], strict=True):
            # Before its first step and after its last, a sample keeps its state.
            if active is not None:
                keep, add = torch.where(active, keep, 1.0), torch.where(active, add, 0.0)
            first = slice(-1, None) if reverse else slice(0, 1)
            rest = slice(None, -1) if reverse else slice(1, None)
            parts = [add[first] + keep[first] * initial, add[rest]]
            states = scan(keep, torch.cat(parts[::-1] if reverse else parts), backwards=reverse)
            states = states if active is None else torch.where(active, states, 0.0)
            tr.after = (*tr.after, states)
            tr.before = (*tr.before, states_before(states, initial, lengths, reverse))
    return tr
