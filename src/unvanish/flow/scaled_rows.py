"""The backward pass of all measurements: many errors propagated back through a layer at once, over any range of sizes.

Each of `K` errors is a row per sample, `[B, K, n]` for a state of width n. Rows are kept near 1 by exact powers of two
and carry their exponent along, so that they stay right where the numbers themselves have left the range of floating
point. The adjoint map, the decomposition, the subgradients of separate sources, the textbook product and survival all
read this pass.

There are two ways to take a step. *Directly*, by the cell's adjoint: one product of all rows with W_hh, δ of the gates
at hand. *Collapsed*, for many rows: each sample's step formed as one matrix per pair of states,

    M_ab = diag(C_ab) + Σ_{γ: src γ = b} diag(K_aγ) W_γ            (the symbols of `unvanish.cells.calculus`)

which all rows of the sample share; a row then costs H² per pair and no elementwise work on G·H gates.

A layer's `clip` and `h_detach` have no effect here: these are derivatives of what the layer computes, whatever gradient
its backward pass returns.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import Partials, State, calculus
from unvanish.flow.exponents import EMPTY, Rows, log_norms, renormalisation, times_power_of_two
from unvanish.flow.stack import reading_order

BLOCK_ELEMENTS = 2**19
"""The most numbers in the matrices formed at a time: few enough to stay in the cache."""

TAME = 2.0**20
"""Rows whose norm is between 1/TAME and TAME are so far from float32's limits that no sane step reaches them."""

SCALED_EVERY = 8
"""Steps after which collapsed rows are brought back near 1, tame or not."""


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
    adjoint: calculus.Adjoint | None = None
    """δ of the gates and the gradient passed to the step before, `[B, k, ·]`; None with collapsed matrices"""
    tame: bool = False
    """set by a reader that has found all rows within 1/TAME … TAME: they need not be scaled"""


def backwards(
    tr: engine.Trace, K: int, entering: Entering, collapse: bool = False, change: Change | None = None
) -> Iterator[Step]:
    """The steps of a layer from the last one read to the first, for K errors that enter on the way."""
    B = tr.x.shape[1]
    rows = [tr.x.new_zeros(B, K, s.shape[-1]) for s in tr.final]
    spare = [torch.zeros_like(v) for v in rows] if collapse else []
    exponent = torch.full((B, K), EMPTY, dtype=torch.float64, device=tr.x.device)
    begun: slice | None = None
    order = list(reversed(list(reading_order(tr))))
    way = _collapsed(tr, order) if collapse else _direct(tr, order)
    for number, (t, transfer) in enumerate(zip(order, way, strict=True)):
        new = entering(t)
        if new is not None:
            _enter(rows, exponent, new, begun, tr, t)
            begun = new.place if begun is None else hull(begun, new.place)
        if begun is None:
            continue
        here = tuple(v[:, begun] for v in rows)
        if change is not None:
            here = change(transfer.partials, here)
        if collapse:
            assert isinstance(transfer, _Collapsed)
            transfer.complete(here)
            step = Step(t, begun, here, exponent[:, begun])
            yield step
            if not step.tame or number % SCALED_EVERY == 0:
                _scale(here, exponent, begun)
            transfer.back(here, tuple(v[:, begun] for v in spare))
            rows, spare = spare, rows
            continue
        adjoint = calculus.adjoint(tr.cell, transfer.partials, here, tr.weights)
        shown = adjoint
        if tr.active is not None:
            # Steps without input are at one end, where a row has not entered yet or is finished: nothing has to be
            # kept across them.
            shown = _present(adjoint, tr.active[t].unsqueeze(1))
        yield Step(t, begun, shown.state, exponent[:, begun].clone(), shown)
        for v, b in zip(rows, adjoint.previous, strict=True):
            v[:, begun] = b
        _scale(tuple(v[:, begun] for v in rows), exponent, begun)


class _Direct:
    """A step taken by the cell's adjoint."""

    def __init__(self, partials: Partials) -> None:
        self.partials = partials


class _Collapsed:
    """A step taken by one matrix per pair of states."""

    def __init__(self, tr: engine.Trace, many: "_Matrices", i: int) -> None:
        self.tr, self.many, self.i = tr, many, i

    @property
    def partials(self) -> Partials:
        return self.many.partials.at(self.i)

    def complete(self, rows: State) -> None:
        """Complete δs_t, in place, for states from which others of the same step are computed."""
        cell = self.tr.cell
        number = {a: n for n, a in enumerate(cell.states)}
        for b in self.many.order:
            for (a, of), u in self.many.partials.made.items():
                if of == b:
                    rows[number[b]].addcmul_(rows[number[a]], u[self.i])
            for (a, of), m in self.many.late.items():
                if of == b:
                    rows[number[b]].add_(rows[number[a]] @ m[self.i])

    def back(self, rows: State, out: State) -> None:
        """δs_{t−1} from the complete δs_t."""
        for b, into in zip(self.tr.cell.states, out, strict=True):
            empty = True
            for a, row in zip(self.tr.cell.states, rows, strict=True):
                m, c = self.many.matrices.get((a, b)), self.many.partials.s.get((a, b))
                if m is not None:
                    torch.bmm(row, m[self.i], out=into) if empty else into.baddbmm_(row, m[self.i])
                elif c is not None:
                    torch.mul(row, c[self.i], out=into) if empty else into.addcmul_(row, c[self.i])
                empty = empty and m is None and c is None
            if empty:
                into.zero_()


