"""A long sequence run piece by piece: one state in n is kept, the others are recomputed in the backward pass."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unvanish import torch_internals
from unvanish.cells import State, Weights
from unvanish.engine import Norms, Recompute, Recorder, Statistics
from unvanish.engine.sequence import add, transform, vjp

Run = Callable[[Tensor, State, Weights, Tensor | None, Tensor | None, Recorder | None], tuple[Tensor, State]]
"""(input, state before it, weights, remaining steps of each sample, its cut steps, its recorder) → (output, state after
it)"""


class Piece(NamedTuple):
    """Steps [start, end) of a sequence."""

    start: int
    end: int

    def of(self, v: Tensor | None) -> Any:
        """The piece's part of `[T, ·]`."""
        return None if v is None else v[self.start : self.end]

    def lengths(self, lengths: Tensor | None) -> Tensor | None:
        """The number of steps that each sample has in the piece."""
        return None if lengths is None else (lengths - self.start).clamp(0, self.end - self.start)


class Plan(NamedTuple):
    """How a sequence is run."""

    pieces: list[Piece]
    """in reading order"""
    lengths: Tensor | None
    cut: Tensor | None
    """[T], as `unvanish.engine.run` takes it"""
    run: Run
    recorder: Callable[[int], Recorder] | None
    """first step of a piece → its recorder"""

    def run_piece(
        self, piece: Piece, x: Tensor, state: State, w: Weights, recorder: Recorder | None
    ) -> tuple[Tensor, State]:
        """Run a piece, whose input is x."""
        return self.run(x, state, w, piece.lengths(self.lengths), piece.of(self.cut), recorder)

    def recorder_for(self, piece: Piece) -> Recorder | None:
        return None if self.recorder is None else self.recorder(piece.start)


def run_in_pieces(
    every: int,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None,
    reverse: bool,
    cut: Tensor | None,
    run: Run,
    recorder: Callable[[int], Recorder] | None = None,
) -> tuple[Tensor, State]:
    """`run` over x `[T, B, I]` in pieces of `every` steps, each of them checkpointed: (y `[T, B, R]`, final state)."""
    T = len(x)
    pieces = [Piece(start, min(start + every, T)) for start in range(0, T, every)]
    plan = Plan(pieces[::-1] if reverse else pieces, lengths, cut, run, recorder)
    if torch.compiler.is_compiling() or transform() is not None:
        # Graphs and transforms can't represent writes into shared memory, but they support torch's own checkpoint.
        return _checkpointed(plan, x, state, w)
    y, *final = _InPieces.apply(plan, len(state), x, *state, *w)
    return y, tuple(final)


