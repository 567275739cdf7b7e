"""What the tests of test_program*.py share."""

from typing import Any

import pytest
import torch
from torch import Tensor

import unvanish as uv
from tests.test_conformance import Stages
from unvanish.cells import ZOO, Cell, Weights
from unvanish.engine import native

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason="the kernels are not built")
CELLS = {**ZOO, "stages": Stages}


def drawn(cell: Cell, T: int, B: int, I: int, H: int, dtype: torch.dtype, seed: int, bias: bool = True) -> Any:
    """x, initial states, weights and the errors at y and the final states."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).mul(0.6).to(dtype)

    G, Q, V = len(cell.input_gates), len(cell.sources), len(cell.vectors)
    w_hh, b_hh = (draw(Q * H, H), draw(Q * H)) if Q else (None, None)
    w = Weights(draw(G * H, I), w_hh, draw(G * H), b_hh, None, draw(V, H) if V else None)
    w = w if bias else w._replace(b_ih=None, b_hh=None)
    x, states = draw(T, B, I), tuple(draw(B, H) + cell.initial.get(a, 0.0) for a in cell.states)
    return x, states, w, draw(T, B, H), tuple(draw(B, H) for _ in cell.states)


def gradients(rung: str, cell: Cell, data: Any, lengths: Any = None, **options: Any) -> list[Tensor]:
    x, states, w, dy, dfinal = data
    leaves = [None if v is None else v.clone().requires_grad_() for v in (x, *states, *w)]
    n = len(states)
    y, final = uv.engine.run(
        cell, leaves[0], tuple(leaves[1 : 1 + n]), Weights(*leaves[1 + n :]), lengths, rung=rung, **options
    )  # type: ignore[arg-type]
    reached = [(o, d) for o, d in zip((y, *final), (dy, *dfinal), strict=True) if o.requires_grad]
    ends, errors = zip(*reached, strict=True)
    there = [v for v in leaves if v is not None]
    found = torch.autograd.grad(ends, there, errors, allow_unused=True, materialize_grads=True)
    return [y, *final, *found]
