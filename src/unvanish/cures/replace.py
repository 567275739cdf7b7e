"""Replacing plain RNNs in a model by GRUs or LSTMs, behind the interface their callers know."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from unvanish import torch_internals
from unvanish.cures.layers import recurrent_modules
from unvanish.nn.layers import RNN
from unvanish.nn.modules import cell_of

# `replace_` names classes: the successor has to read the constructor's arguments as the class it replaces did.
_PLAIN = (nn.RNN, nn.RNNCell)
_SUCCESSORS: dict[str, tuple[Any, Any]] = {"lstm": (nn.LSTM, nn.LSTMCell), "gru": (nn.GRU, nn.GRUCell)}
"""name → (layer, single cell) that takes a plain RNN's place"""
REPLACEABLE = (*_PLAIN, RNN)
"""the classes that `replace_` takes; ours after `restore`"""


class HiddenState(Tensor):
    """h_t of an LSTM, carrying its c_t along, for callers who hand one tensor back and forth.

    It is h in every respect. What moves, copies, selects or masks it (`detach`, `to`, `h[:, idx]`, `h * mask`,
    `torch.where`, …) is done to c as well; any other result is a plain tensor.
    """

    c: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch_internals.as_plain_tensors():
            out = func(*args, **kwargs)
            if func not in _ALSO_TO_C or not isinstance(out, Tensor):
                return out
            c = func(*map(_c_of, args), **{k: _c_of(v) for k, v in kwargs.items()})
            return joined(out, c)


def _c_of(value: Any) -> Any:
    """The same argument for c."""
    if isinstance(value, tuple | list):
        return type(value)(map(_c_of, value))
    return value.c if isinstance(value, HiddenState) else value


_METHODS = (
    "detach clone to cpu cuda float double half bfloat16 contiguous requires_grad_ __getitem__ index_select "
    "unsqueeze squeeze transpose mul mul_ __mul__ __rmul__ __imul__ masked_fill masked_fill_ where repeat_interleave"
)
_FUNCTIONS = "clone detach index_select mul where cat masked_fill repeat_interleave"
_ALSO_TO_C = {
    *(getattr(Tensor, name) for name in _METHODS.split()),
    *(getattr(torch, name) for name in _FUNCTIONS.split()),
    Tensor.data.__get__,  # type: ignore[attr-defined]
}


def joined(h: Tensor, c: Tensor) -> HiddenState:
    """An h that carries c."""
    state = h.as_subclass(HiddenState)
    state.c = c
    return state


def _pair(hx: Any) -> Any:
    """(h, c) from what a caller of a plain RNN hands over; c is 0 with an h that came from elsewhere."""
    if hx is None or isinstance(hx, tuple | list):
        return hx
    return (hx.as_subclass(Tensor), hx.c if isinstance(hx, HiddenState) else torch.zeros_like(hx))


class HiddenOnly(nn.Module):
    """An LSTM behind the RNN's interface: y, h = rnn(x, h), or h = cell(x, h). c travels inside h, see `HiddenState`.

    The LSTM itself is torch's, as the submodule `lstm`, so that whatever acts on LSTMs finds it; its attributes
    (`hidden_size`, `weight_hh_l0`, `flatten_parameters`, …) are this module's too.
    """

    def __init__(self, lstm: nn.LSTM | nn.LSTMCell) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the RNN's; a pair (h, c) is accepted too."""
        if isinstance(self.lstm, nn.RNNCellBase):
            return joined(*self.lstm(input, _pair(hx)))
        y, final = self.lstm(input, _pair(hx))
        return y, joined(*final)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("lstm"), name)


def replace_(model: nn.Module, by: Literal["lstm", "gru"]) -> nn.Module:
    """Put a GRU or an LSTM in the place of every plain RNN, so that the state has a carry to survive on:

        h_t = φ(W x_t + U h_{t-1})   →   c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t   or   h_t = (1 − z_t) ⊙ n_t + z_t ⊙ h_{t-1}

    Sizes, layers, directions, dropout, batch_first, bias, dtype, device and training mode are kept, and so is the
    interface: an LSTM returns h alone, which carries c with it, so that `y, h = rnn(x, h)`, `h[-1]` and `h.detach()`
    between chunks of truncated BPTT work as before. (An h that the caller computed anew starts with c = 0, as an
    initial state does.)

    Args:
        model: any module with nn.RNN or nn.RNNCell in it, changed in place; or such a layer itself, which stays
            unchanged.
        by: "lstm" or "gru".

    Returns:
        model; the new layer if model was the RNN itself. Weights are new, drawn as torch draws them: give them a start
        with `chrono_` or `forget_bias_`, and make the optimizer anew. Other LSTMs and GRUs in the model stay.

    Raises:
        TypeError: model is no module.
        ValueError: `by` is neither; there is no plain RNN; one is of a subclass (its own behaviour would be lost; for
            unvanish.nn call `restore` first), is parametrized or has hooks.

    Source: Hochreiter & Schmidhuber 1997 (LSTM); Cho et al. 2014 (GRU).

    Limits: H stays, so the layer has 4 (LSTM) or 3 (GRU) times the weights; nonlinearity= has no counterpart.
    torch.jit can't compile the state that carries c. `h.detach_()` is refused by torch; use `h.detach()`.

    >>> model = nn.ModuleDict({"rnn": nn.RNN(3, 4, batch_first=True)})
    >>> y, h = replace_(model, "lstm")["rnn"](torch.zeros(2, 5, 3))
    >>> h.shape, model["rnn"].batch_first
    (torch.Size([1, 2, 4]), True)
    """
    if by not in _SUCCESSORS:
        raise ValueError(f"by: expected 'lstm' or 'gru', got {by!r}")
    rnns = {p: m for p, m in recurrent_modules(model, "replace_").items() if isinstance(m, _PLAIN)}
    if not rnns:
        raise ValueError(f"model: replace_ expected an nn.RNN or nn.RNNCell in it; {type(model).__name__} has none")
    for path, rnn in rnns.items():
        _check(path or "it", rnn)
    new = {id(rnn): _successor(rnn, by) for rnn in rnns.values()}
    # A layer that stands in several places is found once by named_modules, but has to be replaced in all of them.
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(model), model)


def _check(path: str, rnn: nn.Module) -> None:
    if type(rnn) not in _PLAIN:
        raise ValueError(
            f"model: {path} is a {type(rnn).__module__}.{type(rnn).__name__}, whose own behaviour would be lost; "
            "remove its parametrization, or call unvanish.restore(model) first"
        )
    if rnn._forward_hooks or rnn._forward_pre_hooks or rnn._backward_hooks or rnn._backward_pre_hooks:
        raise ValueError(f"model: {path} has hooks, which would be lost; remove them first")


def _successor(rnn: nn.RNN | nn.RNNCell, by: str) -> nn.Module:
    weight = next(rnn.parameters())
    like: dict[str, Any] = {"bias": bool(rnn.bias), "device": weight.device, "dtype": weight.dtype}
    sizes = (rnn.input_size, rnn.hidden_size)
    layer, single = _SUCCESSORS[by]
    if isinstance(rnn, nn.RNNCellBase):
        new = single(*sizes, **like)
    else:
        like |= {k: getattr(rnn, k) for k in ("num_layers", "batch_first", "dropout", "bidirectional")}
        new = layer(*sizes, **like)
    one_state = len(cell_of(new).states) == 1
    return (new if one_state else HiddenOnly(new)).train(rnn.training)
