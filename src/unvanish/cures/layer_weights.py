"""The targets of the cures: every layer and direction of torch's recurrent modules, and their gate blocks.

torch stacks the gates along the first axis: `weight_hh` is `[G·H, R]` and block γ (rows γH … γH+H) is W_hγ. It adds
two bias vectors `b_ih + b_hh`; a cure that speaks of *the* bias of a gate means that sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from unvanish.cells import Cell, Weights
from unvanish.nn.modules import CellModule, RecurrentModule, cell_of

M = TypeVar("M", bound=nn.Module)
"""A cure returns the module that it was given."""


@dataclass(frozen=True)
class Layer:
    """One layer and direction of a recurrent module."""

    module: RecurrentModule
    cell: Cell
    path: str
    """of the module in the model the user passed; "" for the model itself"""
    suffix: str
    """what torch appends to its weights' names: "_l0", "_l1_reverse"; "" for a cell module"""

    @property
    def label(self) -> str:
        """The layer's name in error messages."""
        return f"{self.path or type(self.module).__name__}{self.suffix}"

    def has(self, name: str) -> bool:
        """Whether the module has `name`, one of "weight_hh", "bias_ih", …, for this layer."""
        return getattr(self.module, name + self.suffix, None) is not None

    def weight(self, name: str) -> Tensor:
        """The weight as the forward pass sees it, parametrized or not."""
        return getattr(self.module, name + self.suffix)

    def weights(self) -> Weights:
        """All weights, as the cells' equations take them."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        if isinstance(self.module, CellModule):
            return self.module.direction_weights(*self.place)
        return Weights(*(self.weight(name) if self.has(name) else None for name in names))  # type: ignore[arg-type]

    def parameter(self, name: str, cure: str) -> nn.Parameter:
        """The weight as a parameter that can be written in place.

        Raises:
            ValueError: it is computed from other parameters, so that a write would be lost at the next forward pass.
        """
        found = self.module._parameters.get(name + self.suffix)
        if found is None:
            raise ValueError(
                f"{cure}: {name}{self.suffix} of {self.label!r} is parametrized, so it can't be set in place; "
                "initialise first and parametrize afterwards, or remove the parametrization"
            )
        return found

    @property
    def place(self) -> tuple[int, bool]:
        """(layer, whether it is the reverse direction) of a layer over sequences."""
        number, _, end = self.suffix.removeprefix("_l").partition("_")
        return int(number or 0), end == "reverse"

    def blocks(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Gate → its rows of a stacked weight or bias called `name` ("weight_hh", "bias_ih", …); views."""
        gates = tuple(self.cell.sources) if name.endswith("_hh") else self.cell.learnt_gates
        return dict(zip(gates, tensor.chunk(len(gates), dim=0), strict=True))

    def biases(self, gate: str, cure: str) -> list[Tensor]:
        """The gate's rows of each existing bias, as views to be written in place; their sum is the gate's bias.

        Raises:
            ValueError: there is none, or one is computed from other parameters.
        """
        found = []
        for name in ("bias_ih", "bias_hh"):
            gates = tuple(self.cell.sources) if name == "bias_hh" else self.cell.learnt_gates
            if gate in gates and self.has(name):
                found.append(self.blocks(name, self.parameter(name, cure))[gate])
        if not found:
            raise ValueError(
                f"module: {cure} sets a gate's bias, but {self.label!r} has bias=False; make it with bias=True"
            )
        return found


class ReadsWeights(nn.Module):
    """A module that reads the weights of an inner recurrent layer without ever calling the layer."""

    inner: nn.Module


def recurrent_modules(model: nn.Module, cure: str, *, called: bool = False) -> dict[str, RecurrentModule]:
    """Path → recurrent module, in the model's order.

    Args:
        called: whether the cure acts on how a layer runs, and not on its weights alone.

    Raises:
        TypeError: model is not a module.
        ValueError: there is none in it; with `called`, one is never called.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"module: {cure} expected a torch.nn.Module, got {type(model).__name__}")
    found = {path: m for path, m in model.named_modules() if isinstance(m, RecurrentModule)}
    if not found:
        raise ValueError(
            f"module: {cure} expected torch.nn.RNN, LSTM, GRU, one of their cells, unvanish.nn.Recurrent, or a module "
            f"that contains one; {type(model).__name__} contains none"
        )
    if called:
        read = {id(m.inner): type(m).__name__ for m in model.modules() if isinstance(m, ReadsWeights)}
        for path, m in found.items():
            if id(m) in read:
                raise ValueError(
                    f"module: {path!r} is run by a {read[id(m)]}, which {cure} does not know; apply {cure} without it"
                )
    return found


def layers_of(module: RecurrentModule, path: str = "") -> list[Layer]:
    """Its layers and directions, in torch's order."""
    cell = cell_of(module)
    if isinstance(module, nn.RNNCellBase):
        return [Layer(module, cell, path, "")]
    ends = ("", "_reverse") if module.bidirectional else ("",)
    return [Layer(module, cell, path, f"_l{k}{end}") for k in range(module.num_layers) for end in ends]


def recurrent_layers(
    model: nn.Module, cure: str, fits: Callable[[Cell], bool] = lambda cell: True, why: str = ""
) -> list[Layer]:
    """Every layer and direction in the model; all of them must be of a cell that the cure fits.

    Raises:
        TypeError: model is not a module, or the cure does not fit a cell.
        ValueError: there is no recurrent layer.
    """
    found = [layer for path, m in recurrent_modules(model, cure).items() for layer in layers_of(m, path)]
    for layer in found:
        if not fits(layer.cell):
            raise TypeError(
                f"module: {cure} does not fit {layer.label!r}, a {layer.cell.name}: {why}; pass the submodules it fits"
            )
    return found


def with_matrices(model: nn.Module, cure: str) -> list[tuple[Layer, nn.Parameter]]:
    """Every layer and direction with its W_hh, all checked before the first is written.

    Raises:
        TypeError: model is not a module, or a cell has no recurrent matrix.
        ValueError: there is no recurrent layer, or a W_hh is parametrized.
    """
    layers = recurrent_layers(model, cure, lambda cell: bool(cell.sources), "it has no recurrent matrix")
    return [(layer, layer.parameter("weight_hh", cure)) for layer in layers]


def is_plain(cell: Cell) -> bool:
    """h_t = φ(W x_t + U h_{t-1}): one gate, one state, nothing carried."""
    return len(cell.gates) == len(cell.states) == len(cell.sources) == 1 and not cell.carries


def finite(name: str, value: float, above: float = -math.inf) -> float:
    """The number, checked: finite and > above.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or not value > above:
        expected = "a finite number" if above == -math.inf else f"a finite number above {above:g}"
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return float(value)


def draws_on(generator: torch.Generator | None) -> torch.device:
    """The device to draw on: the generator's, else the CPU, so that a seed gives the same numbers everywhere."""
    return torch.device("cpu") if generator is None else generator.device
