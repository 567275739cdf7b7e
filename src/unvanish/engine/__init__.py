"""One recurrent layer over one sequence, on a ladder of rungs with one signature: native, fused, manual,
reference.

Belongs here: how one layer runs over one sequence, forwards and backwards, and which rung does it.
Does not: modules and parameters (`nn`), the equations of a cell (`cells`), what a record shows (`flow`).
"""

from unvanish.engine.dispatch import RUNGS, Choice, adjoint, explain, force, gradients_of_weights, run, trace
from unvanish.engine.manual import Deltas, Trace, weight_gradients
from unvanish.engine.native import isa
from unvanish.engine.native_trace import adjoint_of_steps, propagate
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
    "adjoint_of_steps",
    "explain",
    "force",
    "gradients_of_weights",
    "isa",
    "propagate",
    "run",
    "trace",
    "weight_gradients",
]
