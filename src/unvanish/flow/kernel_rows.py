"""Errors propagated back over many steps by the kernels; torch operations (`unvanish.flow.scaled_rows`) handle
everything else.

*A few errors* go back through the kernels of the backward pass, a stretch of steps at a time. Within a stretch the rows
are plain numbers; between two stretches they are rescaled to about 1, and their exponents are updated. A stretch over
which a row leaves the middle of the range is repeated at half the length.

*Many errors* go back through a kernel of their own, one step after the other; it rescales a row where that leaves the
middle of the range.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import Partials, State, calculus
from unvanish.flow.exponents import EMPTY, Rows, log_norms, renormalisation, times_power_of_two
from unvanish.flow.scaled_rows import BLOCK_ELEMENTS, Some

LONGEST = 256
"""steps of a stretch"""
FEW = 16
"""the most errors that go back one after the other, each in a pass of its own"""
MANY = 32
"""the number of errors from which they go back together, by a kernel of their own or one matrix per step and sample"""
MARGIN = {torch.float32: 2.0**-60, torch.float64: 2.0**-400}
"""A row whose norm has shrunk by this factor may have lost components unnoticed."""
SMALLEST = {dtype: torch.finfo(dtype).tiny / torch.finfo(dtype).eps for dtype in MARGIN}
"""Below it a number may have lost digits."""


def few(tr: engine.Trace, K: int) -> bool:
    """Whether the kernels can propagate K errors back through this trace, one after the other."""
    return tr.native is not None and tr.active is None and K <= FEW


def many(tr: engine.Trace, K: int) -> bool:
    """Whether the kernels can propagate K errors back through this trace, all at once."""
    return tr.native is not None and tr.weights.w_hr is None and K >= MANY


def log_norms_of_many(tr: engine.Trace, sources: list[int], error: Tensor, state: int) -> Tensor:
    """ln‖δs_t‖ `[K, T, B]` of `error` `[K, B, H]` at the output of steps `sources`, each alone; −inf where it does not
    arrive."""
    T, B, H = tr.y.shape
    if tr.active is not None:
        error = torch.where(tr.active[sources], error, 0.0)
    enters = Rows.of(error.transpose(0, 1))
    rows = torch.nn.functional.pad(enters.v, (0, (len(tr.final) - 1) * H)).contiguous()
    exponents, at = enters.exponent.contiguous(), torch.tensor(sources)
    found = torch.full((T, B, len(sources)), -torch.inf, dtype=torch.float64)
    h, c = tr.cell.states[0], tr.cell.states[-1]
    for steps, d, matrices, scale in _matrices(tr):
        made, carried = (None if c == h else v[key, c].contiguous() for v, key in ((d.made, h), (d.s, c)))
        engine.propagate(tr, steps, matrices, scale, made, carried, at, rows, exponents, found, state)
    found = found.permute(2, 0, 1)
    return found if tr.active is None else torch.where(tr.active.squeeze(-1), found, -torch.inf)


def _matrices(tr: engine.Trace) -> Iterator[tuple[slice, Partials, Tensor, Tensor | None]]:
    """(steps, their derivatives, matrices, scale) of stretches of steps, from the last one read, as `engine.propagate`
    takes them: one matrix per step and sample, or that of a single gate for all steps, scaled."""
    T, B, H = tr.y.shape
    if len(tr.cell.gates) == 1:
        assert tr.weights.w_hh is not None
        d = tr.partials
        yield slice(0, T), d, tr.weights.w_hh.contiguous(), d.q[tr.cell.states[0], tr.cell.gates[0]].contiguous()
        return
    states = len(tr.final)
    block = max(1, BLOCK_ELEMENTS // (B * H * H * states))
    memory = tr.x.new_empty(block, B, states, H, H)
    views = {(a, tr.cell.states[0]): memory[:, :, i] for i, a in enumerate(tr.cell.states)}
    for end in range(T, 0, -block):
        begin = max(0, end - block)
        steps = _steps(tr, begin, end)
        d = tr.partials.at(steps)
        calculus.matrices(tr.cell, d, tr.weights, views)
        yield steps, d, memory[: end - begin].flatten(2, 3), None


def _steps(tr: engine.Trace, begin: int, end: int) -> slice:
    """The steps whose places in reading order are [begin, end)."""
    T = tr.x.shape[0]
    return slice(T - end, T - begin) if tr.reverse else slice(begin, end)


def log_norms_of_one(tr: engine.Trace, source: int, enters: Some | None, state: int) -> Tensor:
    """ln‖δs_t‖ `[T, B]` of one error, which enters at the output of step `source`; −inf where it does not arrive."""
    T, B = tr.x.shape[:2]
    found = torch.full((T, B), -torch.inf, dtype=torch.float64)
    if enters is None:
        return found
    v, exponent = enters.rows.v[:, 0], enters.rows.exponent[:, 0]
    rows: State = (v, *(v.new_zeros(B, s.shape[-1]) for s in tr.final[1:]))
    # [begin, end) is the next stretch, in reading order.
    end, length = (T - source if tr.reverse else source + 1), LONGEST
    while end > 0:
        begin = max(0, end - length)
        steps = _steps(tr, begin, end)
        deltas, handed = engine.adjoint_of_steps(tr, steps, rows)
        if end - begin > 1 and not _in_range(deltas, handed, exponent > EMPTY, state):
            length = (end - begin) // 2
            continue
        found[steps] = log_norms(deltas[state], exponent.expand(end - begin, B))
        shift, exponent = renormalisation(handed, exponent)
        rows = tuple(times_power_of_two(v, -shift) for v in handed)
        end, length = begin, min(LONGEST, 2 * length)
    return found


def _in_range(deltas: State, handed: State, there: Tensor, state: int) -> bool:
    """Whether every row that is not zero from the start stays well inside its range, and so does the state measured,
    which may be far smaller than the others."""
    sizes = [v.abs().amax(-1) for v in deltas]
    largest = torch.stack([size.amin(0) for size in sizes]).amax(0)
    ends = torch.stack([v.abs().amax(-1) for v in handed]).amax(0)
    margin = MARGIN[ends.dtype]
    least = torch.minimum(largest, ends)[there]
    most = torch.stack([size.amax() for size in (*sizes, ends)]).amax()
    faint = (sizes[state] > 0) & (sizes[state] < SMALLEST[ends.dtype])
    return bool((least > margin).all()) and bool(most < 1 / margin) and not bool(faint.any())