class _Matrices(NamedTuple):
    """Of several steps, `[τ, B, ...]`."""

    partials: Partials
    """`[τ, B, 1, H]`"""
    matrices: calculus.Diagonals
    """(a, b) → `[τ, B, H, H]`, C_ab on the diagonal; pairs without a matrix are only in partials.s"""
    late: calculus.Diagonals
    """(a, source) → `[τ, B, H, H]` of the gates that read a state of the same step"""
    order: list[str]


def _direct(tr: engine.Trace, order: list[int]) -> Iterator[_Direct]:
    steps = _per_row(tr.partials).steps(tr.x.shape[0])
    for t in order:
        yield _Direct(steps[t])


def _collapsed(tr: engine.Trace, order: list[int]) -> Iterator[_Collapsed]:
    """Forms matrices several steps at a time, in memory that the next steps reuse: fresh pages cost as much as the
    arithmetic."""
    B, H = tr.y.shape[1:]
    block = max(1, BLOCK_ELEMENTS // (B * H * H * len(tr.final)))
    memory: dict[tuple[str, str], Tensor] = {}
    for first in range(0, len(order), block):
        steps = order[first : first + block]
        low = min(steps)
        d = tr.partials.at(slice(low, max(steps) + 1))
        many = _Matrices(
            _per_row(d),
            calculus.matrices(tr.cell, d, tr.weights, memory),
            calculus.late_matrices(tr.cell, d, tr.weights),
            calculus.backward_order(tr.cell, d.made),
        )
        for t in steps:
            yield _Collapsed(tr, many, t - low)


def _per_row(d: Partials) -> Partials:
    """`[..., B, H]` as `[..., B, 1, H]`, for all rows of a sample."""
    return d.map(lambda v: v.unsqueeze(-2))


def _present(adjoint: calculus.Adjoint, on: Tensor) -> calculus.Adjoint:
    state, da = tuple(torch.where(on, v, 0.0) for v in adjoint.state), torch.where(on, adjoint.da, 0.0)
    if adjoint.da_hh is adjoint.da:
        return calculus.Adjoint(state, da, da, adjoint.previous)
    da_hh = None if adjoint.da_hh is None else torch.where(on, adjoint.da_hh, 0.0)
    return calculus.Adjoint(state, da, da_hh, adjoint.previous)


def _scale(rows: State, exponent: Tensor, begun: slice) -> None:
    """Rescale rows to about 1, in place."""
    shift, exponent[:, begun] = renormalisation(rows, exponent[:, begun])
    for v in rows:
        v.copy_(times_power_of_two(v, -shift))


def _enter(parts: list[Tensor], exponent: Tensor, new: Some, begun: slice | None, tr: engine.Trace, t: int) -> None:
    """parts, exponent += new, in place; nothing enters where a sample is inactive."""
    here, rows = new.place, masked(new.rows, tr, t)
    if begun is None or here.stop <= begun.start or here.start >= begun.stop:
        for part in parts:
            part[:, here] = 0
        parts[new.state][:, here], exponent[:, here] = rows.v, rows.exponent
        return
    top = torch.maximum(exponent[:, here], rows.exponent)
    for part in parts:
        part[:, here] = Rows(part[:, here], exponent[:, here]).scaled_to(top)
    parts[new.state][:, here] += rows.scaled_to(top)
    exponent[:, here] = top


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


def log_norms_of(tr: engine.Trace, K: int, entering: Entering, state: int, collapse: bool) -> Tensor:
    """ln‖δs_t‖ of each error at every step, `[K, T, B]` float64; −inf where none arrives."""
    T, B = tr.x.shape[:2]
    out = torch.full((T, B, K), -torch.inf, dtype=torch.float64, device=tr.x.device)
    for step in backwards(tr, K, entering, collapse):
        out[step.t, :, step.place], step.tame = _log_norms(step.state[state], step.exponent)
    found = out.permute(2, 0, 1)
    return found if tr.active is None else torch.where(tr.active.squeeze(-1), found, -torch.inf)


def _log_norms(v: Tensor, exponent: Tensor) -> tuple[Tensor, bool]:
    """As `log_norms`, and whether all norms of v are tame.

    Tame norms have squares well inside v's own range; float64, which costs several times as much, is for the others.
    Off the CPU it is for all, since to tell them apart would mean to wait for the device.
    """
    if v.is_cpu:
        norm = torch.linalg.vector_norm(v, dim=-1)
        low, high = norm.aminmax()
        if float(low) > 1 / TAME and float(high) < TAME:
            return norm.double().log() + exponent * math.log(2), True
    return log_norms(v, exponent), False
