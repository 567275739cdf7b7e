"""What the tests of test_fused*.py share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.strategies import LayerCase
from unvanish import engine
from unvanish.cells import CELLS
from unvanish.engine import fused

TORCHS = [name for name, cell in CELLS.items() if cell.torch_kernel is not None]
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


@contextmanager
def pieces_of(steps: int) -> Iterator[None]:
    """Sequences are read in pieces of so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "PIECE_STEPS", steps)
        patch.setattr(fused, "PIECE_ELEMENTS", 1)
        yield


def traced(
    case: LayerCase, rung: str, dy: Tensor | None, dfinal: tuple[Tensor | None, ...], follows: bool
) -> tuple[engine.Trace, engine.Deltas]:
    state, w = tuple(s.detach() for s in case.state), case.weights.detach()
    with engine.force(rung):
        tr = engine.trace(case.cell, case.x.detach(), state, w, case.lengths, case.reverse, follows)
        return tr, engine.adjoint(tr, dy, dfinal)


def present(v: Tensor | None, tr: engine.Trace) -> Tensor | None:
    """v `[T, B, ...]`, 0 where a sample is inactive."""
    if v is None or tr.active is None:
        return v
    return torch.where(tr.active.reshape(*tr.active.shape[:2], *(1,) * (v.dim() - 2)), v, 0.0)


def everything(tr: engine.Trace, flow: engine.Deltas) -> list[Tensor | None]:
    by_step = [*tr.before, *tr.after, tr.gates, *flow.dstate, flow.da, flow.da_hh]
    made = engine.weight_gradients(tr, flow)
    return [present(v, tr) for v in by_step] + [*tr.final, *flow.dinitial, *made]
