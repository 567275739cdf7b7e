"""Shared by all rungs: ragged sequences, the order of the steps, clipping of δ inside the recurrence.

Sequences are time-major `[T, B, ...]`. With `lengths` `[B]`, sample b is active at t < lengths[b]; elsewhere its state
does not change, so the final state is the one after its last step and a reversed sequence starts at its own end.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unvanish import torch_internals
from unvanish.cells import State


def active_steps(lengths: Tensor | None, T: int, device: torch.device) -> Tensor | None:
    """`[T, B, 1]` True where a sample has an input; None when every sample has T steps."""
    if lengths is None:
        return None
    steps = torch.arange(T, device=device)
    return (steps[:, None] < lengths.to(device)[None, :]).unsqueeze(-1)


def without_padding(x: Tensor, active: Tensor | None) -> Tensor:
    """x `[T, B, I]`, 0 where a sample has no input: a NaN in the padding would come back as 0 · NaN."""
    return x if active is None else torch.where(active, x, 0.0)


def steps(T: int, reverse: bool) -> Iterator[int]:
    """0 … T−1 in the order in which the layer reads them."""
    return iter(range(T - 1, -1, -1) if reverse else range(T))


def cut_steps(cut: Tensor | None, T: int) -> list[bool]:
    """For each step whether its matrices pass no gradient to the step before."""
    return [False] * T if cut is None else cut.tolist()


def clip_rows(d: Tensor, limit: float) -> Tensor:
    """Each row of d `[B, n]` scaled down to 2-norm ≤ limit. The norm is computed in float64 after dividing the row by
    its largest entry: squares overflow at 1e19 in float32, at 1e154 in float64."""
    largest = d.abs().amax(-1, keepdim=True).double()
    largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    norm = largest * torch.linalg.vector_norm(d.double() / largest, dim=-1, keepdim=True)
    return d * torch.where(norm > limit, limit / norm, 1.0).to(d.dtype)


def states_before(states: Tensor, initial: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """The state before each step, `[T, B, ·]`, from those after it; a reversed sample starts at its own end."""
    if not reverse:
        return torch.cat([initial.unsqueeze(0), states[:-1]])
    shifted = torch.cat([states[1:], initial.unsqueeze(0)])
    if lengths is None:
        return shifted
    T = states.shape[0]
    starts = torch.arange(1, T + 1, device=states.device)[:, None] >= lengths.to(states.device)[None, :]
    return torch.where(starts.unsqueeze(-1), initial, shifted)


class Sorted(NamedTuple):
    """A ragged batch with its longest samples first, as the kernels require."""

    x: Tensor
    state: State
    lengths: Tensor | None
    back: Tensor | None
    """index of each sample's place among the sorted; None when nothing moved"""


def sort(x: Tensor, state: State, lengths: Tensor | None) -> Sorted:
    """Sort the batch with the longest samples first, unless it already is."""
    if lengths is None:
        return Sorted(x, state, None, None)
    lengths = lengths.cpu()
    if bool((lengths[:-1] >= lengths[1:]).all()):
        return Sorted(x, state, lengths.contiguous(), None)
    sorted_lengths, order = lengths.sort(descending=True, stable=True)
    back = torch.argsort(order)
    return Sorted(x.index_select(1, order), tuple(s.index_select(0, order) for s in state), sorted_lengths, back)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is zero."""
    return b if a is None else a if b is None else a + b


def vjp(
    outputs: Sequence[Tensor],
    errors: Sequence[Tensor | None],
    inputs: Sequence[Any],
    wanted: Sequence[bool],
    graph: bool,
) -> list[Tensor | None]:
    """Σ_k errors_kᵀ ∂outputs_k/∂input for each input, None where it is not wanted or no gradient reaches it; with
    `graph` it is differentiable."""
    asked = [v for v, yes in zip(inputs, wanted, strict=True) if yes]
    pairs = zip(outputs, errors, strict=True)
    reached = [(out, d) for out, d in pairs if d is not None and out.requires_grad]
    if not reached or not asked:
        return [None] * len(inputs)
    ends, arriving = zip(*reached, strict=True)
    found = iter(torch.autograd.grad(ends, asked, arriving, create_graph=graph, allow_unused=True))
    return [next(found) if yes else None for yes in wanted]


def transform() -> str | None:
    """What needs a graph of autograd's own operations, which a hand-written adjoint does not record; None: nothing
    does."""
    if torch_internals.transform_active():
        return "a torch.func transform is active, which needs autograd's own graph"
    if torch_internals.forward_mode_active():
        return "forward-mode differentiation is active, which needs autograd's own graph"
    return None
