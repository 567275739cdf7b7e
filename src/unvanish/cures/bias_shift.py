"""The separable problem inside `rescue_`: minimise Σ_u β_u² subject to Σ_u s_u(β_u) = H τ².

    s_u(β) = mean_b exp(2 L),  L = r Σ_t ln σ(a_{t,b,u} + β)

is the fraction of a gradient's square that unit u keeps over the lag: nearly a step from 0 to 1 in β. So the
constraint is not convex:
each unit is either *open*, on the upper branch of β = μ s'(β), or *shut*, on the lower one near β = 0. Opening a unit
costs about min_β ½β² / (s(β) − s(0)); units are opened in the order of this price, the best number of them is found
by solving for each, and Newton's method on (β, μ) makes the optimum exact.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

GRID = 96
"""points of β in the table of each unit's s"""


class _Table(NamedTuple):
    """s and its slope on a grid of β, `[GRID, H]` each."""

    beta: Tensor
    s: Tensor
    slope: Tensor


def minimum_norm_shift(a: Tensor, repeat: float, target: float, near: Tensor | None = None) -> Tensor:
    """β `[H]` ≥ 0 of the smallest 2-norm with mean_u s_u(β_u) = target².

    Args:
        a: `[n, B, H]` pre-activations, float64.
        repeat: r, how often each of the n steps counts.
        target: τ in (0, 1), above the survival at β = 0.
        near: a solution of a slightly different problem, from which Newton's method may start; None: search.
    """
    wanted = a.shape[-1] * target**2
    if near is not None:
        found = _newton(a, repeat, wanted, near)
        if found is not None:
            return found
    start = _search(_table(a, repeat, target), wanted)
    found = _newton(a, repeat, wanted, start)
    # Newton fails only where two branches meet; the table's own answer, driven to the target, is then the best known.
    return _to_target(a, repeat, wanted, start) if found is None else found


def kept(a: Tensor, repeat: float, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(s, s', s'') `[H]` at β `[H]`."""
    v = a + beta
    log_square = 2 * repeat * logsigmoid(v).sum(0)
    f = v.sigmoid()
    first = 2 * repeat * (1 - f).sum(0)
    second = -2 * repeat * (f * (1 - f)).sum(0)
    s = log_square.exp()
    return s.mean(0), (first * s).mean(0), ((first**2 + second) * s).mean(0)


def _table(a: Tensor, repeat: float, target: float) -> _Table:
    # There every ln f is above (τ − 1) / (1000 · steps): the unit keeps practically everything.
    steps = repeat * a.shape[0]
    highest = (math.log(1000 * steps / (1 - target)) - a.amin((0, 1))).clamp_min(1.0)
    beta = torch.linspace(0, 1, GRID, dtype=a.dtype, device=a.device)[:, None] * highest
    rows = [kept(a, repeat, b) for b in beta]
    return _Table(beta, torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))


def _search(table: _Table, wanted: float) -> Tensor:
    """The best β on the table: how many units to open, and how far."""
    beta, s, _ = table
    gain = (s - s[0]).clamp_min(1e-300)
    price = (0.5 * beta[1:] ** 2 / gain[1:]).amin(0)
    order = price.argsort()
    ceiling, floor = s[-1, order].cumsum(0), s[0, order]
    reachable = ceiling + (floor.sum() - floor.cumsum(0))
    first = int((reachable < wanted).sum()) + 1
    best, best_norm, worse = beta[-1], math.inf, 0
    for number in range(first, len(order) + 1):
        open_ = torch.zeros(len(order), dtype=torch.bool, device=beta.device)
        open_[order[:number]] = True
        found = _with_open(table, open_, wanted)
        norm = float(found.norm())
        if norm < best_norm:
            best, best_norm, worse = found, norm, 0
        else:
            worse += 1
        if worse > 3 + number // 8:
            break
    return best


def _with_open(table: _Table, open_: Tensor, wanted: float) -> Tensor:
    """β on the upper branch of β = μ s'(β) for the open units, 0 for the others, with the least μ that suffices."""
    beta, s, slope = table
    # ln(β/s') falls to the fold and rises after it; the upper branch is made monotone, so that its inverse is a search.
    price = beta.clamp_min(1e-12).log() - slope.clamp_min(1e-300).log()
    fold = price[1:].argmin(0) + 1
    index = torch.arange(GRID, device=beta.device)[:, None]
    upper = torch.where(index >= fold, price, -math.inf).cummax(0).values
    low, high = price.new_tensor(-700.0), price.new_tensor(700.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        at = torch.where(open_, (upper <= middle).sum(0).clamp(max=GRID - 1).maximum(fold), 0)
        total = s.gather(0, at[None]).sum()
        low, high = (middle, high) if total < wanted else (low, middle)
    at = torch.where(open_, (upper <= high).sum(0).clamp(max=GRID - 1).maximum(fold), 0)
    return beta.gather(0, at[None])[0]


def _newton(a: Tensor, repeat: float, wanted: float, beta: Tensor) -> Tensor | None:
    """The stationary point β = μ s'(β), Σ s = wanted near β; None if there is none with a minimum's curvature."""
    s, first, second = kept(a, repeat, beta)
    mu = (beta @ first) / (first @ first)
    for _ in range(60):
        residual, lacking = beta - mu * first, wanted - s.sum()
        curvature = 1 - mu * second
        if not bool((curvature > 0).all()) or not bool(first.isfinite().all()):
            return None
        size = float(beta.norm())
        if float(residual.norm()) < 1e-10 * size and abs(float(lacking)) < 1e-10 * wanted:
            return beta if bool((beta >= 0).all()) else None
        # (1 − μ s'') dβ − s' dμ = −residual,  s'ᵀ dβ = lacking
        by = first / curvature
        dmu = (lacking + by @ residual) / (by @ first)
        step = (dmu * first - residual) / curvature
        # A gate's survival changes by a factor within a few tenths of β, so steps must not be longer than that.
        shrink = min(1.0, 0.5 / max(float(step.abs().max()), 1e-300))
        beta, mu = beta + shrink * step, mu + shrink * dmu
        s, first, second = kept(a, repeat, beta)
    return None


def _to_target(a: Tensor, repeat: float, wanted: float, beta: Tensor) -> Tensor:
    """β scaled by one factor so that Σ s = wanted."""
    low, high = 0.0, 1.0
    while float(kept(a, repeat, high * beta)[0].sum()) < wanted:
        high *= 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(kept(a, repeat, middle * beta)[0].sum()) < wanted else (low, middle)
    return high * beta
