"""A sequence measured in the passes that run it anyway: gates in the forward pass, gradients in the backward.

Only the native rung can do this: its kernels have every state, gate and δ in registers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from unvanish import torch_internals
from unvanish.cells import Cell, State, Weights
from unvanish.engine import manual, native, native_trace, operators, reference
from unvanish.engine.checks import check_cut, check_errors, check_layer, check_probes, whole_lengths
from unvanish.engine.operator_checks import LayerTensors, check_backward
from unvanish.engine.sequence import add, sort

SATURATED = 0.05
"""A unit counts as saturated where φ'(a) is below this share of its maximum."""


class Statistics(NamedTuple):
    """Statistics of the gates; float64, NaN where a sample is inactive."""

    mean: Tensor
    """[T, B, G] each gate's mean value over its units"""
    saturated: Tensor
    """[T, B, G] share of the units that are saturated"""
    log_carry: Tensor | None
    """[H] Σ over active steps and samples of ln f_t (LSTM) or ln z_t (GRU); None for a plain RNN"""


class Norms(NamedTuple):
    """Norms of the gradient; float64, 0 where a sample is inactive."""

    h: Tensor
    """[T, B] ‖δh_t‖₂"""
    c: Tensor | None
    """[T, B] ‖δc_t‖₂; None except for the LSTM"""
    a: Tensor
    """[T, B, G] ‖δa_t‖₂ of each gate"""
    w: Tensor
    """[T] ‖g_t‖_F, g_t = δa_tᵀ [h_{t-1}, x_t]"""


Recompute = Callable[[], tuple[manual.Trace, Tensor | None, manual.Deltas]]
"""The same pass again, with every state and δ kept: (trace, ∂E_t/∂h_t, flow)."""


class Recorder(Protocol):
    """An observer of one layer and direction over one sequence."""

    @property
    def awaits_backward(self) -> bool:
        """Whether to measure the backward pass."""
        ...

    def forward(self, statistics: Statistics) -> None:
        """Called after the forward pass, and again where a checkpoint is recomputed."""
        ...

    def backward(self, norms: Norms, gradients: Weights, recompute: Recompute) -> None:
        """Called after a backward pass. `norms` are of the sum over all backward passes through this graph so far, as
        `.grad` adds them up; `gradients` are this pass's ∂E/∂W."""
        ...


class Pass:
    """One layer and direction run forward, outside any graph, whose backward pass can be measured."""

    def __init__(self, cell: Cell, x: Tensor, state: State, w: Weights, lengths: Tensor | None, reverse: bool) -> None:
        check_layer(cell, x, state, w)
        why = native.obstacle(cell, x, (*state, *w))
        if why is not None:
            raise RuntimeError(f"record: only the native rung records, and it can't run here: {why}; use engine.trace")
        lengths = None if lengths is None else whole_lengths(lengths, x)
        self.cell, self.x, self.state, self.weights = cell, x, state, w
        self.lengths, self.reverse = lengths, reverse
        self._given = sort(x, state, lengths)
        self._inputs: Any = native.prepared(self._given, w)
        how = _how(cell, reverse)
        y, h, c, *self._kept, mean, saturated, log_carry = native.forward(
            *self._inputs, **how, save=True, closed=SATURATED
        )
        self._y, self._back = y, self._given.back
        self.y = _in_order(y, 1, self._back)
        self.final = tuple(_in_order(s, 0, self._back) for s in (h, c)[: len(cell.states)])
        self.statistics = _statistics(mean, saturated, log_carry, self._back)

    def back(
        self,
        dy: Tensor | None,
        dfinal: tuple[Tensor | None, ...],
        clip: float | None,
        want_dx: bool,
        cut: Tensor | None = None,
        probes: Tensor | None = None,
    ) -> tuple[Tensor | None, Norms, Weights]:
        """(∂E/∂x, norms, ∂E/∂W) from dy `[T, B, R]` = ∂E_t/∂h_t and dfinal = ∂E/∂(final state); None is zero.

        With `probes` U `[G·H, PROBES]`, (∂E/∂W_ih)ᵀ U `[I, PROBES]` and (∂E/∂W_hh)ᵀ U `[R, PROBES]` are returned in
        place of ∂E/∂W_ih and ∂E/∂W_hh, which takes less time; the other gradients are None.
        """
        check_errors(self.x, self.y, self.final, dy, dfinal)
        check_cut(cut, self.x)
        check_probes(probes, self.x, self.weights, native.PROBES)
        order = None if self._back is None else torch.argsort(self._back)
        dh, dc = (*(_contiguous(d, 0, order) for d in dfinal), None)[:2]
        # The forward pass saved no cut.
        saved: Any = (*self._inputs[:-1], None if cut is None else cut.contiguous(), self._y, *self._kept)
        how = _how(self.cell, self.reverse, clip)
        out = native.backward(
            _contiguous(dy, 1, order), dh, dc, *saved, **how, want_dx=want_dx, want_delta=False, want_norms=True,
            probes=probes,
        )  # fmt: skip
        dx, _, _, *gradients = out[:8]
        if probes is None:
            found = _present(gradients, self.weights)
        else:
            found = Weights(*out.pop().split([self.x.shape[-1], self._y.shape[-1]]))
        return _in_order(dx, 1, self._back) if want_dx else None, _norms(out[8:], self._back), found

    def recompute(
        self,
        dy: Tensor | None,
        dfinal: tuple[Tensor | None, ...],
        clip: float | None,
        cut: Tensor | None = None,
    ) -> tuple[manual.Trace, Tensor | None, manual.Deltas]:
        """The same pass, every state and δ kept."""
        tr = native_trace.trace(self.cell, self.x, self.state, self.weights, self.lengths, self.reverse)
        return tr, dy, native_trace.adjoint(tr, dy, dfinal, clip, cut)


