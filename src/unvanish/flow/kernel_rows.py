"""A few gradients propagated back over many steps by the kernels, a stretch of steps at a time.

Within a stretch the rows are plain numbers; between two stretches they are rescaled to about 1, and their exponents are
updated. A stretch over which a row leaves the middle of the range is repeated at half the length. For a few samples,
steps cost a tenth of those in torch operations (`unvanish.flow.scaled_rows`), which handle everything else.
"""

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import State
from unvanish.flow.exponents import EMPTY, log_norms, renormalisation, times_power_of_two
from unvanish.flow.scaled_rows import Some

LONGEST = 256
"""steps of a stretch"""
FEW = 16
"""the most errors for which the kernels are used: each one is a separate pass"""
MARGIN = {torch.float32: 2.0**-60, torch.float64: 2.0**-400}
"""A row whose norm has shrunk by this factor may have lost components unnoticed."""


def able(tr: engine.Trace, K: int) -> bool:
    """Whether the kernels can propagate K errors back through this trace."""
    return tr.native is not None and tr.active is None and K <= FEW


def log_norms_of_one(tr: engine.Trace, source: int, enters: Some | None, state: int) -> Tensor:
    """ln‖δs_t‖ `[T, B]` of one error, which enters at the output of step `source`; −inf where it does not arrive."""
    T, B = tr.x.shape[:2]
    found = torch.full((T, B), -torch.inf, dtype=torch.float64)
    if enters is None:
        return found
    v, exponent = enters.rows.v[:, 0], enters.rows.exponent[:, 0]
    rows: State = (v, *(v.new_zeros(B, s.shape[-1]) for s in tr.final[1:]))
    # Steps by their place in reading order: [begin, end) is the next stretch.
    end, length = (T - source if tr.reverse else source + 1), LONGEST
    while end > 0:
        begin = max(0, end - length)
        steps = slice(T - end, T - begin) if tr.reverse else slice(begin, end)
        deltas, handed = engine.adjoint_of_steps(tr, steps, rows)
        if end - begin > 1 and not _in_range(deltas, handed, exponent > EMPTY):
            length = (end - begin) // 2
            continue
        found[steps] = log_norms(deltas[state], exponent.expand(end - begin, B))
        shift, exponent = renormalisation(handed, exponent)
        rows = tuple(times_power_of_two(v, -shift) for v in handed)
        end, length = begin, min(LONGEST, 2 * length)
    return found


def _in_range(deltas: State, handed: State, there: Tensor) -> bool:
    """Whether every row that is not zero from the start stays well inside its range."""
    largest = torch.stack([v.abs().amax(-1).amin(0) for v in deltas]).amax(0)
    ends = torch.stack([v.abs().amax(-1) for v in handed]).amax(0)
    margin = MARGIN[ends.dtype]
    least = torch.minimum(largest, ends)[there]
    most = torch.stack([v.abs().amax() for v in (*deltas, *handed)]).amax()
    return bool((least > margin).all()) and bool(most < 1 / margin)
