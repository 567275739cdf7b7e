"""Wider recurrent layers, behind the interface that the rest of the model expects."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import rnn as torchs
from torch.nn.utils.rnn import PackedSequence

from unvanish.cures.hidden_state import HiddenState, joined
from unvanish.cures.layer_weights import recurrent_modules
from unvanish.cures.stand_in import check_place, take_places
from unvanish.cures.state_read import has_hooks
from unvanish.nn.layers import ADDED
from unvanish.nn.modules import RecurrentModule, as_states, cell_of
from unvanish.nn.recurrent import Recurrent

CELLS = (torchs.RNNCell, torchs.LSTMCell, torchs.GRUCell)
"""the single steps that `widen_` takes"""


def widen_(model: nn.Module, hidden_size: int) -> nn.Module:
    """Give every recurrent layer more units, and project its output back to the width that the model expects:

        h_t = P s_t,    s_t `[K]` the wider layer's state,    P `[H, K]` learnt

    The first H of the K units are those of before, with their weights, and read none of the others; P starts as
    [I, 0]. So the model computes at first what it did (where the cell multiplies with its matrices as they are), and
    training makes use of the new units. The rest of the model stays as it is, the width of what its head reads too.

    Args:
        model: any module with torch's RNN, LSTM, GRU, their cells, those of `unvanish.nn` or `Recurrent` in it,
            changed in place; or such a layer itself, which stays as it is.
        hidden_size: K; layers that have as many units or more stay.

    Returns:
        model; the wider layer if model was the layer itself. The new units' weights are drawn as the layer draws them;
        create the optimizer again. A state that is returned has the width H and carries the K units inside, so that it
        can be passed back; a state from elsewhere sets the first H units, and the others start as in an initial state.

    Raises:
        TypeError, ValueError: hidden_size is not a positive whole number; no layer is narrower; one is of a subclass
            (its own behaviour would be lost), is parametrized, has hooks or a projection (`proj_size`), or a cell that
            is `given` shares.

    >>> import torch
    >>> model = nn.ModuleDict({"rnn": nn.LSTM(3, 2, batch_first=True)})
    >>> y, (h, c) = widen_(model, 16)["rnn"](torch.zeros(4, 5, 3))
    >>> y.shape, h.shape, model["rnn"].inner
    (torch.Size([4, 5, 2]), torch.Size([1, 4, 2]), LSTM(3, 16, batch_first=True))

    Source: growing without changing the function: Chen, Goodfellow & Shlens 2016, arXiv:1511.05641; the projection:
    Sak, Senior & Beaufays 2014, arXiv:1402.1128.
    """
    if isinstance(hidden_size, bool) or not isinstance(hidden_size, int):
        raise TypeError(f"hidden_size: expected a whole number, got {type(hidden_size).__name__}")
    if hidden_size < 1:
        raise ValueError(f"hidden_size: expected at least 1, got {hidden_size}")
    found: dict[str, Any] = recurrent_modules(model, "widen_", called=True)
    narrow = {path: m for path, m in found.items() if m.hidden_size < hidden_size}
    if not narrow:
        raise ValueError(f"hidden_size: expected more units than a layer of the model has, got {hidden_size}")
    for path, module in narrow.items():
        check_widens(path or "it", module)
    return take_places(model, {id(module): Widened(module, hidden_size) for module in narrow.values()})


def check_widens(path: str, module: nn.Module) -> None:
    """Raises:
    ValueError: the module can't be widened from outside without losing something.
    """
    if type(module) not in CELLS:
        check_place(path, module, "widen_")
    elif has_hooks(module):
        raise ValueError(f"model: {path} has hooks, which would be lost; remove them first")


class Widened(nn.Module):
    """A recurrent layer or cell of K units with the interface of one of H units; see `widen_`.

    The layer itself is the submodule `inner`, so that whatever acts on such layers finds it. Its options
    (`batch_first`, `num_layers`, `flatten_parameters`, …) are this module's too; `hidden_size` is H.
    """

    def __init__(self, like: Any, width: int) -> None:
        super().__init__()
        self.hidden_size = like.hidden_size
        self._single_step = isinstance(like, nn.RNNCellBase)
        self.inner: nn.Module = _wider(like, width)
        weight = next(like.parameters())
        places = 1 if self._single_step else like.num_layers * (2 if like.bidirectional else 1)
        read = torch.eye(like.hidden_size, width, dtype=weight.dtype, device=weight.device)
        self.projection = nn.Parameter(read.repeat(places, 1, 1))
        """P of each layer and direction, `[L·D, H, K]`"""
        self.train(like.training)

    def forward(self, input: Any, hx: Any = None, **options: Any) -> Any:
        """As the layer's."""
        given = None if hx is None else self._states(hx)
        if self._single_step:
            return self._returned(self.inner(input, given, **options))
        y, final = self.inner(input, given, **options)
        if isinstance(y, PackedSequence):
            return y._replace(data=self._output(y.data)), self._returned(final)
        return self._output(y), self._returned(final)

    def _output(self, y: Tensor) -> Tensor:
        """`[…, D·K]` → `[…, D·H]`, by the last layer's projections."""
        directions = 2 if self.inner.bidirectional else 1
        parts = zip(y.chunk(directions, -1), self.projection[-directions:], strict=True)
        return torch.cat([nn.functional.linear(part, p) for part, p in parts], -1)

    def _returned(self, final: Any) -> Any:
        """Each state at the width H, with the wide one inside."""
        states = [joined(self._narrow(s), s) for s in as_states(final)]
        return tuple(states) if isinstance(final, tuple) else states[0]

    def _narrow(self, s: Tensor) -> Tensor:
        if self._single_step:
            return nn.functional.linear(s, self.projection[0])
        return torch.einsum("l...k,lhk->l...h", s, self.projection)

    def _states(self, hx: Any) -> Any:
        """The wide states: those that a state carries, or a state from elsewhere extended by the cell's start."""
        cell = cell_of(self.inner)  # type: ignore[arg-type]
        more = self.projection.shape[-1] - self.hidden_size
        starts = [cell.initial.get(name, 0.0) for name in cell.states]
        states = [
            s.others[0] if isinstance(s, HiddenState) else nn.functional.pad(s, (0, more), value=start)
            for s, start in zip(as_states(hx), starts, strict=True)
        ]
        return tuple(states) if isinstance(hx, tuple | list) else states[0]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def _wider(like: Any, width: int) -> Any:
    """A layer of `width` units whose first ones are those of `like`, and read none of the others."""
    weight = next(like.parameters())
    options: dict[str, Any] = {"bias": bool(like.bias), "device": weight.device, "dtype": weight.dtype}
    if not isinstance(like, nn.RNNCellBase):
        options |= {k: getattr(like, k) for k in ("num_layers", "batch_first", "dropout", "bidirectional")}
    if hasattr(like, "nonlinearity"):
        options["nonlinearity"] = like.nonlinearity
    sizes = (*((like.cell,) if isinstance(like, Recurrent) else ()), like.input_size, width)
    kind: Any = type(like)
    new = kind(*sizes, **options)
    for option in ADDED:
        if hasattr(like, option):
            setattr(new, option, getattr(like, option))
    with torch.no_grad():
        for name, old in like.named_parameters():
            parameter = new.get_parameter(name)
            _write(parameter, old, like.hidden_size, width)
            parameter.requires_grad_(old.requires_grad)
    return new


def _write(new: Tensor, old: Tensor, narrow: int, width: int) -> None:
    """The old units' rows and columns into those of the wider layer; their columns of new units are 0.

    Rows come in blocks of one gate each; columns, where they are units, in blocks of one direction each.
    """
    rows, old_rows = new.view(-1, width, *new.shape[1:]), old.view(-1, narrow, *old.shape[1:])
    if old.dim() == 1 or new.shape[1] == old.shape[1]:
        rows[:, :narrow] = old_rows
        return
    rows[:, :narrow] = 0
    columns = rows.unflatten(-1, (-1, width))
    columns[:, :narrow, :, :narrow] = old_rows.unflatten(-1, (-1, narrow))


def can_widen(model: nn.Module, hidden_size: int) -> bool:
    """Whether `widen_` takes the model."""
    narrow = {p: m for p, m in model.named_modules() if isinstance(m, RecurrentModule) and m.hidden_size < hidden_size}
    try:
        recurrent_modules(model, "widen_", called=True)
        for path, module in narrow.items():
            check_widens(path, module)
    except ValueError:
        return False
    return bool(narrow)
