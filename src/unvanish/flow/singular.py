"""Singular values of long products of Jacobians, which may lie hundreds of decades apart.

The product P = J_k … J_{j+1} is never formed. An orthonormal block V, a few columns wider than requested, is multiplied
through it and back, re-orthogonalised at every step:

    P V = U R,   Pᵀ U = V' R'

R' is kept as D N, D diagonal in the logarithm and N upper triangular with ones on the diagonal. Values far apart
converge on D within a turn or two. Values close together do not (each turn gains only (σ_{i+1}/σ_i)²): for them R'
itself, cut to those within WINDOW of each other, has an ordinary singular value decomposition.

Source: Benettin et al. 1980 for the triangular products; Rayleigh–Ritz with subspace iteration, Rutishauser 1969.
"""

import warnings
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.engine.precision import full_precision
from unvanish.flow import tangents
from unvanish.flow.stack import reading_order, run_stack
from unvanish.nn.modules import SequenceModule

WINDOW = 1e4
"""Values further apart than this have separated within a few turns."""

MARGIN = 8
"""Columns carried beyond those asked for: the error falls by σ_{n+MARGIN+1}/σ_n squared per turn."""


@torch.no_grad()
@full_precision()
def singular_values(
    layer: SequenceModule,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    j: int,
    k: int,
    lengths: Tensor | Sequence[int] | None = None,
    at: str | None = None,
    n: int = 1,
    iterations: int = 100,
    seed: int = 0,
) -> Tensor:
    """ln σ_i(∂s_k/∂s_j), i = 1 … n, `[B, n]` float64, largest first: by how much the gradient at k can be stretched or
    shrunk until it arrives at j.

    Args:
        layer, x, hx, lengths, at: as in `adjoint_map`.
        j, k: steps; the layer reads j before k. After the end of a sample its state is constant.
        n: number of singular values; NaN for a sample whose states are not finite.
        iterations: maximum number of iterations back and forth; stops once the values change by less than 1e-9
            (float32: 1e-4).
        seed: seed of the first V.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Warns:
        RuntimeWarning: the values still move after the last turn; the message says by how much.
    """
    stack = run_stack(layer, x, hx, lengths)
    tr = stack.traces[stack.index(at)]
    T, B = tr.x.shape[:2]
    order = list(reading_order(tr))
    if not (0 <= j < T and 0 <= k < T and order.index(j) < order.index(k)):
        raise ValueError(f"j, k: expected steps from 0 to {T - 1}, j read before k, got {j} and {k}")
    S = sum(s.shape[-1] for s in tr.final)
    if not isinstance(n, SupportsIndex) or not 1 <= n <= S:
        raise ValueError(f"n: expected 1 to {S}, the size of the state, got {n}")
    if iterations < 1:
        raise ValueError(f"iterations: expected one turn at least, got {iterations}")
    between = order[order.index(j) + 1 : order.index(k) + 1]
    tolerance = 1e-9 if tr.x.dtype == torch.float64 else 1e-4
    width = n + MARGIN if n + MARGIN < S / 2 else S
    v = orthonormal(B, S, width, seed, tr.x)
    logs, moved = torch.full((B, n), torch.nan, dtype=torch.float64), torch.inf
    for _ in range(iterations):
        u, _, _ = _through(tr, between, v, back=False)
        v, d, unit = _through(tr, between[::-1], u, back=True)
        before, logs = logs, _graded_values(d.cpu(), unit.double().cpu(), n)
        same = (logs == before) | (logs.isnan() & before.isnan())
        moved = float(torch.where(same, 0.0, (logs - before).abs()).amax().nan_to_num(torch.inf))
        if moved <= tolerance:
            break
    else:
        warnings.warn(
            f"singular_values: after {iterations} turns the logarithms still move by {moved:.1e} per turn; "
            "raise iterations or n, unless the product has fewer than n values above rounding",
            RuntimeWarning,
            stacklevel=4,
        )
    return stack.inputs.in_user_order(logs, 0)


def _through(tr: engine.Trace, steps: list[int], q: Tensor, back: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, ln D `[B, n]`, N `[B, n, n]`) with J_… J q = Q D N over these steps, or Jᵀ_… with `back`.

    R_t D N = D_t D (D⁻¹ N_t D) N for R_t = D_t N_t: as long as D descends, the entries of D⁻¹ N_t D stay small.
    """
    advance = tangents.transposed if back else tangents.forward
    logs = torch.zeros(q.shape[0], q.shape[-1], dtype=torch.float64, device=q.device)
    unit = torch.eye(q.shape[-1], dtype=torch.float64, device=q.device).expand(*q.shape[:1], -1, -1)
    dead = torch.zeros_like(logs, dtype=torch.bool)
    for t in steps:
        q, r = orthonormalised(advance(tr, t, q))
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        sign = torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)
        q, r = q * sign.unsqueeze(-2), (r * sign.unsqueeze(-1)).double()
        dead |= diagonal == 0
        size = torch.where(diagonal == 0, 1.0, diagonal.abs().double())
        spread = (logs.unsqueeze(-2) - logs.unsqueeze(-1)).clamp(max=80).exp()
        step = (r / size.unsqueeze(-1)) * spread
        step = torch.where(torch.eye(len(step[0]), dtype=torch.bool, device=q.device), 1.0, step.triu())
        unit = step @ unit
        logs = logs + size.log()
    return q, torch.where(dead, -torch.inf, logs), unit


def _graded_values(logs: Tensor, unit: Tensor, n: int) -> Tensor:
    """ln of the n largest singular values of D N, `[B, n]`, each from the block of those within WINDOW of it."""
    logs, order = logs.sort(dim=-1, descending=True)
    found = torch.full((len(logs), n), -torch.inf, dtype=torch.float64)
    for b, (d, place) in enumerate(zip(logs, order, strict=True)):
        near = unit[b][place][:, place]
        for i in range(n):
            if bool(d.isnan().any()):
                found[b] = torch.nan
                break
            if d[i] == -torch.inf:
                break
            inside = ((d - d[i]).abs() < torch.tensor(WINDOW).log()).nonzero().flatten()
            first, last = int(inside[0]), int(inside[-1]) + 1
            block = (d[first:last] - d[i]).exp().unsqueeze(-1) * near[first:last, first:last]
            values = torch.linalg.svdvals(block)
            found[b, i] = values[i - first].log() + d[i]
    return found.sort(dim=-1, descending=True).values


def orthonormalised(v: Tensor) -> tuple[Tensor, Tensor]:
    """v = Q R; LAPACK has no half precision."""
    q, r = torch.linalg.qr(v if v.dtype in (torch.float32, torch.float64) else v.float())
    return q.to(v.dtype), r


def orthonormal(B: int, S: int, n: int, seed: int, like: Tensor) -> Tensor:
    """`[B, S, n]`: random orthonormal columns, the same for every sample."""
    random = torch.randn(S, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(random)[0].to(like).expand(B, S, n)
