"""The norms of many errors propagated back at once, each sample's step formed as one matrix per pair of states,

    M_ab = diag(C_ab) + Σ_{γ: src γ = b} diag(K_aγ) W_γ            (the symbols of `unvanish.cells.calculus`)

which all rows of the sample share: a row then costs H² per pair and no elementwise work on G·H gates. Whatever is not
a product is done for a stretch of steps at once. Within a stretch the rows are plain numbers; if one of them leaves the
middle of the range, the stretch is repeated at half the length.
"""

import math
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import Cell, Partials, State, calculus
from unvanish.flow.exponents import EMPTY, log_norms
from unvanish.flow.scaled_rows import Entering, Some, enter, hull, per_row, scale
from unvanish.flow.stack import reading_order

MATRIX_ELEMENTS, LAUNCHED_MATRIX_ELEMENTS = 2**19, 2**24
"""The most numbers in the matrices formed at a time: on the CPU few enough to stay in the cache; elsewhere many, since
each block of steps waits for the device."""

ROW_ELEMENTS, LAUNCHED_ROW_ELEMENTS = 2**20, 2**24
"""The most numbers in the rows of a state over a stretch, if it is longer than a step; the same of other devices."""

STRETCH = 8
"""The most steps of a stretch, and of those between which rows are brought back near 1."""

TAME = 2.0**20
"""Rows whose norm is between 1/TAME and TAME are so far from float32's limits that no sane step reaches them."""


class _Arriving(NamedTuple):
    """The gradient at the states of a step, without its own error."""

    place: slice
    """which of the K errors"""
    state: State
    """`[B, k, n]` each, to be multiplied by 2^exponent"""
    exponent: Tensor
    """`[B, k]` float64"""
    age: int
    """steps since the rows were near 1"""


