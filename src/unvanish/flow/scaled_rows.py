"""The backward pass of all measurements: many errors propagated back through a layer at once, over any range of sizes.

Each of `K` errors is a row per sample, `[B, K, n]` for a state of width n. Rows are kept near 1 by exact powers of two
and carry their exponent along, so that they stay right where the numbers themselves have left the range of floating
point. The adjoint map, the decomposition, the subgradients of separate sources, the textbook product and survival all
read this pass.

A layer's `clip` and `h_detach` have no effect here: these are derivatives of what the layer computes, whatever gradient
its backward pass returns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import Partials, State, calculus
from unvanish.flow.exponents import EMPTY, Rows, log_norms, renormalisation, times_power_of_two
from unvanish.flow.stack import reading_order


class Some(NamedTuple):
    """A contiguous part of the K errors."""

    place: slice
    rows: Rows
    """[B, k, n]"""
    state: int = 0
    """the state at which they enter, by its number; 0 is the layer's output"""


Entering = Callable[[int], Some | None]
"""step → the gradient at a layer's output h_t there, without the part from its own later steps"""

Change = Callable[[Partials, State], State]
"""(the step's derivatives, the gradients that arrived at its states) → the gradients to propagate instead"""


@dataclass
class Step:
    """One step back of the errors that have entered so far; everything is 0 where a sample is inactive."""

    t: int
    place: slice
    """which of the K errors"""
    state: State
    """δs_t, the total derivative per state, `[B, k, n]`, to be multiplied by 2^exponent"""
    exponent: Tensor
    """[B, k] float64"""
    adjoint: calculus.Adjoint
    """δ of the gates and the gradient passed to the step before, `[B, k, ·]`"""


def backwards(tr: engine.Trace, K: int, entering: Entering, change: Change | None = None) -> Iterator[Step]:
    """The steps of a layer from the last one read to the first, for K errors that enter on the way."""
    T, B = tr.x.shape[:2]
    rows = tuple(tr.x.new_zeros(B, K, s.shape[-1]) for s in tr.final)
    exponent = torch.full((B, K), EMPTY, dtype=torch.float64, device=tr.x.device)
    begun: slice | None = None
    partials = per_row(tr.partials).steps(T)
    for t in reversed(list(reading_order(tr))):
        new = entering(t)
        if new is not None:
            begun = enter(rows, exponent, new, begun, tr, t)
        if begun is None:
            continue
        here = tuple(v[:, begun] for v in rows)
        if change is not None:
            here = change(partials[t], here)
        adjoint = calculus.adjoint(tr.cell, partials[t], here, tr.weights)
        shown = adjoint
        if tr.active is not None:
            # Steps without input are at one end, where a row has not entered yet or is finished: nothing has to be
            # kept across them.
            shown = _present(adjoint, tr.active[t].unsqueeze(1))
        yield Step(t, begun, shown.state, exponent[:, begun].clone(), shown)
        for v, b in zip(rows, adjoint.previous, strict=True):
            v[:, begun] = b
        exponent[:, begun] = scale(tuple(v[:, begun] for v in rows), exponent[:, begun])


def per_row(d: Partials) -> Partials:
    """`[..., B, H]` as `[..., B, 1, H]`, for all rows of a sample."""
    return d.map(lambda v: v.unsqueeze(-2))


def _present(adjoint: calculus.Adjoint, on: Tensor) -> calculus.Adjoint:
    state, da = tuple(torch.where(on, v, 0.0) for v in adjoint.state), torch.where(on, adjoint.da, 0.0)
    if adjoint.da_hh is adjoint.da:
        return calculus.Adjoint(state, da, da, adjoint.previous)
    da_hh = None if adjoint.da_hh is None else torch.where(on, adjoint.da_hh, 0.0)
    return calculus.Adjoint(state, da, da_hh, adjoint.previous)


def scale(rows: State, exponent: Tensor) -> Tensor:
    """Rescale rows to about 1, in place; returns their exponents."""
    shift, exponent = renormalisation(rows, exponent)
    for v in rows:
        v.copy_(times_power_of_two(v, -shift))
    return exponent


def enter(rows: State, exponent: Tensor, new: Some, begun: slice | None, tr: engine.Trace, t: int) -> slice:
    """rows, exponent += new, in place; nothing enters where a sample is inactive. Returns which errors have begun."""
    here, added = new.place, masked(new.rows, tr, t)
    if begun is None or here.stop <= begun.start or here.start >= begun.stop:
        rows[new.state][:, here], exponent[:, here] = added.v, added.exponent
    else:
        top = torch.maximum(exponent[:, here], added.exponent)
        for v in rows:
            v[:, here] = Rows(v[:, here], exponent[:, here]).scaled_to(top)
        rows[new.state][:, here] += added.scaled_to(top)
        exponent[:, here] = top
    return here if begun is None else hull(begun, here)


def masked(rows: Rows, tr: engine.Trace, t: int) -> Rows:
    """rows `[B, k, n]`, zero where a sample is inactive."""
    if tr.active is None:
        return rows
    on = tr.active[t]
    return Rows(torch.where(on.unsqueeze(-1), rows.v, 0.0), torch.where(on, rows.exponent, EMPTY))


def hull(a: slice, b: slice) -> slice:
    """The smallest contiguous part that holds both."""
    return slice(min(a.start, b.start), max(a.stop, b.stop))


def made_at(steps: list[int], error: Tensor) -> Entering:
    """The sources of error `[K, B, n]`, the k-th at steps[k]."""
    number, rows = {t: k for k, t in enumerate(steps)}, Rows.of(error.transpose(0, 1))

    def entering(t: int) -> Some | None:
        k = number.get(t)
        return None if k is None else Some(slice(k, k + 1), Rows(rows.v[:, k : k + 1], rows.exponent[:, k : k + 1]))

    return entering


def log_norms_of(tr: engine.Trace, K: int, entering: Entering, state: int) -> Tensor:
    """ln‖δs_t‖ of each error at every step, `[K, T, B]` float64; −inf where none arrives."""
    T, B = tr.x.shape[:2]
    found = torch.full((T, B, K), -torch.inf, dtype=torch.float64, device=tr.x.device)
    for step in backwards(tr, K, entering):
        found[step.t, :, step.place] = log_norms(step.state[state], step.exponent)
    return found.permute(2, 0, 1)
