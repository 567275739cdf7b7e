"""Replacing plain RNNs in a model by cells with a carry, behind the same interface."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import rnn as torchs

from unvanish.cells import ZOO, Cell
from unvanish.cures.hidden_state import HiddenOnly
from unvanish.cures.layer_weights import is_plain, recurrent_modules
from unvanish.cures.stand_in import take_places
from unvanish.cures.state_read import has_hooks
from unvanish.nn.layers import ADDED, GRU, LSTM, RNN
from unvanish.nn.modules import cell_of
from unvanish.nn.recurrent import Recurrent

# `replace_` names classes: the successor has to read the constructor's arguments as the class it replaces did.
_PLAIN = (torchs.RNN, torchs.RNNCell)
_TORCHS: dict[str, tuple[Any, Any, Any]] = {
    "lstm": (torchs.LSTM, torchs.LSTMCell, LSTM),
    "gru": (torchs.GRU, torchs.GRUCell, GRU),
}
"""name → (layer, single cell, layer of unvanish.nn) that takes a plain RNN's place"""
REPLACEABLE = (*_PLAIN, RNN)
"""the classes of torch's layers that `replace_` takes; ours after `restore`"""


def replace_(model: nn.Module, by: str | Cell) -> nn.Module:
    """Replace every plain RNN by another cell, so that the state has a carry along which gradients survive:

        h_t = φ(W x_t + U h_{t-1})   →   c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t   or   h_t = (1 − z_t) ⊙ n_t + z_t ⊙ h_{t-1}

    or whatever `by` computes. Sizes, layers, directions, dropout, batch_first, bias, dtype, device and training mode
    are kept, and so is the interface: a cell with several states returns h alone, which carries the others with it, so
    that `y, h = rnn(x, h)`, `h[-1]` and `h.detach()` between pieces of truncated BPTT work as before. (With an h that
    the caller recomputed the others start as in an initial state.)

    Args:
        model: any module with nn.RNN, nn.RNNCell, or `unvanish.nn.Recurrent` of such a cell in it, changed in place; or
            such a layer itself, which is left alone.
        by: "lstm" or "gru" for torch's layers (`unvanish.nn`'s in the place of a Recurrent); any other name in
            `unvanish.cells.ZOO`, or a cell of your own, for `unvanish.nn.Recurrent`.

    Returns:
        model; the new layer if model was the RNN itself. Weights are new, drawn as the layer draws them: give them a
        start with `chrono_` or `forget_bias_`, and create the optimizer again. Other LSTMs and GRUs in the model stay.

    Raises:
        TypeError: model is not a module, or `by` is neither a name nor a cell.
        ValueError: `by` names no cell; there is no plain RNN; one is of a subclass (its own behaviour would be lost;
            for unvanish.nn call `restore` first), is parametrized or has hooks.

    Source: Hochreiter & Schmidhuber 1997 (LSTM); Cho et al. 2014 (GRU); the others where the cell says.

    Limits: H stays, so the layer has as many times the weights as the cell has gates; nonlinearity= has no counterpart.
    torch.jit can't compile the state that carries others. `h.detach_()` is refused by torch; use `h.detach()`. A single
    step of a cell that torch does not have runs as a sequence of one.

    >>> import torch
    >>> model = nn.ModuleDict({"rnn": nn.RNN(3, 4, batch_first=True)})
    >>> y, h = replace_(model, "lstm")["rnn"](torch.zeros(2, 5, 3))
    >>> h.shape, model["rnn"].batch_first
    (torch.Size([1, 2, 4]), True)
    >>> replace_(nn.RNN(3, 4), "mgu")
    Recurrent(MGU(), 3, 4)
    """
    if not isinstance(by, str | Cell):
        raise TypeError(f"by: expected the name of a cell or an unvanish.Cell, got {type(by).__name__}")
    if isinstance(by, str) and by not in ZOO:
        raise ValueError(f"by: expected a cell or one of {', '.join(ZOO)}, got {by!r}")
    found = recurrent_modules(model, "replace_", called=True)
    rnns: dict[str, Any] = {path: m for path, m in found.items() if isinstance(m, _PLAIN) or _is_plain_recurrent(m)}
    if not rnns:
        raise ValueError(
            "model: replace_ expected an nn.RNN, an nn.RNNCell or an unvanish.nn.Recurrent of such a cell in it; "
            f"{type(model).__name__} has none"
        )
    for path, rnn in rnns.items():
        _check(path or "it", rnn)
    new = {id(rnn): _successor(rnn, by) for rnn in rnns.values()}
    return take_places(model, new)


def _is_plain_recurrent(module: nn.Module) -> bool:
    return isinstance(module, Recurrent) and is_plain(module.cell)


def _check(path: str, rnn: nn.Module) -> None:
    if type(rnn) not in (*_PLAIN, Recurrent):
        raise ValueError(
            f"model: {path} is a {type(rnn).__module__}.{type(rnn).__name__}, whose own behaviour would be lost; "
            "remove its parametrization, or call unvanish.restore(model) first"
        )
    if has_hooks(rnn):
        raise ValueError(f"model: {path} has hooks, which would be lost; remove them first")


def _successor(rnn: Any, by: str | Cell) -> nn.Module:
    weight = next(rnn.parameters())
    like: dict[str, Any] = {"bias": bool(rnn.bias), "device": weight.device, "dtype": weight.dtype}
    sizes, single = (rnn.input_size, rnn.hidden_size), isinstance(rnn, nn.RNNCellBase)
    if not single:
        like |= {k: getattr(rnn, k) for k in ("num_layers", "batch_first", "dropout", "bidirectional")}
    if isinstance(by, str) and by in _TORCHS:
        layer, step, ours = _TORCHS[by]
        new = (step if single else ours if isinstance(rnn, Recurrent) else layer)(*sizes, **like)
        cell = cell_of(new)
    else:
        cell = ZOO[by]() if isinstance(by, str) else by
        new = Recurrent(cell, *sizes, **like)
        new = SingleStep(new) if single else new
    if isinstance(rnn, Recurrent):
        for option in ADDED:
            setattr(new, option, getattr(rnn, option))
    return (new if len(cell.states) == 1 else HiddenOnly(new, cell, single)).train(rnn.training)


class SingleStep(nn.Module):
    """A cell's single step behind the interface of nn.RNNCell: h = cell(x, h), or all states if there are several."""

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor, hx: Tensor | tuple[Tensor, ...] | None = None) -> Any:
        """`[B, I]` or `[I]` → `[B, H]` or `[H]`, each state."""
        given = tuple(s.unsqueeze(0) for s in hx) if isinstance(hx, tuple) else None if hx is None else hx.unsqueeze(0)
        _, final = self.layer(input.unsqueeze(0), given)
        return tuple(s.squeeze(0) for s in final) if isinstance(final, tuple) else final.squeeze(0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)
