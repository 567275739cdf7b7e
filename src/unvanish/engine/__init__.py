"""One recurrent layer over one sequence, on a ladder of rungs with one signature: native, fused, manual,
reference."""

from unvanish.engine.dispatch import RUNGS, Choice, adjoint, explain, force, run, trace
from unvanish.engine.manual import Deltas, Trace, weight_gradients
from unvanish.engine.native import isa
from unvanish.engine.recording import SATURATED, Norms, Pass, Recompute, Recorder, Statistics
from unvanish.engine.sequence import active_steps

__all__ = [
    "RUNGS",
    "SATURATED",
    "Choice",
    "Deltas",
    "Norms",
    "Pass",
    "Recompute",
    "Recorder",
    "Statistics",
    "Trace",
    "active_steps",
    "adjoint",
    "explain",
    "force",
    "isa",
    "run",
    "trace",
    "weight_gradients",
]