class _Recorded(torch.autograd.Function):
    """`native.run` that notifies a recorder."""

    @staticmethod
    def forward(
        ctx: Any, record: Recorder, cell: Cell, back: Tensor | None, reverse: bool, clip: float | None, *inputs: Any
    ) -> Any:
        how = _how(cell, reverse, clip)
        y, h, c, gates, cells, mean, saturated, log_carry, own = native.forward(
            *inputs, **how, save=True, closed=SATURATED, twice=True
        )
        record.forward(_statistics(mean, saturated, log_carry, back))
        operators.keep(ctx, inputs, own, gates, cells)
        ctx.record, ctx.cell, ctx.back, ctx.reverse, ctx.clip = record, cell, back, reverse, clip
        ctx.errors = None
        ctx.intact = not torch_internals.saved_tensors_hooked()
        ctx.set_materialize_grads(False)
        return (y, h, c)[: 1 + len(cell.states)]

    @staticmethod
    def backward(ctx: Any, *errors: Any) -> Any:
        saved = operators.kept(ctx)
        x, h0, c0, *weights, lengths, cut, _, _, _ = saved
        given = [*errors, None][:3]
        # Gradients that are batched or have no memory of their own are not measured: the operator handles them.
        direct = operators.is_direct(*(None if d is None else torch_internals.materialised(d) for d in given))
        want_dx, awaits_backward = ctx.needs_input_grad[5], ctx.record.awaits_backward and direct
        out = None
        if awaits_backward or not torch.is_grad_enabled():
            if direct:
                out = _recorded_backward(ctx, saved, given, want_dx, awaits_backward)
            else:
                number, clip = native.NUMBER[ctx.cell.name], ctx.clip or 0.0
                out = operators.gradients(given, saved, number, ctx.reverse, clip, want_dx, direct=False)
        if torch.is_grad_enabled():
            operators.check_biases(ctx)
            state = (h0,) if c0 is None else (h0, c0)
            dx, dh0, *rest = reference.gradients(
                ctx.cell, x, state, Weights(*weights), lengths, ctx.reverse, ctx.clip, errors[0], errors[1:], cut
            )
            dc0 = None if c0 is None else rest.pop(0)
            rest = rest[:5]
        else:
            assert out is not None
            dx, dh0, dc0, *rest = (d if d.numel() else None for d in out)
        return None, None, None, None, None, dx if want_dx else None, dh0, dc0, *rest, None, None


