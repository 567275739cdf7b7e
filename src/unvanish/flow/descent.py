"""The descent through a stacked module: from a gradient at the last layer's output to the one at a lower layer."""

from typing import NamedTuple

from torch import Tensor

from unvanish import engine
from unvanish.flow.exponents import EMPTY, Rows
from unvanish.flow.scaled_rows import Entering, Some, backwards, hull
from unvanish.flow.stack import Stack

HELD_ELEMENTS = 2**26
"""The most numbers in the rows that a stacked module passes from layer to layer; more errors take several rounds."""


def arriving_at(stack: Stack, place: int, K: int, error: Entering) -> Entering:
    """The gradient at the output of the layer at `place` for an `error` `[B, k, D·R]` at the last layer's output.

    Below the last layer all rows of all steps are kept: memory `[T, B, K, D·R]`.
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
                assert step.adjoint is not None
                dx = Some(step.place, Rows(step.adjoint.da @ tr.weights.w_ih, step.exponent).normalised())
                below[step.t] = _sum(below[step.t], dx)
        arriving = below.__getitem__
    raise AssertionError("the place is one of the layers")


def _direction(arriving: Entering, stack: Stack, p: int, first: int) -> Entering:
    """The part of the features that the direction at p outputs."""
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
        B, _, n = some.rows.v.shape
        k = place.stop - place.start
        wide = Rows(some.rows.v.new_zeros(B, k, n), some.rows.exponent.new_full((B, k), EMPTY))
        inside = slice(some.place.start - place.start, some.place.stop - place.start)
        wide.v[:, inside], wide.exponent[:, inside] = some.rows.v, some.rows.exponent
        total = wide if total is None else total + wide
    assert total is not None
    return Some(place, total.normalised())


class ScaledFlow(NamedTuple):
    """δ of one layer at every step, `[T, B, ...]`, each to be multiplied by 2^exponent of its step and sample."""

    deltas: engine.Deltas
    exponent: Tensor
    """[T, B] float64"""


def flow_at(stack: Stack, place: int, error: Tensor) -> ScaledFlow:
    """δ of the layer at `place` under an error `[T, B, D·R]` at the last layer's output, samples in the user's order.

    Raises:
        ValueError: the error does not fit.
    """
    dy, tr = checked_error(stack, error), stack.traces[place]
    T, B = tr.x.shape[:2]
    rows = Rows.of(dy.unsqueeze(2))
    reached = dy.flatten(1).any(1).tolist()

    def entering(t: int) -> Some | None:
        return Some(slice(0, 1), Rows(rows.v[t], rows.exponent[t])) if reached[t] else None

    state = tuple(s.new_zeros(T, B, s.shape[-1]) for s in tr.final)
    da = tr.x.new_zeros(T, B, tr.weights.w_ih.shape[0])
    da_hh = None if tr.weights.w_hh is None else tr.x.new_zeros(T, B, tr.weights.w_hh.shape[0])
    exponent = rows.exponent.new_full((T, B), EMPTY)
    for step in backwards(tr, 1, arriving_at(stack, place, 1, entering)):
        assert step.adjoint is not None
        for whole, part in zip(state, step.state, strict=True):
            whole[step.t] = part[:, 0]
        da[step.t] = step.adjoint.da[:, 0]
        if da_hh is not None and step.adjoint.da_hh is not None:
            da_hh[step.t] = step.adjoint.da_hh[:, 0]
        exponent[step.t] = step.exponent[:, 0]
    return ScaledFlow(engine.Deltas(state, da, da_hh, ()), exponent)


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
