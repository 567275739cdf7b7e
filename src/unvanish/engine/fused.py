"""The fused rung: torch's own kernels for whole sequences, on any device that has them; no loop over steps in Python.

A kernel does not return its δ, so it is run on the input's share of the pre-activations instead of on the input:

    p = W_ih x + b_ih for all steps at once, then the kernel with weight_ih = I, bias_ih = 0 and frozen weights:
    it returns y and the final states, and the gradient of p is δp

The rest of a trace follows from these for all steps at once (`unvanish.cells.TorchKernel`): gates by one product, c by
a scan. So does the adjoint: with δq from δp,

    δh_t = ∂E_t/∂h_t + W_hhᵀ δq_{t+1}        and where a state carries itself, δs_t = arrived_t + C_{t+1} ⊙ δs_{t+1}

which is a scan too. Products have the full precision of the dtype: TF32 would round the identity product.

Memory: a sequence is read in pieces of some 10⁶ numbers. A kernel's graph is kept between trace and adjoint where the
caller says that the adjoint follows and the sequence is short; otherwise the adjoint runs each piece forward again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unvanish import torch_internals
from unvanish.cells import Cell, State, TorchKernel, Weights, calculus
from unvanish.engine import manual, torch_kernels
from unvanish.engine.precision import full_precision
from unvanish.engine.reading import Piece, Reading
from unvanish.engine.scan import scan_
from unvanish.engine.sequence import active_steps, states_before, transform, without_padding

PIECE_ELEMENTS = 2**22
"""elements of p that go through the kernel at a time"""
PIECE_STEPS = 64
"""the fewest steps of a piece: a kernel keeps the weights on the chip and reloads them for every piece"""
GRAPH_ELEMENTS = 2**24
"""elements of p, in all, up to which the kernel's graph is kept from trace to adjoint"""


class _Graph(NamedTuple):
    """The graph of a piece that has run forward."""

    leaves: list[Tensor]
    """p, and the states before the piece"""
    outputs: list[Tensor]
    """y, and the states after it"""


class Ran(NamedTuple):
    """What the adjoint needs from a trace besides its states and gates."""

    reading: Reading
    pieces: list[Piece]
    weights: list[Tensor]
    graphs: list[_Graph]
    """those of the pieces, in order, until the adjoint has used them; or empty"""
    lengths: Tensor | None


def obstacle(
    cell: Cell, x: Tensor, others: Sequence[Tensor | None] = (), clip: float | None = None, cut: bool = False
) -> str | None:
    """Why torch's kernels can't run this cell over x, with `others` as states and weights, or None if they can."""
    if cell.torch_kernel is None:
        return f"torch has no kernel for sequences of a {cell.name}"
    if clip is not None:
        return "torch's kernels do not clip the gradient inside the recurrence"
    if cut:
        return "torch's kernels hand the gradient through the recurrent matrices at every step, and can't leave one out"
    if x.device.type not in ("cpu", "cuda") or x.dtype not in (torch.float32, torch.float64):
        return f"it is for float32 and float64 on the CPU and CUDA, the input is {x.dtype} on {x.device}"
    if x.numel() == 0:
        return "the input is empty"
    if torch.compiler.is_compiling() or torch_internals.mode_active():
        return "a graph is captured or a mode is active, which would see a backward pass inside the forward"
    w_hr = dict(zip(Weights._fields, others[len(cell.states) :], strict=False)).get("w_hr")
    if w_hr is not None and w_hr.shape[0] >= w_hr.shape[1]:
        return "torch's kernels project to a smaller size only"
    return transform()


def _kernel(cell: Cell) -> TorchKernel:
    assert cell.torch_kernel is not None
    return cell.torch_kernel