def _recorded_backward(
    ctx: Any, saved: Any, errors: list[Tensor | None], want_dx: bool, awaits_backward: bool
) -> list[Tensor]:
    """All gradients; the recorder is notified, in the grad mode of the backward pass."""
    with torch.no_grad():
        out, notify = _measured_backward(ctx, saved, errors, want_dx, awaits_backward)
    if notify is not None:
        ctx.record.backward(*notify)
    return out


def _measured_backward(
    ctx: Any, saved: Any, errors: list[Tensor | None], want_dx: bool, awaits_backward: bool
) -> tuple[list[Tensor], tuple[Norms, Weights, Recompute] | None]:
    """(all gradients, the recorder's arguments; None where it does not wait for the backward pass)."""
    how = _how(ctx.cell, ctx.reverse, ctx.clip)
    now: Any = [native.arrived(d) for d in errors]
    if not ctx.intact:
        check_backward(now, LayerTensors(*saved[:-3]), saved[-3:], cell=how["cell"], clip=how["clip"])
        saved = [None if v is None else v.contiguous() for v in saved]
    first = ctx.errors is None
    out = native.backward(*now, *saved, **how, want_dx=want_dx, want_delta=False, want_norms=awaits_backward and first)
    if not awaits_backward:
        return out, None
    # A second backward through the same graph: gradients add up, as in .grad.
    total: Any = now if first else [add(a, b) for a, b in zip(ctx.errors, now, strict=True)]
    if first:
        norms = out[8:]
    else:
        norms = native.backward(*total, *saved, **how, want_dx=False, want_delta=False, want_norms=True)[8:]
    # Kept only while autograd keeps the graph: otherwise the next step would have to take fresh pages.
    ctx.errors = total if torch_internals.keeps_graph() else None
    x, h0, c0, *weights, lengths, cut, _, _, _ = saved
    w = Weights(*weights)

    def recompute() -> tuple[manual.Trace, Tensor | None, manual.Deltas]:
        state = tuple(_in_order(s, 0, ctx.back) for s in (h0, c0) if s is not None)
        dy, *dfinal = (
            None if d is None else _in_order(d, dim, ctx.back) for d, dim in zip(total, (1, 0, 0), strict=True)
        )
        in_order = None if lengths is None else _in_order(lengths, 0, ctx.back)
        tr = native_trace.trace(ctx.cell, _in_order(x, 1, ctx.back), state, w, in_order, ctx.reverse)
        return tr, dy, native_trace.adjoint(tr, dy, tuple(dfinal[: len(state)]), ctx.clip, cut)

    return out[:8], (_norms(norms, ctx.back), _present(out[3:8], w), recompute)


def run_recorded(
    record: Recorder,
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None = None,
    reverse: bool = False,
    clip: float | None = None,
    cut: Tensor | None = None,
) -> tuple[Tensor, State]:
    """`native.run`, bit for bit, which notifies `record` of both passes."""
    given = sort(x, state, lengths)
    inputs = native.prepared(given, w, cut)
    y, *final = torch_internals.apply(_Recorded, record, cell, given.back, reverse, clip, *inputs)
    return _in_order(y, 1, given.back), tuple(_in_order(s, 0, given.back) for s in final)


def _how(cell: Cell, reverse: bool, clip: float | None = None) -> dict[str, Any]:
    return {"cell": native.NUMBER[cell.name], "reverse": reverse, "clip": clip or 0.0}


def _in_order(v: Tensor, dim: int, back: Tensor | None) -> Tensor:
    return v if back is None else v.index_select(dim, back)


def _contiguous(v: Tensor | None, dim: int, order: Tensor | None) -> Tensor | None:
    return native.arrived(None if v is None else _in_order(v, dim, order))


def _present(gradients: list[Tensor], w: Weights) -> Weights:
    return Weights(*(None if like is None else g for g, like in zip(gradients, w[:5], strict=True)))  # type: ignore[arg-type]


def _statistics(mean: Tensor, saturated: Tensor, log_carry: Tensor, back: Tensor | None) -> Statistics:
    mean, saturated = (_in_order(v, 1, back) for v in (mean, saturated))
    return Statistics(mean, saturated, log_carry if log_carry.numel() else None)


def _norms(found: list[Tensor], back: Tensor | None) -> Norms:
    h, c, a, w = found
    return Norms(_in_order(h, 1, back), _in_order(c, 1, back) if c.numel() else None, _in_order(a, 1, back), w)
