"""Measuring the gradient's flow through time. Exact; changes no model."""

from unvanish.flow.reach import Decay, decay
from unvanish.flow.record import Flow, LayerFlow, NoBackwardError, NonFiniteError
from unvanish.flow.watch import Watch, mark, watch

load = Flow.load

__all__ = ["Decay", "Flow", "LayerFlow", "NoBackwardError", "NonFiniteError", "Watch", "decay", "load", "mark", "watch"]
