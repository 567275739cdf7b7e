"""The recurrent layers' passes within a model's call, in one graph, for penalties on Jacobians."""

from typing import Any

from torch import nn

from unvanish import engine
from unvanish.capture import Call, Capture
from unvanish.cells import State
from unvanish.cures.layer_weights import recurrent_modules
from unvanish.engine.precision import full_precision
from unvanish.nn.modules import (
    LayerDirection,
    SequenceModule,
    TimeMajor,
    evaluating,
    initial_states,
    layer_directions,
    run_layers,
    time_major,
)

Traced = dict[str, list[tuple[TimeMajor, engine.Trace]]]
"""layer name ("encoder.lstm.l0") → (input, pass) of each call"""


class TracedModel:
    """Runs a model and keeps the passes of its nn.RNN, nn.LSTM, nn.GRU and `unvanish.nn.Recurrent`, differentiable in
    all weights that shape them.

    Raises:
        TypeError: model is not a module, or holds cells, which have no sequence of their own.
        ValueError: there is no recurrent layer.
    """

    def __init__(self, model: nn.Module, cure: str) -> None:
        self._model = model
        for path, module in recurrent_modules(model, cure, called=True).items():
            if not isinstance(module, SequenceModule):
                raise TypeError(
                    f"model: {cure} expected nn.RNN, nn.LSTM, nn.GRU or unvanish.nn.Recurrent, but {path!r} is a "
                    f"{type(module).__name__}, which has no sequence of its own; use the layer that runs them whole"
                )

    def __call__(self, *args: Any, **kwargs: Any) -> Traced:
        """model(*args, **kwargs), and the passes that ran in it; dropout between layers is off.

        Raises:
            ValueError: no recurrent layer ran, or one could not be read.
        """
        calls: list[Call] = []
        with Capture(self._model, calls.append, without_gradients=True) as capture:
            self._model(*args, **kwargs)
        for name, why in capture.problems.items():
            raise ValueError(f"model: {name or 'it'}: {why}")
        if not calls:
            raise ValueError("model: none of its recurrent layers ran on this input")
        found: Traced = {}
        for call in calls:
            with full_precision():
                for d, inputs, tr in _traces(call):
                    found.setdefault(f"{call.name}.{d.name}".removeprefix("."), []).append((inputs, tr))
        return found


def _traces(call: Call) -> list[tuple[LayerDirection, TimeMajor, engine.Trace]]:
    module: Any = call.module
    inputs = time_major(module, call.x, call.lengths)
    with evaluating(module):
        layers = layer_directions(module)
    # Under autocast the input may have another dtype.
    dtype = layers[0].weights.w_ih.dtype
    states = [tuple(s.to(dtype) for s in state) for state in initial_states(module, call.hx, inputs)]

    def run(d: LayerDirection, x: Any, state: State) -> engine.Trace:
        return engine.trace(d.cell, x, state, d.weights, inputs.lengths, d.reverse)

    traces = run_layers(layers, inputs.x.to(dtype), states, run)
    return [(d, inputs, tr) for d, tr in zip(layers, traces, strict=True)]
