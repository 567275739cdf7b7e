"""A sequence in the order in which a layer reads it, split into pieces for torch's kernels: from the first step on,
without samples that have ended (packed, the longest sample first)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unvanish.cells import State


class Piece(NamedTuple):
    """Consecutive steps, counted as they are read."""

    first: int
    last: int
    """the step after them"""
    sizes: Tensor | None
    """[last − first] the number of samples that have each step; None where all samples have all steps"""
    rows: Tensor | None
    """[Σ sizes] the indices of these samples' steps in a sequence `[T·B, ...]`"""

    def samples(self, B: int) -> int:
        """The number of samples that have its first step."""
        return B if self.sizes is None else int(self.sizes[0])


class Reading:
    """T steps of B samples of these lengths."""

    def __init__(self, T: int, B: int, lengths: Tensor | None, reverse: bool, device: torch.device) -> None:
        self.T, self.B, self.reverse, self.device = T, B, reverse, device
        self._lengths = self._order = None
        if lengths is not None:
            self._lengths, self._order = lengths.cpu().sort(descending=True, stable=True)

    def pieces(self, steps: int) -> Iterator[Piece]:
        """Pieces of the given number of steps, the last one shorter; steps that no sample has are left out."""
        end = self.T if self._lengths is None else int(self._lengths.max())
        for first in range(0, end, steps):
            yield self._piece(first, min(end, first + steps))

    def _piece(self, first: int, last: int) -> Piece:
        if self._lengths is None or self._order is None:
            return Piece(first, last, None, None)
        number = torch.arange(first, last, device="cpu")[:, None]
        here = number < self._lengths
        t = self._lengths - 1 - number if self.reverse else number
        return Piece(first, last, here.sum(1), (t * self.B + self._order)[here].to(self.device))

    def take(self, v: Tensor, piece: Piece) -> Tensor:
        """The piece's part of v `[T, B, n]`: `[steps, B, n]`, packed `[Σ sizes, n]`."""
        if piece.rows is not None:
            return v.flatten(0, 1).index_select(0, piece.rows)
        part = v[self._slice(piece)]
        return part.flip(0) if self.reverse else part

    def put(self, into: Tensor, piece: Piece, part: Tensor) -> None:
        """The inverse of `take`; `into` `[T, B, n]` must be contiguous."""
        if piece.rows is not None:
            into.view(-1, into.shape[-1]).index_copy_(0, piece.rows, part)
        else:
            into[self._slice(piece)] = part.flip(0) if self.reverse else part

    def take_first(self, v: Tensor, piece: Piece) -> Tensor:
        """The piece's first step of v, `[samples, n]`, the longest first."""
        if piece.rows is not None:
            return v.flatten(0, 1).index_select(0, piece.rows[: piece.samples(self.B)])
        return v[self.T - 1 - piece.first if self.reverse else piece.first]

    def _slice(self, piece: Piece) -> slice:
        if self.reverse:
            return slice(self.T - piece.last, self.T - piece.first)
        return slice(piece.first, piece.last)

    def sorted(self, state: State) -> State:
        """States `[B, n]` with the longest sample first."""
        if self._order is None:
            return state
        return tuple(s.index_select(0, self._order.to(s.device)) for s in state)

    def unsorted(self, state: State) -> State:
        """States in the samples' own order."""
        if self._order is None:
            return state
        back = self._order.argsort()
        return tuple(s.index_select(0, back.to(s.device)) for s in state)
