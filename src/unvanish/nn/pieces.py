"""A long sequence run piece by piece: one state in so many is kept, the rest computed again in the backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unvanish.cells import State
from unvanish.engine.sequence import transform

Run = Callable[[int, Tensor, State, Tensor | None], tuple[Tensor, State]]
"""(first step, its input, the state before it, the steps left to each sample) → (its output, the state after it)"""


def run_in_pieces(
    every: int, x: Tensor, state: State, lengths: Tensor | None, reverse: bool, run: Run
) -> tuple[Tensor, State]:
    """`run` over x `[T, B, I]` in pieces of `every` steps, each of them checkpointed: (y `[T, B, R]`, final state)."""
    # split, not slices: a slice's gradient is as large as the whole, once per piece.
    parts = dict(zip(range(0, len(x), every), x.split(every), strict=True))
    # Graphs and transforms can't hold writes into shared memory.
    joins = not torch.compiler.is_compiling() and transform() is None
    pieces: dict[int, Tensor] = {}
    whole = x.new_empty(0)
    for start in reversed(parts) if reverse else parts:
        part = parts[start]
        here = None if lengths is None else (lengths - start).clamp(0, len(part))
        piece, state = checkpoint(  # type: ignore[misc]
            run, start, part, state, here, use_reentrant=False, preserve_rng_state=False
        )
        if joins:
            whole = whole if len(whole) else piece.new_empty(len(x), *piece.shape[1:])
            piece = _Placed.apply(piece, whole[start : start + len(part)].detach())
        pieces[start] = piece
    in_order = [pieces[start] for start in parts]
    return (_Whole.apply(whole, *in_order) if joins else torch.cat(in_order)), state


class _Placed(torch.autograd.Function):
    """A piece moved to where it belongs in the whole."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, place: Tensor) -> Tensor:
        ctx.mark_dirty(place)
        return place.copy_(piece)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Whole(torch.autograd.Function):
    """The sequence whose pieces lie side by side in memory; torch.cat would need that memory twice."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *pieces: Tensor) -> Tensor:
        ctx.lengths = [len(piece) for piece in pieces]
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *grads[0].split(ctx.lengths)