def log_norms_of_many(tr: engine.Trace, K: int, entering: Entering, state: int) -> Tensor:
    """ln‖δs_t‖ of each error at every step, `[K, T, B]` float64; −inf where none arrives."""
    T, B = tr.x.shape[:2]
    found = torch.full((T, B, K), -torch.inf, dtype=torch.float64, device=tr.x.device)
    most = ROW_ELEMENTS if tr.x.is_cpu else LAUNCHED_ROW_ELEMENTS
    length = max(1, min(STRETCH, most // (B * K * tr.y.shape[-1])))
    memory = tuple(s.new_empty(length * B * K * s.shape[-1]) for s in tr.final)
    arriving = None
    for matrices in _matrices(tr):
        left = matrices.order
        while left:
            steps = left[:length]
            entries = [entering(t) for t in steps]
            if arriving is None:
                if entries[0] is None:
                    left = left[1:]
                    continue
                arriving = _nothing(tr, entries[0].place)
            passed = _stretch(tr, matrices, steps, entries, arriving, memory, state)
            if passed is None:
                length = len(steps) // 2
                continue
            norms, arriving = passed
            found[steps, :, arriving.place] = norms
            left = left[len(steps) :]
    found = found.permute(2, 0, 1)
    return found if tr.active is None else torch.where(tr.active.squeeze(-1), found, -torch.inf)


def _nothing(tr: engine.Trace, place: slice) -> _Arriving:
    B, k = tr.x.shape[1], place.stop - place.start
    exponent = torch.full((B, k), EMPTY, dtype=torch.float64, device=tr.x.device)
    return _Arriving(place, tuple(s.new_zeros(B, k, s.shape[-1]) for s in tr.final), exponent, 0)


def _stretch(
    tr: engine.Trace,
    matrices: "_Matrices",
    steps: list[int],
    entries: list[Some | None],
    arriving: _Arriving,
    memory: State,
    state: int,
) -> tuple[Tensor, _Arriving] | None:
    """(ln‖δs_t‖ `[τ, B, k]`, the gradient at the step after); None if a row leaves the range within several steps."""
    everything = _nothing(tr, reduce(hull, (new.place for new in entries if new is not None), arriving.place))
    place, exponent = everything.place, everything.exponent
    begun = _inside(arriving.place, place)
    exponent[:, begun] = arriving.exponent
    rows = [m[: len(steps) * v.numel()].view(-1, *v.shape) for m, v in zip(memory, everything.state, strict=True)]
    for v, empty, known in zip(rows, everything.state, arriving.state, strict=True):
        v[0] = empty
        v[0, :, begun] = known
    exponents = []
    for j, (t, new) in enumerate(zip(steps, entries, strict=True)):
        here = tuple(v[j] for v in rows)
        if new is not None:
            # A new tensor, since earlier steps keep the exponents that they have.
            exponent = exponent.clone()
            begun = enter(here, exponent, new._replace(place=_inside(new.place, place)), begun, tr, t)
        exponents.append(exponent)
        matrices.complete(t, here)
        if j + 1 < len(steps):
            matrices.back(t, here, tuple(v[j + 1] for v in rows))
    last = tuple(v[-1] for v in rows)
    norms, tame = _log_norms(rows[state], torch.stack(exponents))
    if not tame:
        if len(steps) > 1:
            return None
        exponent = scale(last, exponent)
    handed = tuple(torch.empty_like(v) for v in last)
    matrices.back(steps[-1], last, handed)
    age = arriving.age + len(steps) if tame else 1
    if age >= STRETCH:
        exponent, age = scale(handed, exponent), 0
    return norms, _Arriving(place, handed, exponent, age)


def _inside(part: slice, whole: slice) -> slice:
    """`part` counted from where `whole` starts."""
    return slice(part.start - whole.start, part.stop - whole.start)


def _log_norms(v: Tensor, exponent: Tensor) -> tuple[Tensor, bool]:
    """As `log_norms`, and whether the norms of all rows that hold something are tame.

    Tame norms have squares well inside v's own range; float64, which costs several times as much, is for the others.
    """
    norm = torch.linalg.vector_norm(v, dim=-1)
    low, high = torch.stack(torch.where(exponent > EMPTY, norm, 1.0).aminmax()).tolist()
    if low > 1 / TAME and high < TAME:
        return norm.double().log() + exponent * math.log(2), True
    return log_norms(v, exponent), False


class _Matrices(NamedTuple):
    """The matrices of some neighbouring steps, from the last one read to the first."""

    order: list[int]
    partials: Partials
    """`[τ, B, 1, H]` from the earliest of them"""
    matrices: calculus.Diagonals
    """(a, b) → `[τ, B, H, H]`, C_ab on the diagonal; pairs without a matrix are only in partials.s"""
    late: calculus.Diagonals
    """(a, source) → `[τ, B, H, H]` of the gates that read a state of the same step"""
    cell: Cell
    completion: list[str]
    """states from which others of the same step are computed, in the order in which their gradients are complete"""

    def complete(self, t: int, rows: State) -> None:
        """Complete δs_t, in place, for states from which others of the same step are computed."""
        i, number = t - min(self.order), {a: n for n, a in enumerate(self.cell.states)}
        for b in self.completion:
            for (a, of), u in self.partials.made.items():
                if of == b:
                    rows[number[b]].addcmul_(rows[number[a]], u[i])
            for (a, of), m in self.late.items():
                if of == b:
                    rows[number[b]].add_(rows[number[a]] @ m[i])

    def back(self, t: int, rows: State, out: State) -> None:
        """δs_{t−1} from the complete δs_t."""
        i = t - min(self.order)
        for b, into in zip(self.cell.states, out, strict=True):
            empty = True
            for a, row in zip(self.cell.states, rows, strict=True):
                m, c = self.matrices.get((a, b)), self.partials.s.get((a, b))
                if m is not None:
                    torch.bmm(row, m[i], out=into) if empty else into.baddbmm_(row, m[i])
                elif c is not None:
                    torch.mul(row, c[i], out=into) if empty else into.addcmul_(row, c[i])
                empty = empty and m is None and c is None
            if empty:
                into.zero_()


def _matrices(tr: engine.Trace) -> Iterator[_Matrices]:
    """Forms matrices several steps at a time, in memory that the next steps reuse: fresh pages cost as much as the
    arithmetic."""
    order = list(reversed(list(reading_order(tr))))
    B, H = tr.y.shape[1:]
    most = MATRIX_ELEMENTS if tr.x.is_cpu else LAUNCHED_MATRIX_ELEMENTS
    block = max(1, most // (B * H * H * len(tr.final)))
    memory: dict[tuple[str, str], Tensor] = {}
    for first in range(0, len(order), block):
        steps = order[first : first + block]
        d = tr.partials.at(slice(min(steps), max(steps) + 1))
        yield _Matrices(
            steps,
            per_row(d),
            calculus.matrices(tr.cell, d, tr.weights, memory),
            calculus.late_matrices(tr.cell, d, tr.weights),
            tr.cell,
            calculus.backward_order(tr.cell, d.made),
        )
