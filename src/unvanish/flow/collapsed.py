"""The adjoint map of many sources: each step's matrices collapsed into one per sample, which all sources share.

RNN, GRU  δh_{t−1} = δh_t · ∂h_t/∂h_{t−1}

LSTM      δc_t += u_t ⊙ δh_t
          δh_{t−1} = δh_t · diag(k_o) W_ho + δc_t · (diag(k_i) W_hi + diag(k_f) W_hf + diag(k_g) W_hg)
          δc_{t−1} = f_t ⊙ δc_t,      k_γ the gate's factor: ∂h_t/∂a^o, ∂c_t/∂a^γ

A source then costs H² or 2 H² per step, not G·H², and no elementwise work on G·H gates.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import LSTM
from unvanish.flow.backwards import Entering, Some, hull, masked
from unvanish.flow.exponents import EMPTY, log_norms, renormalisation, scale_by_power_of_two_, times_power_of_two
from unvanish.flow.stack import reading_order

BLOCK_ELEMENTS = 2**19
"""Of matrices formed at a time: few enough to stay in the cache."""

TAME = 2.0**20
"""Rows whose norm is between 1/TAME and TAME are so far from the ends of float32 that no sane step leads there."""

SCALED_EVERY = 8
"""Steps after which rows are brought back near 1, tame or not."""


class Through(NamedTuple):
    """What one step does to an LSTM's δc."""

    exposure: Tensor
    """[B, 1, H] u_t"""
    into_h: Tensor
    """[B, H, H] what δh_{t−1} gets from δc_t"""
    carry: Tensor
    """[B, 1, H] f_t"""


class Transfer(NamedTuple):
    """What one step does to the rows of every sample."""

    into_h: Tensor
    """[B, H, H] what δh_{t−1} gets from δh_t"""
    cell: tuple[Through, ...]
    """one for the LSTM, none for the others"""

    def at(self, i: int) -> "Transfer":
        """Of one step, out of several."""
        return Transfer(self.into_h[i], tuple(Through(*(v[i] for v in path)) for path in self.cell))


def log_norms_collapsed(tr: engine.Trace, K: int, entering: Entering, state: int) -> Tensor:
    """ln‖δs_t‖ of each error at every step, `[K, T, B]` float64; −inf where none arrives. Not for projections."""
    T, B, H = *tr.x.shape[:2], tr.y.shape[-1]
    h, spare, *c = tr.x.new_zeros(1 + len(tr.final), B, K, H).unbind()
    exponent = torch.full((B, K), EMPTY, dtype=torch.float64, device=tr.x.device)
    logs = torch.full((T, B, K), -torch.inf, dtype=torch.float64, device=tr.x.device)
    begun: slice | None = None
    for number, (t, step) in enumerate(_transfers(tr)):
        new = entering(t)
        if new is not None:
            _enter((h, *c), exponent, new, begun, tr, t)
            begun = new.place if begun is None else hull(begun, new.place)
        if begun is None:
            continue
        rows, after, parts = h[:, begun], spare[:, begun], [v[:, begun] for v in c]
        for part, path in zip(parts, step.cell, strict=True):
            part.addcmul_(rows, path.exposure)
        logs[t, :, begun], tame = _log_norms((rows, *parts)[state], exponent[:, begun])
        if not tame or number % SCALED_EVERY == 0:
            shift, exponent[:, begun] = renormalisation((rows, *parts), exponent[:, begun])
            for v in (rows, *parts):
                scale_by_power_of_two_(v, -shift)
        torch.bmm(rows, step.into_h, out=after)
        for part, path in zip(parts, step.cell, strict=True):
            after.baddbmm_(part, path.into_h)
            part.mul_(path.carry)
        h, spare = spare, h
    found = logs.permute(2, 0, 1)
    return found if tr.active is None else torch.where(tr.active.squeeze(-1), found, -torch.inf)


def _log_norms(v: Tensor, exponent: Tensor) -> tuple[Tensor, bool]:
    """As `log_norms`, and whether all norms of v are tame.

    Tame norms have squares well inside v's own range; float64, which costs several times as much, is for the others.
    """
    if not v.is_cuda:
        norm = torch.linalg.vector_norm(v, dim=-1)
        low, high = norm.aminmax()
        if float(low) > 1 / TAME and float(high) < TAME:
            return norm.double().log() + exponent * math.log(2), True
    return log_norms(v, exponent), False


def _enter(
    parts: tuple[Tensor, ...], exponent: Tensor, new: Some, begun: slice | None, tr: engine.Trace, t: int
) -> None:
    """parts, exponent += new, in place; what enters, enters the first part."""
    here, rows = new.place, masked(new.rows, tr, t)
    v, size = rows.v.transpose(0, 1), rows.exponent.mT
    if begun is None or here.stop <= begun.start or here.start >= begun.stop:
        parts[0][:, here], exponent[:, here] = v, size
        return
    top = torch.maximum(exponent[:, here], size)
    for part in parts:
        part[:, here] = times_power_of_two(part[:, here], (exponent[:, here] - top).unsqueeze(-1))
    parts[0][:, here] += times_power_of_two(v, (size - top).unsqueeze(-1))
    exponent[:, here] = top


def _transfers(tr: engine.Trace) -> Iterator[tuple[int, Transfer]]:
    """(t, what the step does), from the last step read to the first; formed several steps at a time."""
    order = list(reversed(list(reading_order(tr))))
    B, H = tr.y.shape[1:]
    block = max(1, BLOCK_ELEMENTS // (B * H * H * len(tr.final)))
    for first in range(0, len(order), block):
        steps = order[first : first + block]
        low = min(steps)
        many = _transfer(tr, slice(low, max(steps) + 1))
        for t in steps:
            yield t, many.at(t - low)


def _transfer(tr: engine.Trace, part: slice) -> Transfer:
    """Of several steps, `[τ, B, ...]`."""
    saved, w = type(tr.saved)(*(field[part] for field in tr.saved)), tr.weights
    cell: tuple[Through, ...] = ()
    if isinstance(tr.cell, LSTM):
        w_i, w_f, w_g, w_o = w.w_hh.chunk(4, dim=0)
        k_i, k_f, k_g = (k.unsqueeze(-1) for k in tr.cell.gate_factors(saved))
        into_h = tr.cell.output_factor(saved).unsqueeze(-1) * w_o
        from_c = (k_i * w_i).addcmul_(k_f, w_f).addcmul_(k_g, w_g)
        cell = (Through(tr.cell.exposure(saved).unsqueeze(-2), from_c, saved.f.unsqueeze(-2)),)
    else:
        into_h = tr.cell.jacobian(saved, w)
    return Transfer(into_h, cell)
