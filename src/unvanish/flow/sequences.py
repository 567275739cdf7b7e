"""One watched forward pass: what ran, which errors came back to it, and the record they make.

A sequence is a list of segments: calls of a module that follow one another, each starting from the state the one
before returned.
A call of nn.LSTM is one segment of many steps, a call of nn.LSTMCell one step. Everything kept is detached, so a
sequence lives as long as the graph whose hooks hold it, and never keeps a graph alive.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from unvanish import engine
from unvanish.cells import CARRY, CELLS, LSTM, Cell, State, Weights
from unvanish.flow.nonfinite import birthplace
from unvanish.flow.record import LayerFlow
from unvanish.flow.subgradients import dweight, partial
from unvanish.nn.modules import (
    LayerDirection,
    TimeMajor,
    dropout_masks,
    evaluating,
    initial_states,
    layer_directions,
    time_major,
)

Errors = dict[Hashable, Tensor]
"""where an error arrived (segment and output) → ∂E/∂(that output)"""

CHUNK_ELEMENTS = 2**18
"""of δa that are summarised at a time, so that the float64 copies stay in the cache"""

SATURATED = 0.05
"""A unit counts as saturated where φ'(a) is below this share of its maximum."""


@dataclass
class Measured:
    """One layer's record, and its own ∂E/∂W to hold against autograd's."""

    flow: LayerFlow
    gradients: dict[Hashable, Tensor] = field(default_factory=dict)
    """weight key → Σ_t g_t"""
    nonfinite: str | None = None
    """where a NaN or infinity was born"""


class Sequence(ABC):
    """Segments of one module, and the errors that came back to them."""

    def __init__(self, name: str, catch: Callable[["Sequence", Hashable, Tensor], None], want_partial: bool) -> None:
        self.name = name
        self.want_partial = want_partial
        self.errors: Errors = {}
        """summed over all backward passes so far, as `.grad` is"""
        self.handles: list[RemovableHandle] = []
        self.detached: list[int] = []
        self.number = self.epoch = 0
        self.era: tuple[int, int] = (0, 0)
        self.start: int | None = None
        self._catch = catch

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps so far."""

    @abstractmethod
    def measure(self, errors: Errors) -> list[Measured]:
        """The records that these errors make. A segment that no error reached has zero flow."""

    def listen(self, tensor: Tensor, key: Hashable) -> None:
        """Hear of the error that reaches `tensor`."""
        if tensor.requires_grad:
            self.handles.append(tensor.register_hook(lambda grad: self._catch(self, key, grad)))

    def close(self) -> None:
        """Stop listening."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


@dataclass(frozen=True)
class _Call:
    """One call of nn.RNN, nn.LSTM or nn.GRU."""

    layers: list[LayerDirection]
    """with detached weights"""
    inputs: TimeMajor
    states: list[State]
    masks: list[Tensor]
    """dropout between layers: what the output of each layer but the last was multiplied with, `[T, B, D·R]`"""
    packed: PackedSequence | None


