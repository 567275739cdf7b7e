"""The record of a layer whose states and δ are known at every step."""

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import Cell
from unvanish.flow.record import LayerFlow
from unvanish.flow.subgradients import dweight, partial_sums, weight_pairs

CHUNK_ELEMENTS = {"cpu": 2**18}
"""of δa that are summarised at a time on a device, so that the float64 copies stay in the cache"""
LAUNCHED_ELEMENTS = 2**22
"""on any other device, where small pieces would cost as many launches as a loop over the steps"""


def summarise(name: str, tr: engine.Trace, deltas: engine.Deltas, want_partial: bool, lengths: Tensor) -> LayerFlow:
    """The record of a layer whose states and δ are known at every step."""
    T, B, width = deltas.da.shape
    cell, active = tr.cell, tr.active
    at_once = CHUNK_ELEMENTS.get(deltas.da.device.type, LAUNCHED_ELEMENTS)
    span = max(1, at_once // max(1, B * max(width, B)))
    pieces = [_summarise_steps(tr, deltas, slice(t, t + span)) for t in range(0, T, span)]
    dh, dc, dgates, subgradients, gates, saturation, log_carry = (
        None if column[0] is None else torch.cat(column).cpu() for column in zip(*pieces, strict=True)
    )
    assert dh is not None
    count = B * T if active is None else int(lengths.sum())
    whole = weight_pairs(tr, deltas.da, deltas.da_hh) if want_partial else []
    return LayerFlow(
        name=name,
        cell=cell.name,
        gate_names=cell.gates,
        lengths=lengths.cpu(),
        dh=dh,
        dc=dc,
        dgates=dgates,
        dweight=subgradients,
        partial=partial_sums(whole).cpu() if want_partial else None,
        gates=gates,
        saturation=saturation,
        log_carry=None if log_carry is None else log_carry.sum(0) / count,
    )


def _summarise_steps(tr: engine.Trace, deltas: engine.Deltas, span: slice) -> tuple[Tensor | None, ...]:
    """(dh, dc, dgates, dweight, gates, saturation, Σ ln carry) of a span of steps small enough to stay in the cache."""
    cell, at = tr.cell, tr.stretch(span)
    states = {a: row_norms(d[span]) for a, d in zip(cell.states, deltas.dstate, strict=True)}
    memory = cell.remembers
    dc = states[memory] if memory != cell.states[0] else None
    da = deltas.da[span].double()
    da_hh = da if deltas.da_hh is deltas.da else None if deltas.da_hh is None else deltas.da_hh[span].double()
    dgates = torch.linalg.vector_norm(by_gate(cell, da, da_hh), dim=-1)
    closed = (cell.sensitivity(at) < engine.SATURATED).to(tr.x.dtype).mean(-1).double()
    values = at.gates.mean(-1).double()
    carry = cell.carry(at)
    logs = None if carry is None else carry.abs().log()
    if tr.active is not None:
        on = tr.active[span]
        closed, values = (torch.where(on, v, torch.nan) for v in (closed, values))
        logs = None if logs is None else torch.where(on, logs, 0.0)
    kept = None if logs is None else logs.sum((0, 1), dtype=torch.float64).unsqueeze(0)
    return states[cell.states[0]], dc, dgates, dweight(weight_pairs(at, da, da_hh)), values, closed, kept


def by_gate(cell: Cell, da: Tensor, da_hh: Tensor | None) -> Tensor:
    """δ of every gate's pre-activation, `[..., G, H]`: by the input's share, or by the recurrent one where a gate reads
    no input."""
    parts = dict(zip(cell.input_gates, da.chunk(len(cell.input_gates), dim=-1), strict=True))
    if da_hh is not None and len(parts) < len(cell.gates):
        parts = dict(zip(cell.sources, da_hh.chunk(len(cell.sources), dim=-1), strict=True)) | parts
    return torch.stack([parts[gate] for gate in cell.gates], dim=-2)


def layer_flow(
    name: str,
    cell: Cell,
    lengths: Tensor,
    statistics: list[engine.Statistics],
    norms: list[engine.Norms | None],
) -> LayerFlow:
    """The record of a layer that the engine measured, in consecutive pieces; None where no gradient arrived."""
    found = [_no_error(s, cell) if n is None else n for s, n in zip(statistics, norms, strict=True)]
    carried = [s.log_carry for s in statistics if s.log_carry is not None]
    return LayerFlow(
        name=name,
        cell=cell.name,
        gate_names=cell.gates,
        lengths=lengths,
        dh=_cat([n.h for n in found]),
        dc=_cat([n.c for n in found if n.c is not None]) if "c" in cell.states else None,
        dgates=_cat([n.a for n in found]),
        dweight=_cat([n.w for n in found]),
        gates=_cat([s.mean for s in statistics]),
        saturation=_cat([s.saturated for s in statistics]),
        log_carry=torch.stack(carried).sum(0) / lengths.sum() if carried else None,
    )


def _cat(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _no_error(statistics: engine.Statistics, cell: Cell) -> engine.Norms:
    zeros = torch.zeros_like(statistics.mean)
    h = zeros[..., 0]
    return engine.Norms(h, h if "c" in cell.states else None, zeros, h.sum(1))


def healthy(record: LayerFlow) -> bool:
    """Whether everything was finite: a NaN or infinity anywhere in the pass shows in one of these."""
    norms = (record.dh, record.dc, record.dgates, record.dweight)
    return all_finite(norms, record.gates, record.lengths)


def all_finite(norms: Iterable[Tensor | None], gates: Tensor | None, lengths: Tensor) -> bool:
    """Whether norms are finite, and gates `[T, B, G]` at every step that a sample of `lengths` `[B]` has."""
    for v in norms:
        if v is not None and not _finite(v):
            return False
    if gates is None or math.isfinite(float(gates.sum())):
        return True
    return int(gates.isfinite().sum()) == gates.shape[-1] * int(lengths.sum())


def _finite(v: Tensor) -> bool:
    # A sum costs a third of isfinite; where it is not finite, the sum itself may have overflowed.
    return math.isfinite(float(v.sum())) or bool(v.isfinite().all())


def row_norms(v: Tensor) -> Tensor:
    """2-norms over the last axis, accumulated in float64, where squares of float32 neither underflow nor overflow."""
    return torch.linalg.vector_norm(v.double(), dim=-1)


def reorder(record: LayerFlow, order: Tensor) -> LayerFlow:
    """Samples back into the user's order."""
    order = order.cpu()
    per_sample = ("dh", "dc", "dgates", "gates", "saturation")
    moved = {name: getattr(record, name)[:, order] for name in per_sample if getattr(record, name) is not None}
    return replace(record, lengths=record.lengths[order], **moved)
