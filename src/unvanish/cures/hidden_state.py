"""Several states behind the interface of one: h, with the others inside it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unvanish import torch_internals
from unvanish.cells import Cell


class HiddenState(Tensor):
    """h_t of a cell with several states, carrying the others along (the LSTM's c_t), for callers who pass a single
    tensor back and forth.

    It behaves as h. Operations that move, copy, select or mask it (`detach`, `to`, `h[:, idx]`, `h * mask`,
    `torch.where`, …) are applied to the others as well; any other result is a plain tensor.
    """

    others: tuple[Tensor, ...]
    """in the order of the cell's states"""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch_internals.as_plain_tensors():
            out = func(*args, **kwargs)
            if func not in _ALSO_TO_OTHERS or not isinstance(out, Tensor):
                return out
            number = max(len(s.others) for s in _states_in((*args, *kwargs.values())))
            others = [
                func(*(_other(a, i) for a in args), **{k: _other(v, i) for k, v in kwargs.items()})
                for i in range(number)
            ]
            return joined(out, *others)


def _states_in(values: Any) -> list[HiddenState]:
    found: list[HiddenState] = []
    for value in values:
        if isinstance(value, HiddenState):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _states_in(value)
    return found


def _other(value: Any, i: int) -> Any:
    """The same argument for the i-th of the others."""
    if isinstance(value, tuple | list):
        return type(value)(_other(v, i) for v in value)
    return value.others[i] if isinstance(value, HiddenState) else value


_METHODS = (
    "detach clone to cpu cuda float double half bfloat16 contiguous requires_grad_ __getitem__ index_select "
    "unsqueeze squeeze transpose mul mul_ __mul__ __rmul__ __imul__ masked_fill masked_fill_ where repeat_interleave"
)
_FUNCTIONS = "clone detach index_select mul where cat masked_fill repeat_interleave"
_ALSO_TO_OTHERS = {
    *(getattr(Tensor, name) for name in _METHODS.split()),
    *(getattr(torch, name) for name in _FUNCTIONS.split()),
    Tensor.data.__get__,  # type: ignore[attr-defined]
}


def joined(h: Tensor, *others: Tensor) -> HiddenState:
    """An h that carries the others."""
    state = h.as_subclass(HiddenState)
    state.others = others
    return state


class HiddenOnly(nn.Module):
    """A layer or cell of several states behind the plain RNN's interface: y, h = rnn(x, h), or h = cell(x, h). The
    other states travel inside h, see `HiddenState`.

    The layer itself is the submodule `inner`, so that whatever acts on such layers finds it; its attributes
    (`hidden_size`, `weight_hh_l0`, `flatten_parameters`, …) are this module's too.
    """

    def __init__(self, inner: nn.Module, cell: Cell, single_step: bool) -> None:
        super().__init__()
        self.inner, self._single_step = inner, single_step
        self._start: Mapping[str, float] = {name: cell.initial.get(name, 0.0) for name in cell.states[1:]}

    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        """As the RNN's; all states, (h, c), are accepted too."""
        if self._single_step:
            return joined(*self.inner(input, self._states(hx), **options))
        y, final = self.inner(input, self._states(hx), **options)
        return y, joined(*final)

    def _states(self, hx: Any) -> Any:
        """All states from the h of a plain RNN's caller; with an h from elsewhere the others are set to their start."""
        if hx is None or isinstance(hx, tuple | list):
            return hx
        if isinstance(hx, HiddenState):
            return (hx.as_subclass(Tensor), *hx.others)
        return (hx, *(torch.full_like(hx, value) for value in self._start.values()))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)
