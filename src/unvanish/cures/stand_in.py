"""Modules that take the place of recurrent layers in a model, with the same parameters and interface."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import rnn as torchs
from torch.nn.utils.rnn import PackedSequence

from unvanish.cells import State
from unvanish.cures.layer_weights import layers_of
from unvanish.cures.state_read import has_hooks
from unvanish.nn.layers import EngineSequence
from unvanish.nn.modules import SequenceModule, TimeMajor, as_states, in_layout, time_major
from unvanish.nn.recurrent import Recurrent

RunLayer = Callable[[int, Tensor, list[State] | None, TimeMajor], tuple[Tensor, State]]
"""(layer, its input `[T, B, ·]`, its directions' initial states or None, the whole input) → (output, final states
`[D, B, H]`)"""


class StandIn(nn.Module):
    """Layers with the interface of the layer that they replace: (output, final state) of x `[T, B, I]`, `[B, T, I]`,
    `[T, I]` or packed, with hx and `lengths=`. A subclass defines how one of them runs."""

    def __init__(self, like: SequenceModule) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = like.input_size, like.hidden_size, like.num_layers
        self.bias, self.batch_first, self.dropout = bool(like.bias), like.batch_first, like.dropout
        self.bidirectional, self.cell, self.proj_size = like.bidirectional, layers_of(like)[0].cell, 0

    @property
    def _directions(self) -> range:
        return range(2 if self.bidirectional else 1)

    def _run(
        self, input: Tensor | PackedSequence, hx: Any, lengths: Tensor | Sequence[int] | None, layer: RunLayer
    ) -> tuple[Any, Any]:
        own: Any = self
        inputs = time_major(own, input, lengths)
        y, finals, n_dir = inputs.x, list[State](), len(self._directions)
        given = None if hx is None else self._rows(hx, inputs)
        for k in range(self.num_layers):
            if k and self.dropout and self.training:
                y = nn.functional.dropout(y, self.dropout)
            y, final = layer(k, y, None if given is None else given[k * n_dir : (k + 1) * n_dir], inputs)
            finals.append(final)
        joined = tuple(torch.cat(s) for s in zip(*finals, strict=True))
        return in_layout(own, input, inputs, y, joined)

    def _rows(self, hx: Any, inputs: TimeMajor) -> list[State]:
        """The initial states by layer and direction, samples in internal order."""
        states = [s.unsqueeze(1) if s.dim() == 2 else inputs.in_internal_order(s, 1) for s in as_states(hx)]
        shape = (self.num_layers * len(self._directions), inputs.x.shape[1], self.hidden_size)
        if [s.shape for s in states] != [shape] * len(self.cell.states):
            names, found = ", ".join(f"{s}_0" for s in self.cell.states), [tuple(s.shape) for s in states]
            raise ValueError(f"hx: expected {names}, {shape} each, got {found}")
        return list(zip(*(s.unbind(0) for s in states), strict=True))


def check_place(path: str, module: Any, cure: str) -> None:
    """Check that a layer over sequences can be replaced without losing anything.

    Raises:
        ValueError: it is of a subclass, parametrized, has hooks or a projection, or a cell with `given` shares.
    """
    if type(module) not in (torchs.RNN, torchs.LSTM, torchs.GRU, Recurrent, *EngineSequence.__subclasses__()):
        raise ValueError(
            f"model: {path} is a {type(module).__module__}.{type(module).__name__}, whose own behaviour would be lost; "
            "remove its parametrization, or use the class it derives from"
        )
    if module.proj_size:
        raise ValueError(f"model: {path} has a projection, which {cure} does not know")
    if has_hooks(module):
        raise ValueError(f"model: {path} has hooks, which would be lost; remove them first")
    if isinstance(module, Recurrent) and module.cell.given:
        raise ValueError(f"model: the cell of {path} is given shares of its own, which {cure} does not know")


def take_places(model: nn.Module, new: dict[int, nn.Module]) -> nn.Module:
    """Replace modules by those in `new` (old module's id → new module); returns the model, or its own replacement. A
    module used in several places is replaced in all of them."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(model), model)