@torch.no_grad()
def trace(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None = None,
    reverse: bool = False,
    adjoint_follows: bool = False,
) -> manual.Trace:
    """As `unvanish.engine.manual.trace`, outside any graph."""
    T, B = x.shape[:2]
    width = len(w.w_ih)
    steps = max(PIECE_STEPS, PIECE_ELEMENTS // (B * width))
    reading = Reading(T, B, lengths, reverse, x.device)
    active = active_steps(lengths, T, x.device)
    x = without_padding(x, active)
    ran = Ran(reading, list(reading.pieces(steps)), torch_kernels.identity(cell, w), [], lengths)
    keep = adjoint_follows and T * B * width <= GRAPH_ELEMENTS
    with full_precision():
        y = x.new_zeros(T, B, state[0].shape[1]) if lengths is not None else x.new_empty(T, B, state[0].shape[1])
        now = list(reading.sorted(state))
        for piece in ran.pieces:
            n = piece.samples(B)
            graph = _forward(cell, x, w, ran, piece, tuple(s[:n] for s in now), keep)
            made, *after = (v.detach() for v in graph.outputs)
            reading.put(y, piece, made)
            now = [new if n == B else torch.cat([new, s[n:]]) for new, s in zip(after, now, strict=True)]
            if keep:
                ran.graphs.append(graph)
        before = states_before(y, state[0], lengths, reverse)
        kept = _kept(cell, x, w, before, y, steps)
        others = [
            _other(part, s, lengths, active, reverse)
            for part, s in zip(_kernel(cell).others(kept), state[1:], strict=True)
        ]
        befores = (before, *(states_before(v, s, lengths, reverse) for v, s in zip(others, state[1:], strict=True)))
    final = reading.unsorted(tuple(now))
    return manual.Trace(cell, w, x, befores, (y, *others), final, active, reverse, kept=kept, fused=ran)


def _forward(cell: Cell, x: Tensor, w: Weights, ran: Ran, piece: Piece, state: State, graph: bool) -> _Graph:
    """Run a piece from the states before it, the longest samples first."""
    p = cell.project(ran.reading.take(x, piece), w)
    if not cell.rectifies:
        # An infinite pre-activation saturates its gate; the identity product would turn all the others into NaN.
        p.clamp_(-torch.finfo(p.dtype).max, torch.finfo(p.dtype).max)
    leaves = [p, *(s.clone() for s in state)]
    with torch.set_grad_enabled(graph):
        if graph:
            leaves = [v.requires_grad_() for v in leaves]
        made, after = torch_kernels.run(cell, leaves[0], piece.sizes, tuple(leaves[1:]), ran.weights)
    return _Graph(leaves, [made, *after])


def _kept(cell: Cell, x: Tensor, w: Weights, before: Tensor, y: Tensor, steps: int) -> Tensor:
    """The gates of all steps, computed a few steps at a time."""

    def part(span: slice) -> Tensor:
        def shares() -> tuple[Tensor, Tensor]:
            q = cell.recur((before[span],), w)
            assert q is not None
            return cell.project(x[span], w), q

        return _kernel(cell).kept(shares, y[span])

    if len(x) <= steps:
        return part(slice(None))
    kept = part(slice(0, steps))
    whole = kept.new_empty(len(x), *kept.shape[1:])
    whole[:steps] = kept
    for first in range(steps, len(x), steps):
        whole[first : first + steps] = part(slice(first, first + steps))
    return whole


def _other(
    parts: tuple[Tensor, Tensor], initial: Tensor, lengths: Tensor | None, active: Tensor | None, reverse: bool
) -> Tensor:
    """A state with a carry, `[T, B, H]`: s_t = keep_t ⊙ s_{t-1} + add_t in reading order; 0 where a sample is
    inactive."""
    keep, add = parts
    if active is not None:
        add = torch.where(active, add, 0.0)
    _add_at(add, keep, initial, lengths, first=True, reverse=reverse)
    states = scan_(keep, add, backwards=reverse)
    return states if active is None else torch.where(active, states, 0.0)


def _add_at(into: Tensor, factor: Tensor | None, v: Tensor, lengths: Tensor | None, first: bool, reverse: bool) -> None:
    """into += factor ⊙ v at the first step that each sample reads, or at the last; None is 1."""
    at_end = first == reverse
    if lengths is None:
        t = -1 if at_end else 0
        into[t] += v if factor is None else factor[t] * v
        return
    samples = torch.arange(len(v), device=v.device)
    t = (lengths.to(v.device) - 1).clamp_min(0) if at_end else torch.zeros_like(samples)
    v = v if factor is None else factor[t, samples] * v
    there = (lengths.to(v.device) > 0).unsqueeze(-1)
    into.index_put_((t, samples), torch.where(there, v, 0.0), accumulate=True)


@torch.no_grad()
def adjoint(tr: manual.Trace, dy: Tensor | None, dfinal: tuple[Tensor | None, ...]) -> manual.Deltas:
    """As `unvanish.engine.manual.adjoint`, for a trace of this rung; also returns the weights' gradients."""
    assert tr.fused is not None
    assert tr.kept is not None
    ran: Ran = tr.fused
    cell, w, kernel, h = tr.cell, tr.weights, _kernel(tr.cell), tr.cell.states[0]
    with full_precision():
        dp, dinitial = _through_the_kernel(tr, dy, dfinal)
        dq = kernel.recurrent(dp, tr.kept)
        arrived = torch.zeros_like(tr.y) if dy is None else dy.clone()
        assert w.w_hh is not None
        handed = dq @ w.w_hh
        arrived[_earlier(tr.reverse)] += handed[_earlier(not tr.reverse)]
        del handed
        if dfinal[0] is not None:
            _add_at(arrived, None, dfinal[0], ran.lengths, first=False, reverse=tr.reverse)
        if tr.active is not None:
            arrived = torch.where(tr.active, arrived, 0.0)
        made, carried = kernel.between(tr.kept, tr.after)
        total = {h: arrived if w.w_hr is None else arrived @ w.w_hr}
        ends = dict(zip(cell.states, dfinal, strict=True))
        for b in calculus.backward_order(cell, made):
            if b != h:
                total[b] = calculus.sum_of({(a, of): u for (a, of), u in made.items() if of == b}, b, total)
                if (end := ends[b]) is not None:
                    _add_at(total[b], None, end, ran.lengths, first=False, reverse=tr.reverse)
            if (b, b) in carried:
                total[b] = _back(carried[b, b], total[b], tr)
        dstate = tuple(arrived if a == h and w.w_hr is not None else total[a] for a in cell.states)
        return manual.Deltas(dstate, dp, dq, dinitial)


def _earlier(reverse: bool) -> slice:
    """All steps but the last one read; `_earlier(not reverse)`: all but the first one read."""
    return slice(1, None) if reverse else slice(None, -1)


def _back(carry: Tensor, arrived: Tensor, tr: manual.Trace) -> Tensor:
    """δs_t = arrived_t + C_{t+1} ⊙ δs_{t+1} against the reading order; 0 where a sample is inactive."""
    # The roll wraps around to the step read last, whose entry has no effect.
    found = scan_(carry.roll(1 if tr.reverse else -1, 0), arrived, backwards=not tr.reverse)
    return found if tr.active is None else torch.where(tr.active, found, 0.0)


def _through_the_kernel(tr: manual.Trace, dy: Tensor | None, dfinal: tuple[Tensor | None, ...]) -> tuple[Tensor, State]:
    """(δp, ∂E/∂(initial state)) by the kernel's own backward pass, piece by piece."""
    ran: Ran = tr.fused
    cell, reading, (T, B, _) = tr.cell, ran.reading, tr.x.shape
    shape = T, B, len(tr.weights.w_ih)
    dp = tr.x.new_zeros(shape) if tr.active is not None else tr.x.new_empty(shape)
    later = reading.sorted(
        tuple(torch.zeros_like(s) if d is None else d for s, d in zip(tr.final, dfinal, strict=True))
    )
    kept = bool(ran.graphs)
    for piece in reversed(ran.pieces):
        n = piece.samples(B)
        if kept:
            graph = ran.graphs.pop()
        else:
            state = tuple(reading.take_first(s, piece) for s in tr.before)
            graph = _forward(cell, tr.x, tr.weights, ran, piece, state, graph=True)
        arriving = torch.zeros_like(graph.outputs[0]) if dy is None else reading.take(dy, piece)
        part, *before = torch.autograd.grad(graph.outputs, graph.leaves, [arriving, *(d[:n] for d in later)])
        del graph
        reading.put(dp, piece, part)
        later = tuple(d if n == B else torch.cat([d, rest[n:]]) for d, rest in zip(before, later, strict=True))
    return dp, reading.unsorted(later)
