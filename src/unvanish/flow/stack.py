"""A stacked module run forward with everything kept, from which the maps, terms and exponents are computed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.cells import State, calculus
from unvanish.engine.sequence import steps
from unvanish.nn.modules import (
    CellModule,
    LayerDirection,
    SequenceModule,
    TimeMajor,
    evaluating,
    initial_states,
    layer_directions,
    run_layers,
    time_major,
)


@dataclass(frozen=True)
class Stack:
    """Every layer and direction of a module over one input; dropout between layers is off, as in evaluation."""

    inputs: TimeMajor
    layers: list[LayerDirection]
    traces: list[engine.Trace]

    @property
    def directions(self) -> int:
        """1, or 2 when bidirectional."""
        return 2 if any(layer.reverse for layer in self.layers) else 1

    def index(self, at: str | None) -> int:
        """Position of the layer called `at`; None: the last layer's forward direction.

        Raises:
            ValueError: there is no such layer.
        """
        names = [layer.name for layer in self.layers]
        if at is None:
            return len(names) - self.directions
        if at not in names:
            raise ValueError(f"at: expected one of {', '.join(names)}, got {at!r}")
        return names.index(at)


@torch.no_grad()
def run_stack(
    layer: SequenceModule, x: Tensor | PackedSequence, hx: Any = None, lengths: Tensor | Sequence[int] | None = None
) -> Stack:
    """Run `layer` over x, in its own layout, from hx, zeros when None.

    Raises:
        TypeError, ValueError: layer is no recurrent module of torch or unvanish; x, hx or lengths does not fit.
    """
    with evaluating(layer):
        layers = layer_directions(layer)
    inputs = time_major(layer, x, lengths)
    check_input(layer, inputs)
    states = initial_states(layer, hx, inputs)
    for name, v in (("x", inputs.x), *(("hx", s) for s in states[0])):
        if v.dtype != layers[0].weights.w_ih.dtype:
            raise ValueError(f"{name}: expected the layer's dtype {layers[0].weights.w_ih.dtype}, got {v.dtype}")

    def run(d: LayerDirection, below: Tensor, state: State) -> engine.Trace:
        return engine.trace(
            d.cell, below, tuple(s.detach() for s in state), d.weights.detach(), inputs.lengths, d.reverse
        )

    return Stack(inputs, layers, run_layers(layers, inputs.x.detach(), states, run))


def check_input(layer: SequenceModule, inputs: TimeMajor) -> None:
    """Check that there are samples to measure, with as many features as the layer reads.

    Raises:
        ValueError: there are none, or their features do not fit.
    """
    columns = layer.columns if isinstance(layer, CellModule) else layer.input_size
    if inputs.x.shape[-1] != columns:
        raise ValueError(f"x: expected {columns} features, got {inputs.x.shape[-1]}")
    if inputs.x.shape[1] == 0:
        raise ValueError("x: expected one sample at least, got an empty batch")


def reading_order(tr: engine.Trace) -> Iterator[int]:
    """The steps as the layer reads them."""
    return steps(tr.x.shape[0], tr.reverse)


def full_jacobians(tr: engine.Trace, t: int) -> Tensor:
    """∂s_t/∂s_{t−1} `[B, S, S]`; the identity where a sample is inactive, whose state does not change."""
    sizes = tuple(s.shape[-1] for s in tr.final)
    jacobian = calculus.jacobian(tr.cell, tr.partials_by_step[t], tr.weights, sizes)
    if tr.active is None:
        return jacobian
    held = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
    return torch.where(tr.active[t].unsqueeze(-1), jacobian, held)
