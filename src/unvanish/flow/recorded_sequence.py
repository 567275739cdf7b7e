"""A watched layer of `unvanish.nn`: the engine measures as it runs, so nothing is replayed and nothing kept."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from unvanish import engine
from unvanish.cells import Weights
from unvanish.flow.nonfinite import Birth, birthplace
from unvanish.flow.sequences import Errors, Measured, Sequence, join, weight_keys
from unvanish.flow.summary import layer_flow, reorder
from unvanish.nn.modules import LayerDirection, layer_directions, time_major


class RecordedCall:
    """One call of a layer: what its forward pass said of the gates, and who hears of the errors."""

    def __init__(self) -> None:
        self.statistics: dict[str, dict[int, engine.Statistics]] = {}
        """layer and direction → first step of a checkpointed piece (0: all) → statistics"""
        self.sequence: RecordedSequence | None = None
        self.index = 0

    @torch.no_grad()
    def join(self, sequence: "RecordedSequence", x: Any, lengths: Any) -> None:
        """The call has returned, as the next of a sequence."""
        self.sequence, self.index = sequence, len(sequence.calls)
        self.layers = [d._replace(weights=Weights(*d.weights[:2])) for d in layer_directions(sequence.module)]
        inputs = time_major(sequence.module, x, lengths)
        self.steps, B = inputs.x.shape[:2]
        self.order = inputs.order
        self.lengths = torch.full((B,), self.steps) if inputs.lengths is None else inputs.lengths.cpu()

    def __call__(self, place: str, start: int) -> "_Ear":
        return _Ear(self, place, start)

    def name(self, place: str) -> str:
        assert self.sequence is not None
        return f"{self.sequence.name}.{place}" if self.sequence.name else place

    def complete(self, module: nn.RNNBase, x: Any) -> bool:
        """Whether every layer and direction was recorded, and will hear of the error that comes back."""
        data = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
        layers = layer_directions(module)
        return len(self.statistics) == len(layers) and (
            data.requires_grad or all(any(w is not None and w.requires_grad for w in d.weights) for d in layers)
        )


class _Ear:
    """Hears of one layer and direction of a call; an `engine.Recorder`."""

    def __init__(self, call: RecordedCall, place: str, start: int) -> None:
        self.call, self.place, self.start = call, place, start

    @property
    def listening(self) -> bool:
        return self.call.sequence is not None and self.call.sequence.open

    def forward(self, statistics: engine.Statistics) -> None:
        self.call.statistics.setdefault(self.place, {})[self.start] = statistics

    def backward(self, norms: engine.Norms, gradients: Weights, replay: engine.Replay) -> None:
        call = self.call
        assert call.sequence is not None
        present = torch.arange(self.start, self.start + len(norms.h))[:, None] < call.lengths[None, :]
        gates = call.statistics[self.place][self.start].mean
        finite = all(bool(v.isfinite().all()) for v in (*norms, gates[present]) if v is not None)
        where = None if finite else birthplace(call.name(self.place), *replay(), self.start, call.order)
        call.sequence.hear((call.index, self.place, self.start), _Heard(norms, gradients, where))


class _Heard:
    """What came back to one piece of a layer and direction."""

    def __init__(self, norms: engine.Norms, gradients: Weights, nonfinite: Birth | None) -> None:
        self.norms, self.gradients, self.nonfinite = norms, gradients, nonfinite


class RecordedSequence(Sequence):
    """Calls of a layer of `unvanish.nn`."""

    def __init__(self, name: str, module: nn.RNNBase, catch: Any) -> None:
        super().__init__(name, catch)
        self.module = module
        self.calls: list[RecordedCall] = []
        self.open = True

    @property
    def steps(self) -> int:
        return sum(call.steps for call in self.calls)

    def add(self, call: RecordedCall, x: Any, lengths: Any) -> None:
        """A call that has just returned."""
        call.join(self, x, lengths)
        self.calls.append(call)

    def hear(self, key: Hashable, heard: _Heard) -> None:
        """An error has come back."""
        self._catch(self, key, heard)

    def close(self) -> None:
        self.open = False

    def arrive(self, errors: Errors) -> list[Measured]:
        # The engine adds the errors of several backwards itself; ∂E/∂W is wanted of these alone.
        self.errors |= errors
        return self.measure(errors)

    def measure(self, errors: Errors) -> list[Measured]:
        found = []
        for place in self.calls[0].layers:
            keys = weight_keys(self.module, place)
            pieces = [self._measure_call(call, place, errors, keys) for call in self.calls]
            found.append(join(pieces, tuple(self.detached)))
        return found

    def _measure_call(
        self, call: RecordedCall, place: LayerDirection, errors: Errors, keys: dict[Hashable, int]
    ) -> Measured:
        statistics = call.statistics[place.name]
        starts = sorted(statistics)
        heard = [self.errors.get((call.index, place.name, start)) for start in starts]
        gradients: dict[Hashable, Tensor] = {}
        arrived = [errors[key] for start in starts if (key := (call.index, place.name, start)) in errors]
        for now in arrived:
            for key, i in keys.items():
                gradients[key] = gradients[key] + now.gradients[i] if key in gradients else now.gradients[i]
        record = layer_flow(
            call.name(place.name),
            place.cell,
            call.lengths,
            [statistics[start] for start in starts],
            [None if h is None else h.norms for h in heard],
        )
        if call.order is not None:
            record = reorder(record, call.order.argsort())
        # What was born on the way forward comes first, and is carried on; so is what was born on the way back.
        read = heard[::-1] if place.reverse else heard
        births = [h.nonfinite for h in read if h is not None and h.nonfinite is not None]
        born = next((b for b in births if b.forward), births[-1] if births else None)
        return Measured(record, gradients, None if born is None else born.sentence)
