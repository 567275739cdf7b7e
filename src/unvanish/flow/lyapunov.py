"""The dynamics of the full state s = h or (h, c) under the real input: Jacobians and Lyapunov spectrum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish.engine.precision import full_precision
from unvanish.extras import extra
from unvanish.flow import tangents
from unvanish.flow.files import Record
from unvanish.flow.singular import orthonormal, orthonormalised, singular_values
from unvanish.flow.stack import Stack, full_jacobians, reading_order, run_stack
from unvanish.nn.modules import SequenceModule

__all__ = ["LyapunovSpectrum", "jacobian", "lyapunov", "singular_values"]


if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class LyapunovSpectrum(Record):
    """The exponents, and how they converge."""

    exponents: Tensor
    """[n] nats per step, mean over samples, largest first"""
    history: Tensor
    """[T, n] the same estimate after each step read; NaN during the warm-up"""
    per_sample: Tensor
    """[B, n]; NaN where a sample is no longer than the warm-up"""

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per step and exponent: t, exponent, estimate."""
        with extra("report"):
            import pandas as pd

        t, i = torch.meshgrid(*(torch.arange(n, device="cpu") for n in self.history.shape), indexing="ij")
        columns = {"t": t, "exponent": i, "estimate": self.history}
        return pd.DataFrame({name: v.flatten().numpy() for name, v in columns.items()})

    def _draw(self, ax: Any) -> Any:
        from unvanish import draw

        curves = {f"λ{i + 1}": v.tolist() for i, v in enumerate(self.history.unbind(1))}
        steps = range(len(self.history))
        return draw.lines(curves, steps, "steps read", "exponent (nats per step)", ax, zero=True, width=1.4)

    def __repr__(self) -> str:
        found = ", ".join(f"{float(e):.3g}" for e in self.exponents[:8])
        more = ", …" if len(self.exponents) > 8 else ""
        return f"LyapunovSpectrum over {len(self.history)} steps: {found}{more} nats per step"


@torch.no_grad()
@full_precision()
def jacobian(
    layer: SequenceModule,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    t: int,
    lengths: Tensor | Sequence[int] | None = None,
    at: str | None = None,
) -> Tensor:
    """∂s_t/∂s_{t−1} `[B, S, S]` of one layer, s all states of the cell side by side: h, or (h, c) for the LSTM.

    t counts in input order; for a reversed layer the step read before t is t + 1. Where a sample has no input it is
    the identity.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    stack = run_stack(layer, x, hx, lengths)
    tr = stack.traces[stack.index(at)]
    T = tr.x.shape[0]
    if not isinstance(t, SupportsIndex) or not -T <= t < T:
        raise ValueError(f"t: expected a step from 0 to {T - 1} (or −1 to −{T} from the end), got {t}")
    return stack.inputs.in_user_order(full_jacobians(tr, t % T), 0)


@torch.no_grad()
@full_precision()
def lyapunov(
    layer: SequenceModule,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    at: str | None = None,
    n: int | None = None,
    warmup: int = 0,
    seed: int = 0,
) -> LyapunovSpectrum:
    """λ_i = lim 1/T Σ_t ln R_ii(t),  J_t Q_{t−1} = Q_t R(t): the n largest exponents under the given input, nats per
    step.

    λ_1 > 0: perturbations, and so gradients, grow (chaos); all λ ≪ 0: they vanish. The sum of all exponents is the
    mean of ln|det J_t|.

    Args:
        layer, x, hx, lengths, at: as in `adjoint_map`.
        n: how many; None: all S.
        warmup: steps of each sample read before averaging begins, in which Q turns towards the leading directions.
        seed: of the first Q.

    Returns:
        The spectrum; `exponents` `[n]` are float64, means over samples, largest first, −inf for a direction that is
        contracted to zero.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: Benettin et al. 1980; for recurrent networks Engelken, Wolf & Abbott 2023, Vogt et al. 2022.
    """
    return spectrum_of(run_stack(layer, x, hx, lengths), at, n, warmup, seed)


@torch.no_grad()
@full_precision()
def spectrum_of(
    stack: Stack, at: str | None, n: int | None, warmup: int = 0, seed: int = 0, last: int | None = None
) -> LyapunovSpectrum:
    """`lyapunov` of a module that has been run; over the `last` steps that it reads, None: over all."""
    tr = stack.traces[stack.index(at)]
    T, B = tr.x.shape[:2]
    S = sum(s.shape[-1] for s in tr.final)
    n = S if n is None else n
    if not isinstance(n, SupportsIndex) or not 1 <= n <= S:
        raise ValueError(f"n: expected 1 to {S}, the size of the state, got {n}")
    if not 0 <= warmup < T:
        raise ValueError(f"warmup: expected 0 to {T - 1} steps, got {warmup}")
    q = orthonormal(B, S, n, seed, tr.x)
    total = torch.zeros(B, n, dtype=torch.float64, device=tr.x.device)
    read = torch.zeros(B, 1, dtype=torch.float64, device=tr.x.device)
    estimates = []
    if last is not None and last < T:
        tr = tr.stretch(slice(last) if tr.reverse else slice(T - last, None))
    for t in reading_order(tr):
        q, factor = _orthonormalised(tangents.forward(tr, t, q))
        read = read + (1 if tr.active is None else tr.active[t])
        grown = factor.double().log()
        # A state that does not change grows by ln 1 = 0.
        total = total + torch.where(read > warmup, grown, 0.0)
        estimates.append((total, read - warmup))
    per_sample = torch.where(read > warmup, total / (read - warmup), torch.nan)
    exponents, order = _mean(total, read - warmup).sort(descending=True)
    shown = _mean(*(torch.stack(v) for v in zip(*estimates, strict=True)))[:, order].cpu()
    return LyapunovSpectrum(exponents.cpu(), shown, stack.inputs.in_user_order(per_sample, 0)[:, order].cpu())


def _orthonormalised(v: Tensor) -> tuple[Tensor, Tensor]:
    """(Q `[B, S, n]`, |R_ii| `[B, n]`) of v = Q R; a single column needs no LAPACK call per sample."""
    if v.shape[-1] > 1:
        q, r = orthonormalised(v)
        return q, r.diagonal(dim1=-2, dim2=-1).abs()
    length = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    # A column contracted to zero has no direction left: any unit vector will do, as in a QR decomposition.
    unit = torch.zeros_like(v)
    unit[:, 0] = 1
    return torch.where(length > 0, v / length, unit), length.squeeze(-2)


def _mean(total: Tensor, steps: Tensor) -> Tensor:
    """Mean over the samples that have steps `[..., B, 1]` of total / steps, `[..., n]`; NaN where none has, or where
    one is."""
    there = steps > 0
    return torch.where(there, total / steps, 0.0).sum(-2) / there.sum(-2)