class ModuleSequence(Sequence):
    """Calls of a torch.nn.RNNBase."""

    def __init__(self, name: str, module: nn.RNNBase, catch: Any, want_partial: bool) -> None:
        super().__init__(name, catch, want_partial)
        self.module = module
        self.calls: list[_Call] = []

    @property
    def steps(self) -> int:
        return sum(call.inputs.x.shape[0] for call in self.calls)

    def add(self, x: Tensor | PackedSequence, hx: Any, lengths: Any, output: Any, rng: Tensor | None) -> None:
        """A call that has just returned `output`; `rng` is the generator's state before it, where it drew dropout."""
        module, index = self.module, len(self.calls)
        y, final = output
        packed = isinstance(x, PackedSequence)
        with torch.no_grad():
            inputs = time_major(module, x, lengths)
            used = [w for w in module._flat_weights if w is not None]
            layers = [d._replace(weights=d.weights.detach()) for d in layer_directions(module, used)]
            states = [tuple(s.detach() for s in state) for state in initial_states(module, hx, inputs)]
            masks = dropout_masks(module, inputs, rng)
        self.calls.append(
            _Call(layers, inputs._replace(x=inputs.x.detach()), states, masks, _layout(x) if packed else None)
        )
        self.listen(y.data if packed else y, (index, "y"))
        for i, state in enumerate(final if isinstance(final, tuple) else (final,)):
            self.listen(state, (index, i))

    def measure(self, errors: Errors) -> list[Measured]:
        parts: list[list[Measured]] = [self._measure_call(i, call, errors) for i, call in enumerate(self.calls)]
        return [_join(pieces, tuple(self.detached)) for pieces in zip(*parts, strict=True)]

    def _measure_call(self, index: int, call: _Call, errors: Errors) -> list[Measured]:
        traces = self._forward(call)
        n_dir = 2 if self.module.bidirectional else 1
        dy = self._output_error(call, errors.get((index, "y")))
        dfinal = [self._final_error(call, errors.get((index, i))) for i in range(len(traces[0].final))]
        measured: list[Measured] = []
        for first in range(len(traces) - n_dir, -1, -n_dir):
            below = []
            for d in reversed(range(n_dir)):
                tr, layer = traces[first + d], call.layers[first + d]
                dy_d = None if dy is None else dy.tensor_split(n_dir, dim=-1)[d]
                ends = tuple(None if f is None else f[first + d] for f in dfinal)
                flow = engine.adjoint(tr, dy_d, ends, getattr(self.module, "clip", None))
                below.append(flow.da @ tr.weights.w_ih if first else None)
                measured.insert(0, self._record(call, layer, tr, flow, dy_d))
            if first:
                dy = sum(below[1:], below[0])
                if call.masks:
                    dy = dy * call.masks[first // n_dir - 1]
        return measured

    def _forward(self, call: _Call) -> list[engine.Trace]:
        n_dir = 2 if self.module.bidirectional else 1
        x, traces = call.inputs.x, []
        for first in range(0, len(call.layers), n_dir):
            here = [
                engine.trace(layer.cell, x, state, layer.weights, call.inputs.lengths, layer.reverse)
                for layer, state in zip(
                    call.layers[first : first + n_dir], call.states[first : first + n_dir], strict=True
                )
            ]
            traces += here
            x = torch.cat([tr.y for tr in here], dim=-1)
            if call.masks and first + n_dir < len(call.layers):
                x = x * call.masks[first // n_dir]
        return traces

    def _output_error(self, call: _Call, dy: Tensor | None) -> Tensor | None:
        """∂E/∂y as [T, B, D·R] in internal order."""
        if dy is None:
            return None
        if call.packed is not None:
            return nn.utils.rnn.pad_packed_sequence(
                call.packed._replace(data=dy, sorted_indices=None, unsorted_indices=None)
            )[0]
        return time_major(self.module, dy).x

    def _final_error(self, call: _Call, d: Tensor | None) -> Tensor | None:
        """∂E/∂(final state) as [L·D, B, ·] in internal order."""
        if d is None:
            return None
        if d.dim() == 2:
            return d.unsqueeze(1)
        return d if call.inputs.order is None else d.index_select(1, call.inputs.order)

    def _record(
        self, call: _Call, layer: LayerDirection, tr: engine.Trace, flow: engine.Flow, dy: Tensor | None
    ) -> Measured:
        grads = engine.weight_gradients(tr, flow)
        suffix = layer.name
        name = f"{self.name}.{suffix}" if self.name else suffix
        T, B = tr.x.shape[:2]
        lengths = call.inputs.lengths
        record = summarise(
            name,
            tr.cell,
            tr.saved,
            flow.dstate,
            flow.da,
            flow.da_hh,
            tr.x,
            tr.active,
            self.want_partial,
            torch.full((B,), T) if lengths is None else lengths,
        )
        if call.inputs.order is not None:
            record = _reorder(record, call.inputs.order.argsort())
        prefix = f"l{layer.layer}{'_reverse' if layer.reverse else ''}"
        names = {f"weight_ih_{prefix}": grads.w_ih, f"weight_hh_{prefix}": grads.w_hh}
        keys = {key: names[name] for name, (key, _) in heard_weights(self.module).items() if name in names}
        return Measured(record, keys, None if _healthy(record) else birthplace(name, tr, dy, flow))


class CellSequence(Sequence):
    """Steps of an nn.RNNCell, nn.LSTMCell or nn.GRUCell in the user's own loop."""

    def __init__(self, name: str, module: nn.RNNCellBase, catch: Any, want_partial: bool) -> None:
        super().__init__(name, catch, want_partial)
        self.module = module
        self.cell = CELLS[cell_name(module)]
        self.x: list[Tensor] = []
        self.previous: list[State] = []
        self.weights: Weights | None = None
        self.exposed: list[bool] = []

    @property
    def steps(self) -> int:
        return len(self.x)

    def add(self, x: Tensor, hx: Any, output: Any) -> None:
        """A step that has just returned `output`."""
        t, module = self.steps, self.module
        states = output if isinstance(output, tuple) else (output,)
        given = tuple(torch.zeros_like(s) for s in states) if hx is None else hx if isinstance(hx, tuple) else (hx,)
        self.x.append(_batched(x.detach()))
        self.previous.append(tuple(_batched(s.detach()) for s in given))
        with torch.no_grad(), evaluating(module):
            self.weights = Weights(module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh).detach()
        # A fused step (CUDA) returns h_t and c_t from one node: its ∂E/∂c_t lacks the path through h_t.
        self.exposed.append(len(states) == 1 or states[0].grad_fn is not states[1].grad_fn)
        for i, state in enumerate(states):
            self.listen(state, (t, i))

    def measure(self, errors: Errors) -> list[Measured]:
        assert self.weights is not None
        T, B = self.steps, max(x.shape[0] for x in self.x)
        lengths = torch.tensor([sum(x.shape[0] > b for x in self.x) for b in range(B)])
        ragged = any(x.shape[0] != B for x in self.x)
        active = engine.active_steps(lengths, T, self.x[0].device) if ragged else None
        x = _stack(self.x, B)
        previous = tuple(_stack(list(column), B) for column in zip(*self.previous, strict=True))
        state, saved = self.cell.step(self.cell.project(x, self.weights), previous, self.weights)
        d = tuple(
            _stack([_batched(errors[t, i]) if (t, i) in errors else torch.zeros_like(s[t]) for t in range(T)], B)
            for i, s in enumerate(state)
        )
        if isinstance(self.cell, LSTM):
            through_h = d[0] * self.cell.exposure(saved)
            total = torch.tensor(self.exposed, device=x.device)[:, None, None]
            d = (d[0], torch.where(total, d[1] - through_h, d[1]))
        step = self.cell.adjoint(d, saved, self.weights)
        record = summarise(
            self.name, self.cell, saved, step.state, step.da, step.da_hh, x, active, self.want_partial, lengths
        )
        mine = {"weight_ih": step.da.flatten(0, 1).mT @ x.flatten(0, 1)}
        mine["weight_hh"] = step.da_hh.flatten(0, 1).mT @ saved.h_prev.flatten(0, 1)
        gradients = {key: mine[name] for name, (key, _) in heard_weights(self.module).items()}
        tr = engine.Trace(self.cell, self.weights, x, state[0], tuple(s[-1] for s in state), saved, active, False)
        flow = engine.Flow(step.state, step.da, step.da_hh, tuple(s[0] for s in step.previous))
        record = replace(record, detached=tuple(self.detached))
        return [Measured(record, gradients, None if _healthy(record) else birthplace(self.name, tr, d[0], flow))]


class MarkSequence(Sequence):
    """Tensors marked one per step by `uv.mark`."""

    def __init__(self, name: str, catch: Any) -> None:
        super().__init__(name, catch, False)
        self.like: list[Tensor] = []

    @property
    def steps(self) -> int:
        return len(self.like)

    def add(self, h: Tensor) -> None:
        """The state of the next step."""
        self.listen(h, self.steps)
        self.like.append(_batched(h.detach()))

    def measure(self, errors: Errors) -> list[Measured]:
        B = max(h.shape[0] for h in self.like)
        lengths = torch.tensor([sum(h.shape[0] > b for h in self.like) for b in range(B)])
        d = [_batched(errors[t]) if t in errors else torch.zeros_like(h) for t, h in enumerate(self.like)]
        norms = [torch.linalg.vector_norm(step.flatten(1), dim=1, dtype=torch.float64) for step in d]
        born = next((t for t in reversed(range(len(norms))) if not norms[t].isfinite().all()), None)
        where = None if born is None else f"{self.name}: the error ∂E/∂h at step {born} is not finite"
        return [Measured(LayerFlow(self.name, "mark", (), lengths, _stack(norms, B)), nonfinite=where)]


def summarise(
    name: str,
    cell: Cell,
    saved: Any,
    dstate: State,
    da: Tensor,
    da_hh: Tensor,
    x: Tensor,
    active: Tensor | None,
    want_partial: bool,
    lengths: Tensor,
) -> LayerFlow:
    """The record of a layer whose states and δ are known at every step; all `[T, B, ...]`."""
    T, B, width = da.shape
    span = max(1, CHUNK_ELEMENTS // (B * max(width, B)))
    whole = (saved, dstate, da, da_hh, x, active)
    pieces = [_summarise_steps(cell, *_steps(whole, slice(t, t + span))) for t in range(0, T, span)]
    dh, dc, dgates, subgradients, gates, saturation, log_carry = (
        None if column[0] is None else torch.cat(column).cpu() for column in zip(*pieces, strict=True)
    )
    assert dh is not None
    count = B * T if active is None else int(active.sum())
    return LayerFlow(
        name=name,
        cell=cell.name,
        gate_names=cell.gates,
        lengths=lengths.cpu(),
        dh=dh,
        dc=dc,
        dgates=dgates,
        dweight=subgradients,
        partial=partial(da, da_hh, x, saved.h_prev).cpu() if want_partial else None,
        gates=gates,
        saturation=saturation,
        log_carry=None if log_carry is None else log_carry.sum(0) / count,
    )


def _steps(parts: Any, span: slice) -> Any:
    """The steps in `span` of nested tuples of `[T, ...]` tensors; the same tensor twice stays one."""
    if isinstance(parts, Tensor):
        return parts[span]
    if parts is None:
        return None
    done: dict[int, Any] = {}
    for part in parts:
        if id(part) not in done:
            done[id(part)] = _steps(part, span)
    cut = [done[id(part)] for part in parts]
    return type(parts)(*cut) if hasattr(parts, "_fields") else tuple(cut)


def _summarise_steps(
    cell: Cell, saved: Any, dstate: State, da: Tensor, da_hh: Tensor, x: Tensor, active: Tensor | None
) -> tuple[Tensor | None, ...]:
    """(dh, dc, dgates, dweight, gates, saturation, Σ ln carry) of a span of steps small enough to stay in the cache."""
    dh, dc = (*(row_norms(d) for d in dstate), None)[:2]
    double = da.double()
    hidden = double if da_hh is da else da_hh.double()
    dgates = torch.linalg.vector_norm(double.unflatten(-1, (len(cell.gates), -1)), dim=-1)
    closed = (cell.sensitivity(saved) < SATURATED).to(saved.h_prev.dtype).mean(-1).double()
    values = cell.activations(saved).mean(-1).double()
    carry = getattr(saved, CARRY.get(cell.name, ""), None)
    logs = None if carry is None else carry.log()
    if active is not None:
        closed, values = (torch.where(active, v, torch.nan) for v in (closed, values))
        logs = None if logs is None else torch.where(active, logs, 0.0)
    kept = None if logs is None else logs.sum((0, 1), dtype=torch.float64).unsqueeze(0)
    return dh, dc, dgates, dweight(double, hidden, x.double(), saved.h_prev.double()), values, closed, kept


def _healthy(record: LayerFlow) -> bool:
    """Whether everything was finite: a NaN or infinity anywhere in the pass shows in one of these."""
    present = torch.arange(len(record.dh))[:, None] < record.lengths[None, :]
    values = [record.dh, record.dc, record.dgates, record.dweight]
    return all(bool(v.isfinite().all()) for v in values if v is not None) and (
        record.gates is None or bool(record.gates[present].isfinite().all())
    )


def row_norms(v: Tensor) -> Tensor:
    """2-norms over the last axis, accumulated in float64, where squares of float32 neither underflow nor overflow."""
    return torch.linalg.vector_norm(v.double(), dim=-1)


def heard_weights(module: nn.RNNBase | nn.RNNCellBase) -> dict[str, tuple[Hashable, Tensor]]:
    """Name → (key, tensor) of the weights that the last forward pass used and whose ∂E/∂W can be heard.

    A leaf is its own key, shared wherever it is; a parametrised weight is new at each call, so its name is. A cell
    reads a parametrised weight anew, out of reach: it is left out, and with it its part of the residual.
    """
    if isinstance(module, nn.RNNBase):
        found = zip(module._flat_weights_names, module._flat_weights, strict=True)
    else:
        found = ((name, module._parameters.get(name)) for name in ("weight_ih", "weight_hh"))
    return {
        name: (id(w) if w.is_leaf else (id(module), name), w)
        for name, w in found
        if w is not None and name.startswith(("weight_ih", "weight_hh"))
    }


def cell_name(module: nn.RNNCellBase) -> str:
    """The cell of `unvanish.cells` that a torch cell steps."""
    if isinstance(module, nn.LSTMCell):
        return "lstm"
    if isinstance(module, nn.GRUCell):
        return "gru"
    if isinstance(module, nn.RNNCell):
        return f"rnn_{module.nonlinearity}"
    raise TypeError(
        f"module: expected nn.RNNCell, nn.LSTMCell or nn.GRUCell, got {type(module).__name__}; use uv.mark(h, name)"
    )


def _batched(v: Tensor) -> Tensor:
    return v.unsqueeze(0) if v.dim() == 1 else v


def _stack(rows: list[Tensor], B: int) -> Tensor:
    """Stack over steps; a step with fewer samples is filled with zeros."""
    if all(r.shape[0] == B for r in rows):
        return torch.stack(rows)
    return torch.stack([torch.cat([r, r.new_zeros(B - r.shape[0], *r.shape[1:])]) for r in rows])


def _layout(x: PackedSequence) -> PackedSequence:
    return x._replace(data=x.data.new_empty(0))


def _reorder(record: LayerFlow, order: Tensor) -> LayerFlow:
    """Samples back into the user's order."""
    order = order.cpu()
    per_sample = ("dh", "dc", "dgates", "gates", "saturation")
    moved = {name: getattr(record, name)[:, order] for name in per_sample if getattr(record, name) is not None}
    return replace(record, lengths=record.lengths[order], **moved)


def _join(pieces: tuple[Measured, ...], detached: tuple[int, ...]) -> Measured:
    """One record of consecutive calls, end to end."""
    flows = [piece.flow for piece in pieces]
    first = replace(flows[0], detached=detached)
    if len(pieces) == 1:
        return replace(pieces[0], flow=first)
    total: dict[Hashable, Tensor] = defaultdict(lambda: torch.zeros(()))
    for piece in pieces:
        for key, gradient in piece.gradients.items():
            total[key] = total[key] + gradient
    timed = ("dh", "dc", "dgates", "dweight", "gates", "saturation")
    joined = {
        name: torch.cat([getattr(flow, name) for flow in flows])
        for name in timed
        if getattr(flows[0], name) is not None
    }
    lengths = torch.stack([flow.lengths for flow in flows])
    if first.log_carry is not None:
        share = lengths.sum(1) / lengths.sum()
        joined["log_carry"] = sum(s * flow.log_carry for s, flow in zip(share, flows, strict=True))  # type: ignore[operator]
    record = replace(first, lengths=lengths.sum(0), **joined)
    return Measured(record, dict(total), next((p.nonfinite for p in pieces if p.nonfinite), None))
