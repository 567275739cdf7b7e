"""A watched layer of `unvanish.nn`: the engine measures as it runs, so nothing has to be replayed or stored."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unvanish import engine
from unvanish.cells import Cell, Weights
from unvanish.flow.nonfinite import NonFiniteOrigin, first_origin, origin_of_nonfinite
from unvanish.flow.summary import all_finite, layer_flow, reorder
from unvanish.flow.watched_sequence import Errors, Measured, Sequence, join, weight_key
from unvanish.nn.modules import LayerDirection, TimeMajor


class _Place(NamedTuple):
    """A layer and direction that ran."""

    cell: Cell
    reverse: bool
    keys: dict[Hashable, int]
    """weight key → 0 for W_ih, 1 for W_hh"""


class _Call:
    """The recording of one call of a layer. It has no reference to the recorders, so no cycle keeps it alive."""

    def __init__(self) -> None:
        self.places: dict[str, _Place] = {}
        self.statistics: dict[str, dict[int, engine.Statistics]] = {}
        """layer and direction → first step of a checkpointed piece (0: all) → statistics"""
        self.steps = 0
        self.lengths = torch.empty(0, device="cpu")
        self.order: Tensor | None = None
        self.trainable = True


class RecordedCall:
    """One call of a layer, from its start on; creates the recorder of each layer and direction."""

    def __init__(self, module: nn.RNNBase) -> None:
        self.module = module
        self.facts = _Call()
        self.sequence: RecordedSequence | None = None
        self.index = 0

    def __call__(self, inputs: TimeMajor, place: LayerDirection, start: int) -> "_DirectionRecorder":
        facts, w = self.facts, place.weights
        if place.name not in facts.places:
            suffix = f"_l{place.layer}{'_reverse' if place.reverse else ''}"
            pairs = (("weight_ih", w.w_ih), ("weight_hh", w.w_hh))
            keys = {weight_key(self.module, stem + suffix, v): i for i, (stem, v) in enumerate(pairs) if v is not None}
            facts.places[place.name] = _Place(place.cell, place.reverse, keys)
            facts.trainable &= any(v is not None and v.requires_grad for v in w)
        if not facts.steps:
            facts.steps, B = inputs.x.shape[:2]
            facts.order = inputs.order
            facts.lengths = (
                torch.full((B,), facts.steps, device="cpu") if inputs.lengths is None else inputs.lengths.cpu()
            )
        return _DirectionRecorder(self, place.name, start)

    def complete(self, x: Any) -> bool:
        """Whether every layer and direction was recorded, and a gradient can arrive."""
        data = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
        expected = self.module.num_layers * (2 if self.module.bidirectional else 1)
        return len(self.facts.statistics) == expected and (data.requires_grad or self.facts.trainable)


class _DirectionRecorder:
    """Records one layer and direction of a call; an `engine.Recorder`."""

    def __init__(self, call: RecordedCall, place: str, start: int) -> None:
        self.call, self.place, self.start = call, place, start

    @property
    def awaits_backward(self) -> bool:
        return self.call.sequence is not None and self.call.sequence.open

    def forward(self, statistics: engine.Statistics) -> None:
        self.call.facts.statistics.setdefault(self.place, {})[self.start] = statistics

    def backward(self, norms: engine.Norms, gradients: Weights, recompute: engine.Recompute) -> None:
        sequence, facts = self.call.sequence, self.call.facts
        assert sequence is not None
        gates = facts.statistics[self.place][self.start].mean
        where = None
        if not all_finite(norms, gates, (facts.lengths - self.start).clamp(0, len(gates))):
            where = origin_of_nonfinite(sequence.title(self.place), *recompute(), self.start, facts.order)
        sequence.receive((self.call.index, self.place, self.start), _Observed(norms, gradients, where))


class _Observed(NamedTuple):
    """The backward pass's measurement of one piece of a layer and direction."""

    norms: engine.Norms
    gradients: Weights | None
    """∂E/∂W; None once it has been measured, since only the norms add up"""
    nonfinite: NonFiniteOrigin | None


class RecordedSequence(Sequence):
    """Calls of a layer of `unvanish.nn`."""

    def __init__(self, name: str, catch: Any) -> None:
        super().__init__(name, catch)
        self.calls: list[_Call] = []
        self.open = True

    @property
    def steps(self) -> int:
        return sum(call.steps for call in self.calls)

    def add(self, call: RecordedCall) -> None:
        """A call that has just returned."""
        call.sequence, call.index = self, len(self.calls)
        self.calls.append(call.facts)
        self.ragged |= bool((call.facts.lengths < call.facts.steps).any())

    def title(self, place: str) -> str:
        """The name of the record of one layer and direction."""
        return f"{self.name}.{place}" if self.name else place

    def receive(self, key: Hashable, observed: _Observed) -> None:
        """The measurements of a backward pass."""
        self._catch(self, key, observed)

    def close(self) -> None:
        self.open = False

    def arrive(self, errors: Errors) -> list[Measured]:
        # The engine itself adds the gradients of several backward passes; ∂E/∂W is needed for this one alone.
        found = self.measure(self.errors | errors)
        for key, observed in errors.items():
            self.errors[key] = observed._replace(gradients=None)
        return found

    def measure(self, errors: Errors) -> list[Measured]:
        return [
            join([self._measure_call(i, call, name, errors) for i, call in enumerate(self.calls)], self)
            for name in self.calls[0].places
        ]

    def _measure_call(self, index: int, call: _Call, name: str, errors: Errors) -> Measured:
        statistics, place = call.statistics[name], call.places[name]
        starts = sorted(statistics)
        observed: list[_Observed | None] = [errors.get((index, name, start)) for start in starts]
        gradients: dict[Hashable, Tensor] = {}
        for found in (h.gradients for h in observed if h is not None and h.gradients is not None):
            both = (found.w_ih, found.w_hh)
            for key, i in place.keys.items():
                if (g := both[i]) is not None:
                    gradients[key] = gradients[key] + g if key in gradients else g
        record = layer_flow(
            self.title(name),
            place.cell,
            call.lengths,
            [statistics[start] for start in starts],
            [None if h is None else h.norms for h in observed],
        )
        if call.order is not None:
            record = reorder(record, call.order.argsort())
        read = observed[::-1] if place.reverse else observed
        return Measured(record, gradients, first_origin(None if h is None else h.nonfinite for h in read))
