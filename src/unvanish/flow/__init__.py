"""Measuring the gradient's flow through time. Exact; changes no model.

Belongs here: exact measurements of a layer or model, their records, and the display of these.
Does not: verdicts and causes (`diagnosis`), anything that changes a model (`cures`).

- `watch(model)`: dh, dc, dgates, dweight, gates, saturation and residual of a whole model
- `adjoint_map(layer, x, sources=...)`: ‖∂E_k/∂s_t‖, one error source at a time
- `decompose(layer, x)`: which path carries the gradient: forget gate, carry, input gate, candidate, output gate
- `source_gradients(layer, x, error=error)`: ‖∂E_k/∂W‖ of each source and of their partial sums
- `lyapunov(layer, x, n=8)`: exponents of the full state; also `jacobian`, `singular_values`
- `survival(layer, x, lag=100)`: the fraction of the gradient that remains a lag earlier
- `from_arrays("lstm", weights, x, dy)`: the record of a layer of Keras, JAX or any other framework
- `audit(model, x, y, loss=...)`: compares the backend's gradients with a float64 reference, layer by layer
- `gate_statistics(layer, x)`: how open the gates are and how long each unit remembers
- `GradientFlow(every=100)`: a Lightning callback that logs rate, half-life and reach of every layer
- `read_stream(folder)`: the records of a training watched with `watch(model, every=100, stream=folder)`
"""

from typing import TYPE_CHECKING, Any

from unvanish.flow.adjoint_map import AdjointMap, adjoint_map
from unvanish.flow.audit import audit
from unvanish.flow.audit_report import Audit, LayerAudit
from unvanish.flow.decompose import StateTerms, Term, decompose
from unvanish.flow.files import Record, load
from unvanish.flow.from_arrays import from_arrays
from unvanish.flow.gates import GateStatistics, gate_statistics
from unvanish.flow.lyapunov import LyapunovSpectrum, jacobian, lyapunov, singular_values
from unvanish.flow.reach import Decay, decay
from unvanish.flow.record import Flow, LayerFlow, NoBackwardError, NonFiniteError
from unvanish.flow.stream import read_stream
from unvanish.flow.subgradients import SourceGradients, source_gradients
from unvanish.flow.survival import survival
from unvanish.flow.textbook_product import TextbookProduct
from unvanish.flow.watch import mark, watch
from unvanish.flow.watcher import Watch

if TYPE_CHECKING:
    from unvanish.flow.callback import GradientFlow

__all__ = [
    "AdjointMap",
    "Audit",
    "Decay",
    "Flow",
    "GateStatistics",
    "GradientFlow",
    "LayerAudit",
    "LayerFlow",
    "LyapunovSpectrum",
    "NoBackwardError",
    "NonFiniteError",
    "Record",
    "SourceGradients",
    "StateTerms",
    "Term",
    "TextbookProduct",
    "Watch",
    "adjoint_map",
    "audit",
    "decay",
    "decompose",
    "from_arrays",
    "gate_statistics",
    "jacobian",
    "load",
    "lyapunov",
    "mark",
    "read_stream",
    "singular_values",
    "source_gradients",
    "survival",
    "watch",
]


def __getattr__(name: str) -> Any:
    """The callback is imported on first use: importing Lightning takes longer than everything else together."""
    if name == "GradientFlow":
        from unvanish.flow.callback import GradientFlow

        return GradientFlow
    raise AttributeError(f"module 'unvanish.flow' has no attribute {name!r}")
