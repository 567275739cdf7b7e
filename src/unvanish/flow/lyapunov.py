"""The dynamics of the full state s = h or (h, c) under the real input: Jacobians, Lyapunov spectrum, singular values
of long products."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.flow.stack import full_jacobians, reading_order, run_stack


@dataclass(frozen=True)
class LyapunovHistory:
    """How the exponents converge."""

    exponents: Tensor
    """[n] nats per step, mean over samples, largest first"""
    history: Tensor
    """[T, n] the same estimate after each step read"""
    per_sample: Tensor
    """[B, n]"""


@torch.no_grad()
def jacobian(layer: nn.RNNBase, x: Tensor | PackedSequence, t: int, hx: Any = None, *, at: str | None = None) -> Tensor:
    """∂s_t/∂s_{t−1} `[B, S, S]` of one layer: s = h (S = H), or (h, c) (S = R + H) for the LSTM.

    t counts in input order; for a reversed layer the step read before t is t + 1. Where a sample has no input it is
    the identity.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    stack = run_stack(layer, x, hx)
    tr = stack.traces[stack.index(at)]
    T = tr.x.shape[0]
    if not -T <= t < T:
        raise ValueError(f"t: expected a step from 0 to {T - 1}, got {t}")
    return stack.in_user_order(full_jacobians(tr, t % T), 0)


@torch.no_grad()
def lyapunov(
    layer: nn.RNNBase,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    n: int | None = None,
    at: str | None = None,
    warmup: int = 0,
    history: bool = False,
    seed: int = 0,
) -> Any:
    """λ_i = lim 1/T Σ_t ln R_ii(t),  J_t Q_{t−1} = Q_t R(t): the n largest exponents under the given input, nats per
    step.

    λ_1 > 0: perturbations, and so gradients, grow (chaos); all λ ≪ 0: they vanish. The sum of all exponents is the
    mean of ln|det J_t|.

    Args:
        layer, x, hx, at: as in `adjoint_map`.
        n: how many; None: all S.
        warmup: steps read before averaging begins, in which Q turns towards the leading directions.
        history: return a LyapunovHistory instead of the tensor.
        seed: of the first Q.

    Returns:
        `[n]` float64, mean over samples, largest first; −inf for a direction that is contracted to zero.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: Benettin et al. 1980; for recurrent networks Engelken, Wolf & Abbott 2023, Vogt et al. 2022.
    """
    stack = run_stack(layer, x, hx)
    tr = stack.traces[stack.index(at)]
    T, B = tr.x.shape[:2]
    S = sum(s.shape[-1] for s in tr.final)
    n = S if n is None else n
    if not 1 <= n <= S:
        raise ValueError(f"n: expected 1 to {S}, the size of the state, got {n}")
    if not 0 <= warmup < T:
        raise ValueError(f"warmup: expected 0 to {T - 1} steps, got {warmup}")
    q = _orthonormal(B, S, n, seed, tr.x)
    total = torch.zeros(B, n, dtype=torch.float64, device=tr.x.device)
    counted = torch.zeros(B, 1, dtype=torch.float64, device=tr.x.device)
    estimates = []
    for number, t in enumerate(reading_order(tr)):
        q, r = torch.linalg.qr(full_jacobians(tr, t) @ q)
        if number >= warmup:
            active = torch.ones(B, 1, device=tr.x.device) if tr.active is None else tr.active[t].double()
            grown = r.diagonal(dim1=-2, dim2=-1).abs().double().log()
            total += torch.where(active > 0, grown, 0.0)
            counted += active
        if history:
            estimates.append((total / counted.clamp_min(1)).mean(0))
    per_sample = total / counted.clamp_min(1)
    exponents, order = per_sample.mean(0).sort(descending=True)
    if not history:
        return exponents.cpu()
    shown = torch.stack(estimates)[:, order].cpu()
    return LyapunovHistory(exponents.cpu(), shown, stack.in_user_order(per_sample, 0)[:, order].cpu())


@torch.no_grad()
def singular_values(
    layer: nn.RNNBase,
    x: Tensor | PackedSequence,
    j: int,
    k: int,
    hx: Any = None,
    *,
    n: int = 1,
    at: str | None = None,
    iterations: int = 12,
    seed: int = 0,
) -> Tensor:
    """ln σ_i(∂s_k/∂s_j), i = 1 … n, `[B, n]` float64, largest first: how much the error at k can be stretched or
    shrunk by the time it is at j.

    The product of Jacobians is never formed: Vᵢ is turned through it and back, re-orthogonalised at every step,

        U R = Π J V,   V R' = (Π J)ᵀ U,   ln σ_i = Σ ln R_ii at convergence

    so that values that lie hundreds of decades apart keep their digits, and cost S·n per step.

    Args:
        layer, x, hx, at: as in `adjoint_map`.
        j, k: steps; the layer reads j before k.
        n: how many singular values.
        iterations: turns there and back; the error falls as (σ_{n+1}/σ_n)^(2·iterations).
        seed: of the first V.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    stack = run_stack(layer, x, hx)
    tr = stack.traces[stack.index(at)]
    T, B = tr.x.shape[:2]
    order = list(reading_order(tr))
    if not (0 <= j < T and 0 <= k < T and order.index(j) < order.index(k)):
        raise ValueError(f"j, k: expected steps from 0 to {T - 1}, j read before k, got {j} and {k}")
    S = sum(s.shape[-1] for s in tr.final)
    if not 1 <= n <= S:
        raise ValueError(f"n: expected 1 to {S}, the size of the state, got {n}")
    between = order[order.index(j) + 1 : order.index(k) + 1]
    v = _orthonormal(B, S, n, seed, tr.x)
    logs = v.new_zeros(B, n, dtype=torch.float64)
    for _ in range(iterations):
        u, _ = _through(tr, between, v, transposed=False)
        v, logs = _through(tr, between[::-1], u, transposed=True)
    return stack.in_user_order(logs.sort(dim=-1, descending=True).values, 0).cpu()


def _through(tr: engine.Trace, steps: list[int], q: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """(Q, Σ ln|R_ii|) of q carried through the Jacobians of these steps."""
    logs = q.new_zeros(*q.shape[:1], q.shape[-1], dtype=torch.float64)
    for t in steps:
        j = full_jacobians(tr, t)
        q, r = torch.linalg.qr((j.mT if transposed else j) @ q)
        logs += r.diagonal(dim1=-2, dim2=-1).abs().double().log()
    return q, logs


def _orthonormal(B: int, S: int, n: int, seed: int, like: Tensor) -> Tensor:
    random = torch.randn(S, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(random)[0].to(like).expand(B, S, n)
