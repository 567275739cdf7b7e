"""A watched layer that is replayed: nn.RNN, nn.LSTM, nn.GRU or `unvanish.nn.Recurrent`."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unvanish import engine
from unvanish.capture import Call
from unvanish.cells import State, Weights
from unvanish.flow.nonfinite import origin_of_nonfinite
from unvanish.flow.record import LayerFlow
from unvanish.flow.sketch import Sketches, probes, sketch, sketches_of
from unvanish.flow.summary import healthy, layer_flow, reorder, summarise
from unvanish.flow.watched_sequence import Errors, Measured, Sequence, apart, join, rounding, weight_keys
from unvanish.nn.modules import (
    CellModule,
    Drawn,
    LayerDirection,
    SequenceModule,
    TimeMajor,
    descend_layers,
    detached_call,
    drawn_again,
    evaluating,
    final_error,
    layer_directions,
    output_error,
    run_layers,
    used_weights,
)


@dataclass(frozen=True)
class _Call:
    """One call."""

    layers: list[LayerDirection]
    """with detached weights"""
    inputs: TimeMajor
    states: list[State]
    drawn: Drawn
    final: State
    """the final states that it returned, `[L·D, B, ·]` in internal order"""


class ModuleSequence(Sequence):
    """Calls of a layer that is replayed: torch's, and `unvanish.nn.Recurrent`."""

    def __init__(self, name: str, module: SequenceModule, catch: Any, want_partial: bool) -> None:
        super().__init__(name, catch)
        self.want_partial = want_partial
        self.module = module
        self.calls: list[_Call] = []
        self._keys: dict[str, dict[Hashable, int]] = {}
        """layer and direction → its weights' keys"""

    @property
    def steps(self) -> int:
        return sum(call.inputs.x.shape[0] for call in self.calls)

    def add(self, call: Call) -> None:
        """A call that has just returned."""
        module, index = self.module, len(self.calls)
        self.rounding = max(self.rounding, rounding(call.y))
        with torch.no_grad(), evaluating(module):
            inputs, states = detached_call(module, call.x, call.hx, call.lengths)
            used = layer_directions(module, used_weights(module))
            layers = [d._replace(weights=d.weights.detach()) for d in used]
            drawn = drawn_again(module, inputs, call.rng)
            final = [final_error(inputs, s.detach().clone()) for s in call.states]
        self.ragged |= inputs.lengths is not None and bool((inputs.lengths < inputs.x.shape[0]).any())
        self.calls.append(_Call(layers, inputs, states, drawn, tuple(s for s in final if s is not None)))
        self.observe(call.y, (index, "y"))
        for i, state in enumerate(call.states):
            self.observe(state, (index, i))

    def measure(self, errors: Errors) -> list[Measured]:
        parts: list[list[Measured]] = [self._measure_call(i, call, errors) for i, call in enumerate(self.calls)]
        return [join(pieces, self) for pieces in zip(*parts, strict=True)]

    def _measure_call(self, index: int, call: _Call, errors: Errors) -> list[Measured]:
        dy = output_error(self.module, call.inputs, errors.get((index, "y")))
        passes = self._forward(call)
        replayed = tuple(torch.stack(s) for s in zip(*(p.final for p in passes), strict=True))
        problem = apart(call.final, replayed, self.rounding)
        dfinal = [final_error(call.inputs, errors.get((index, i))) for i in range(len(call.states[0]))]
        measured: list[Measured] = []

        def back(place: int, own: Tensor | None, ends: tuple[Tensor | None, ...], want_dx: bool) -> Tensor | None:
            dx, found = self._back(call, place, passes[place], own, ends, want_dx)
            measured.insert(0, replace(found, flow=replace(found.flow, problem=problem)))
            return dx

        descend_layers(call.layers, dy, dfinal, call.drawn.masks, back)
        return measured

    def _forward(self, call: _Call) -> list[engine.Pass | engine.Trace]:
        """A pass of each layer and direction: `engine.Pass` where the engine can measure by itself, else a trace."""
        others = [v for state, layer in zip(call.states, call.layers, strict=True) for v in (*state, *layer.weights)]
        rung = engine.explain(call.layers[0].cell, call.inputs.x, others=others).rung
        measures = rung == "native" and not self.want_partial
        make = engine.Pass if measures else partial(engine.trace, adjoint_follows=True)

        def run(layer: LayerDirection, x: Tensor, state: State) -> engine.Pass | engine.Trace:
            return make(layer.cell, x, state, layer.weights, call.inputs.lengths, layer.reverse)

        return run_layers(call.layers, call.inputs.x, call.states, run, call.drawn.masks)

    def _back(
        self,
        call: _Call,
        place: int,
        ran: engine.Pass | engine.Trace,
        dy: Tensor | None,
        ends: tuple[Tensor | None, ...],
        want_dx: bool,
    ) -> tuple[Tensor | None, Measured]:
        """(∂E/∂x if wanted, the measurement of the backward pass)."""
        layer, cut, module = call.layers[place], call.drawn.cuts[place], self.module
        name, lengths, clip = self._name(layer), self._lengths(call), getattr(module, "clip", None)
        if isinstance(ran, engine.Pass):
            w = layer.weights.w_ih
            # Gradients of what `Recurrent` learns follow from whole ones.
            u = None if isinstance(module, CellModule) else probes(len(w), w.dtype, w.device)
            dx, norms, grads = ran.back(dy, ends, clip, want_dx, cut, u)
            record = layer_flow(name, layer.cell, lengths, [ran.statistics], [norms])
            sketches = _learnt(module, layer, grads) if isinstance(module, CellModule) else (grads.w_ih, grads.w_hh)
            return dx, self._measured(call, layer, record, sketches, lambda: ran.recompute(dy, ends, clip, cut))
        flow = engine.adjoint(ran, dy, ends, clip, cut)
        record = summarise(name, ran, flow, self.want_partial, lengths)
        if isinstance(module, CellModule):
            sketches = _learnt(module, layer, engine.weight_gradients(ran, flow))
        else:
            sketches = sketches_of(ran, flow)
        found = self._measured(call, layer, record, sketches, lambda: (ran, dy, flow))
        return flow.da @ ran.weights.w_ih if want_dx else None, found

    def _name(self, layer: LayerDirection) -> str:
        return f"{self.name}.{layer.name}" if self.name else layer.name

    def _lengths(self, call: _Call) -> Tensor:
        T, B = call.inputs.x.shape[:2]
        return torch.full((B,), T) if call.inputs.lengths is None else call.inputs.lengths.cpu()

    def _measured(
        self, call: _Call, layer: LayerDirection, record: LayerFlow, sketches: Sketches, recompute: engine.Recompute
    ) -> Measured:
        born = None if healthy(record) else origin_of_nonfinite(record.name, *recompute(), 0, call.inputs.order)
        if call.inputs.order is not None:
            record = reorder(record, call.inputs.order.argsort())
        if layer.name not in self._keys:
            self._keys[layer.name] = weight_keys(self.module, layer)
        places = self._keys[layer.name].items()
        return Measured(record, {key: g for key, i in places if (g := sketches[i]) is not None}, born)


def _learnt(module: CellModule, layer: LayerDirection, grads: Weights) -> Sketches:
    """Sketches of ∂E/∂(the learnt weights), from `grads` with respect to those that the engine takes."""
    w_ih, w_hh = module.learnt_gradients(layer.layer, layer.reverse, grads)
    return sketch(w_ih), None if w_hh is None else sketch(w_hh)
