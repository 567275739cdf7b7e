"""Errors carried back through a layer, many at once and over any number of decades.

Each of `K` errors is a row per sample; all rows go through one matrix product per step. Every row is kept near 1 by
exact powers of two and carries its exponent along, so that it stays right where the numbers themselves have left the
range of floating point.

A layer's `clip` plays no part here: these are derivatives of what the layer computes, whatever its backward pass hands
on.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import Adjoint
from unvanish.flow.exponents import EMPTY, Rows, log_norms, renormalisation, times_power_of_two
from unvanish.flow.stack import Stack, reading_order, saved_at

HELD_ELEMENTS = 2**26
"""Of the rows that a stacked module passes from layer to layer; more errors are taken in several rounds."""


class Some(NamedTuple):
    """A contiguous part of the K errors."""

    place: slice
    rows: Rows
    """[k, B, n]"""


Entering = Callable[[int], Some | None]
"""step → what reaches the output h_t of a layer there, not counting what comes from its own later steps"""


class Step(NamedTuple):
    """One step back of the errors that have entered so far; everything is 0 where a sample is inactive."""

    t: int
    place: slice
    """which of the K errors"""
    adjoint: Adjoint
    """`[k, B, ...]`, to be multiplied by 2^exponent"""
    exponent: Tensor
    """[k, B] float64"""


def backwards(tr: engine.Trace, K: int, entering: Entering) -> Iterator[Step]:
    """K errors from the last step read to the first.

    δh_t = (what enters) + (what step t + 1 hands back); the cell's adjoint makes the rest.
    """
    B = tr.x.shape[1]
    later = [tr.x.new_zeros(K, B, s.shape[-1]) for s in tr.final]
    exponent = torch.full((K, B), EMPTY, dtype=torch.float64, device=tr.x.device)
    begun: slice | None = None
    for t in reversed(list(reading_order(tr))):
        new = entering(t)
        if new is not None:
            _enter(later, exponent, new, tr, t)
            begun = new.place if begun is None else hull(begun, new.place)
        if begun is None:
            continue
        step = tr.cell.adjoint(tuple(v[begun] for v in later), saved_at(tr, t), tr.weights)
        back = step.previous
        if tr.active is not None:
            # Steps without input lie at one end, where a row has not entered yet or has done all its work: nothing
            # has to be held over them.
            on = tr.active[t]
            state = tuple(torch.where(on, v, 0.0) for v in step.state)
            step = Adjoint(state, torch.where(on, step.da, 0.0), torch.where(on, step.da_hh, 0.0), back)
        yield Step(t, begun, step, exponent[begun].clone())
        shift, exponent[begun] = renormalisation(back, exponent[begun])
        for v, b in zip(later, back, strict=True):
            v[begun] = times_power_of_two(b, -shift)


def _enter(later: list[Tensor], exponent: Tensor, new: Some, tr: engine.Trace, t: int) -> None:
    """later, exponent += new, in place; nothing enters where a sample is inactive."""
    here, rows = new.place, masked(new.rows, tr, t)
    top = torch.maximum(exponent[here], rows.exponent)
    for part in later:
        part[here] = Rows(part[here], exponent[here]).scaled_to(top)
    later[0][here] += rows.scaled_to(top)
    exponent[here] = top


def masked(rows: Rows, tr: engine.Trace, t: int) -> Rows:
    """rows `[k, B, n]`, zero where a sample is inactive."""
    if tr.active is None:
        return rows
    on = tr.active[t]
    return Rows(torch.where(on, rows.v, 0.0), torch.where(on.squeeze(-1), rows.exponent, EMPTY))


def arriving_at(stack: Stack, place: int, K: int, error: Entering) -> Entering:
    """What reaches the output of the layer at `place` when `error` `[k, B, D·R]` is made at the last layer's output.

    Below the last layer all rows of all steps are held: memory `[T, K, B, D·R]`.
    """
    D, T = stack.directions, stack.inputs.x.shape[0]
    arriving = error
    for first in range(len(stack.layers) - D, -1, -D):
        if first <= place < first + D:
            return _direction(arriving, stack, place, first)
        below: list[Some | None] = [None] * T
        for p in range(first, first + D):
            tr = stack.traces[p]
            for step in backwards(tr, K, _direction(arriving, stack, p, first)):
                dx = Some(step.place, Rows(step.adjoint.da @ tr.weights.w_ih, step.exponent).normalised())
                below[step.t] = _sum(below[step.t], dx)
        arriving = below.__getitem__
    raise AssertionError("the place is one of the layers")


def _direction(arriving: Entering, stack: Stack, p: int, first: int) -> Entering:
    """The part of the features that the direction at p puts out."""
    if stack.directions == 1:
        return arriving
    width = stack.traces[p].y.shape[-1]
    part = slice((p - first) * width, (p - first + 1) * width)

    def entering(t: int) -> Some | None:
        some = arriving(t)
        return None if some is None else Some(some.place, Rows(some.rows.v[..., part], some.rows.exponent).normalised())

    return entering


def _sum(a: Some | None, b: Some) -> Some:
    if a is None:
        return b
    if a.place == b.place:
        return Some(a.place, (a.rows + b.rows).normalised())
    place = hull(a.place, b.place)
    total: Rows | None = None
    for some in (a, b):
        shape = (place.stop - place.start, *some.rows.v.shape[1:])
        wide = Rows(some.rows.v.new_zeros(shape), some.rows.exponent.new_full(shape[:-1], EMPTY))
        inside = slice(some.place.start - place.start, some.place.stop - place.start)
        wide.v[inside], wide.exponent[inside] = some.rows.v, some.rows.exponent
        total = wide if total is None else total + wide
    assert total is not None
    return Some(place, total.normalised())


def hull(a: slice, b: slice) -> slice:
    """The smallest contiguous part that holds both."""
    return slice(min(a.start, b.start), max(a.stop, b.stop))


def made_at(steps: list[int], error: Tensor) -> Entering:
    """error `[K, B, n]`, its k-th made at steps[k]."""
    number, rows = {t: k for k, t in enumerate(steps)}, Rows.of(error)

    def entering(t: int) -> Some | None:
        k = number.get(t)
        return None if k is None else Some(slice(k, k + 1), Rows(rows.v[k : k + 1], rows.exponent[k : k + 1]))

    return entering


def log_norms_directly(tr: engine.Trace, K: int, entering: Entering, state: int) -> Tensor:
    """ln‖δs_t‖ of each error at every step, `[K, T, B]` float64, by the cell's adjoint; −inf where none arrives."""
    T, B = tr.x.shape[:2]
    out = torch.full((K, T, B), -torch.inf, dtype=torch.float64, device=tr.x.device)
    for step in backwards(tr, K, entering):
        out[step.place, step.t] = log_norms(step.adjoint.state[state], step.exponent)
    return out


