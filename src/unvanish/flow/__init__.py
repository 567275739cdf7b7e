"""Measuring the gradient's flow through time. Exact; changes no model.

uv.watch(model)                             dh, dc, dgates, dweight, gates, saturation, residual of a whole model
uv.flow.adjoint_map(layer, x, sources=...)  ‖∂E_k/∂s_t‖, one error source at a time
"""

from unvanish.flow.adjoint_map import AdjointMap, adjoint_map
from unvanish.flow.reach import Decay, decay
from unvanish.flow.record import Flow, LayerFlow, NoBackwardError, NonFiniteError
from unvanish.flow.watch import Watch, mark, watch

load = Flow.load

__all__ = [
    "AdjointMap",
    "Decay",
    "Flow",
    "LayerFlow",
    "NoBackwardError",
    "NonFiniteError",
    "Watch",
    "adjoint_map",
    "decay",
    "load",
    "mark",
    "watch",
]
