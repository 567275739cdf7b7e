"""Measuring the gradient's flow through time. Exact; changes no model."""

from unvanish.flow.record import Flow, LayerFlow, NoBackwardError, NonFiniteError
from unvanish.flow.watch import Watch, mark, watch

load = Flow.load

__all__ = ["Flow", "LayerFlow", "NoBackwardError", "NonFiniteError", "Watch", "load", "mark", "watch"]