def _checkpointed(plan: Plan, x: Tensor, state: State, w: Weights) -> tuple[Tensor, State]:
    """The pieces with torch's own checkpoint and operations."""
    order = sorted(plan.pieces)
    # split, not slices: a slice's gradient is as large as the whole, once per piece.
    parts = dict(zip(order, x.split([piece.end - piece.start for piece in order]), strict=True))
    found: dict[Piece, Tensor] = {}
    for piece in plan.pieces:
        given = piece, parts[piece], state, w, None
        y, state = checkpoint(plan.run_piece, *given, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
        found[piece] = y
    return torch.cat([found[piece] for piece in order]), state


class _InPieces(torch.autograd.Function):
    """The sequence as one node of the graph. torch's checkpoint makes three calls per piece and keeps gates in the
    first; pieces joined by torch.cat would need their memory twice."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, n: int, x: Tensor, *given: Any) -> Any:
        state, w = given[:n], Weights(*given[n:])
        whole, kept = x.new_empty(0), []
        for piece in plan.pieces:
            kept += state
            y, state = plan.run_piece(piece, piece.of(x), state, w, plan.recorder_for(piece))
            # Not from the kernels' pool, which would keep as much memory after the output is freed.
            whole = whole if len(whole) else y.new_empty(len(x), *y.shape[1:])
            piece.of(whole).copy_(y)
        ctx.save_for_backward(x, *w, *kept)
        ctx.plan, ctx.n, ctx.errors = plan, n, None
        ctx.set_materialize_grads(False)
        return whole, *state

    @staticmethod
    def backward(ctx: Any, *errors: Any) -> Any:
        x, *saved = ctx.saved_tensors
        n = len(Weights._fields)
        w, kept, needs = Weights(*saved[:n]), saved[n:], ctx.needs_input_grad[2:]
        device = x.device.type
        gradients, recorded = [], ctx.plan.recorder is not None
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            if recorded or not torch.is_grad_enabled():
                # A second backward through the same graph: the sum of both gradients is recorded, as in .grad.
                total = None if ctx.errors is None else [add(a, b) for a, b in zip(ctx.errors, errors, strict=True)]
                notices: list[Callable[[], None]] = []
                with torch.no_grad():
                    gradients = _back(ctx.plan, x, w, kept, needs, errors, total, notices)
                # In the grad mode of the backward pass, which tells a recorder whether a graph of it is built.
                for notify in notices:
                    notify()
                keeps = recorded and torch_internals.keeps_graph()
                ctx.errors = (total or errors) if keeps else None
            if torch.is_grad_enabled():
                gradients = _graph_of_gradients(ctx.plan, x, tuple(kept[: ctx.n]), w, errors, needs)
        return None, None, *gradients


def _back(
    plan: Plan,
    x: Tensor,
    w: Weights,
    kept: list[Tensor],
    needs: Any,
    errors: Any,
    total: Any,
    notices: list[Callable[[], None]],
) -> list[Tensor | None]:
    """The gradients of x, the initial state and w from those of (y, final state); recorded are those of `total`, or the
    same ones where it is None."""
    n = len(errors) - 1
    dx = torch.zeros_like(x) if needs[0] else None
    (dy, *d), sums = errors, [None] * len(w)
    dy_total, *d_total = total or [None] * (n + 1)
    for number, piece in reversed(list(enumerate(plan.pieces))):
        inputs = piece, x, tuple(kept[number * n : (number + 1) * n]), w, needs
        recorder = plan.recorder_for(piece)
        held = None if recorder is None else _Held(recorder)
        here = _piece(plan, *inputs, [piece.of(dy), *d], held if total is None else None)
        if held is not None:
            if total is not None:
                d_total = _piece(plan, *inputs, [piece.of(dy_total), *d_total], held)[1 : 1 + n]
            notices.append(partial(held.hand_on, here[1 + n :]))
        if dx is not None and here[0] is not None:
            piece.of(dx).copy_(here[0])
        d = here[1 : 1 + n]
        sums = [add(a, b) for a, b in zip(sums, here[1 + n :], strict=True)]
    return [dx, *d, *sums]


def _piece(
    plan: Plan, piece: Piece, x: Tensor, state: State, w: Weights, needs: Any, errors: list[Any], recorder: Any
) -> list[Tensor | None]:
    """The gradients of a piece's input, the state before it and w."""
    n = len(state)
    wanted = [needs[0], *[True] * n, *needs[1 + n :]]
    given = zip([piece.of(x), *state, *w], wanted, strict=True)
    inputs: list[Any] = [None if v is None else v.detach().requires_grad_(yes) for v, yes in given]
    with torch.enable_grad():
        part, *rest = inputs
        y, final = plan.run_piece(piece, part, tuple(rest[:n]), Weights(*rest[n:]), recorder)
    return vjp((y, *final), errors, inputs, wanted, graph=False)


def _graph_of_gradients(
    plan: Plan, x: Tensor, state: State, w: Weights, errors: Any, needs: Any
) -> list[Tensor | None]:
    """Differentiable gradients. The stored states are detached from the graph that computed them, so this builds a
    graph of the whole sequence."""
    n = len(state)
    # Views, so that hooks on the tensors themselves do not run twice.
    inputs = [None if v is None else v.view_as(v) for v in (x, *state, *w)]
    part, *rest = inputs
    state_read, w_read = tuple(rest[:n]), Weights(*rest[n:])  # type: ignore[arg-type]
    y, final = plan.run(part, state_read, w_read, plan.lengths, plan.cut, None)  # type: ignore[arg-type]
    return vjp((y, *final), errors, inputs, needs, graph=True)


class _Held:
    """Delays a recorder's notifications until the surrounding backward pass: the gradients of a piece are a separate
    pass."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.observed = recorder, list[tuple[Norms, Weights, Recompute]]()

    @property
    def awaits_backward(self) -> bool:
        return self.recorder.awaits_backward

    def forward(self, statistics: Statistics) -> None:
        self.recorder.forward(statistics)

    def backward(self, norms: Norms, gradients: Weights, recompute: Recompute) -> None:
        self.observed.append((norms, gradients, recompute))

    def hand_on(self, gradients: list[Tensor | None]) -> None:
        """Notify the recorder, with `gradients` in place of those observed where given. The list is emptied, because
        `recompute` refers to the piece's graph, which refers to this object."""
        held, self.observed = self.observed, []
        for norms, observed, recompute in held:
            both = zip(gradients, observed, strict=True)
            self.recorder.backward(norms, Weights(*(b if a is None else a for a, b in both)), recompute)  # type: ignore[arg-type]