class ScaledFlow(NamedTuple):
    """δ of one layer at every step, `[T, B, ...]`, each to be multiplied by 2^exponent of its step and sample."""

    flow: engine.Flow
    exponent: Tensor
    """[T, B] float64"""


def flow_at(stack: Stack, place: int, error: Tensor) -> ScaledFlow:
    """δ of the layer at `place` under an error `[T, B, D·R]` at the last layer's output, samples in the user's order.

    Raises:
        ValueError: the error does not fit.
    """
    dy, tr = checked_error(stack, error), stack.traces[place]
    T, B = tr.x.shape[:2]
    rows = Rows.of(dy.unsqueeze(1))
    reached = dy.flatten(1).any(1).tolist()

    def entering(t: int) -> Some | None:
        return Some(slice(0, 1), Rows(rows.v[t], rows.exponent[t])) if reached[t] else None

    gates = tr.weights.w_hh.shape[0]
    state = tuple(s.new_zeros(T, B, s.shape[-1]) for s in tr.final)
    da, da_hh = tr.x.new_zeros(2, T, B, gates).unbind()
    exponent = rows.exponent.new_full((T, B), EMPTY)
    for step in backwards(tr, 1, arriving_at(stack, place, 1, entering)):
        made = (*step.adjoint.state, step.adjoint.da, step.adjoint.da_hh)
        for whole, part in zip((*state, da, da_hh), made, strict=True):
            whole[step.t] = part[0]
        exponent[step.t] = step.exponent[0]
    return ScaledFlow(engine.Flow(state, da, da_hh, ()), exponent)


def checked_error(stack: Stack, error: Tensor) -> Tensor:
    """error in internal order.

    Raises:
        ValueError: it is not `[T, B, D·R]`, or not of the layer's dtype.
    """
    T, B = stack.inputs.x.shape[:2]
    y = stack.traces[-1].y
    expected = (T, B, stack.directions * y.shape[-1])
    if error.shape != expected:
        raise ValueError(f"error: expected [T, B, D·R] = {expected}, got {tuple(error.shape)}")
    if error.dtype != y.dtype:
        raise ValueError(f"error: expected the layer's dtype {y.dtype}, got {error.dtype}")
    return stack.inputs.in_internal_order(error.detach(), 1)
