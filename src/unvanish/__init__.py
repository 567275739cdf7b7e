"""unvanish: see, explain and cure vanishing gradients in recurrent networks.

import unvanish as uv

with uv.watch(model) as flow:
    loss_fn(model(x), y).backward()
flow["lstm.l0"].dh          # [T, B] ‖∂E/∂h_t‖
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from unvanish import cells, cures, engine, flow, nn, report, train
    from unvanish.cells import Cell
    from unvanish.diagnosis import diagnose
    from unvanish.flow.audit import audit
    from unvanish.flow.watch import mark, watch
    from unvanish.nn import accelerate, restore
    from unvanish.report import plot

__version__ = "0.1.0"

__all__ = [
    "Cell",
    "__version__",
    "accelerate",
    "audit",
    "cells",
    "cures",
    "diagnose",
    "engine",
    "flow",
    "mark",
    "nn",
    "plot",
    "report",
    "restore",
    "train",
    "watch",
]

_FROM = {
    "audit": "flow.audit",
    "diagnose": "diagnosis",
    "mark": "flow.watch",
    "watch": "flow.watch",
    "accelerate": "nn",
    "restore": "nn",
    "Cell": "cells",
}


def __getattr__(name: str) -> _Any:
    """Import on first use: the command line's help must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'unvanish' has no attribute {name!r}")
    if name in _FROM:
        return getattr(_import_module(f"unvanish.{_FROM[name]}"), name)
    return _import_module("unvanish.report.plot" if name == "plot" else f"unvanish.{name}")


def __dir__() -> list[str]:
    return __all__
