"""When our layers run torch's own forward: where only that gives the same result as torch's class (overridden
functions, graphs for other tools, other devices and dtypes), and where it is faster."""

from functools import cache
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.modules import rnn as torchs
from torch.nn.utils.rnn import PackedSequence

from unvanish import torch_internals
from unvanish.engine import Choice, dispatch
from unvanish.engine.cost import STEP, faster_in_torch
from unvanish.engine.sequence import transform
from unvanish.nn.low_precision import in_float32, rounded_to
from unvanish.nn.modules import as_states, layer_directions, time_major


def explain(layer: Any, x: Tensor | PackedSequence, hx: Any = None, lengths: Any = None) -> Choice:
    """What runs a call of one of our RNN, LSTM or GRU layers: "torch", for torch's own forward, or the rung of the
    engine that runs the layer's first direction; and why no faster one does.

    >>> print(explain(unvanish.nn.GRU(3, 4), torch.zeros(1, 2, 3)))  # doctest: +SKIP
    native: not used, torch's layer is faster for so short a call
    torch: runs
    """
    why = reason(layer, x, hx) if lengths is None and layer._torch_can() else None
    if why is not None and not (why is STEP and _fitting(layer, x, hx) is None):
        return Choice("torch", {"native": why})
    inputs, layers = time_major(layer, x, lengths), layer_directions(layer)
    if rounded_to(layers, inputs, hx) is not None:
        layers, inputs, hx = in_float32(layers, inputs, hx)
    return dispatch.explain(layers[0].cell, inputs.x, others=(*as_states(hx), *layers[0].weights))


def reason(layer: nn.RNNBase, x: Any, hx: Any) -> str | None:
    """Why torch's own forward runs this call, as the end of a sentence; None: it runs on the engine."""
    data = x.data if isinstance(x, PackedSequence) else x
    if type(data) is not Tensor and not torch.overrides.is_tensor_like(data):
        return f"the input is a {type(x).__name__}"
    if not data.is_cpu:
        return f"the input is on {data.device}"
    if torch_internals.tracing():
        return "a graph is traced that others read"
    if torch.compiler.is_compiling():
        exported = torch.compiler.is_exporting() and torch_internals.fixed(_steps(layer, x))
        return "a program is exported that others read" if exported or torch.onnx.is_in_onnx_export() else None
    states = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
    if torch_internals.overridden((data, *states, *layer._parameters.values())):
        return "torch's functions are overridden"
    if dispatch.forced() or transform() is not None:
        return None
    rounds = data.dtype != torch.float64 and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if rounds else data.dtype
    # The list holds the weights of the last call, which may have been others; a parametrized weight is only there.
    last: Any = layer._flat_weights
    own: Any = layer._parameters
    w_ih, w_hh = own.get("weight_ih_l0", last[0]), own.get("weight_hh_l0", last[1])
    trains = torch.is_grad_enabled() and (
        w_ih.requires_grad or data.requires_grad or any(getattr(h, "requires_grad", False) for h in states)
    )
    T, packed = _steps(layer, x), data is not x
    B = data.shape[0] / T if packed else data.shape[0 if layer.batch_first else 1] if data.dim() == 3 else 1
    W, projected = w_ih.numel() + w_hh.numel(), layer.proj_size > 0
    return faster_in_torch(layer.mode, T, B, W, dtype, trains, projected=projected, packed=packed)


_KERNELS: dict[str, Any] = {
    "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu, "GRU": torch.gru, "LSTM": torch.lstm
}  # fmt: skip
"""mode → torch's function for a whole sequence"""
_FORWARD: dict[type[nn.RNNBase], Any] = {kind: kind.forward for kind in (torchs.RNN, torchs.LSTM, torchs.GRU)}
"""torch's classes → their forward, as torch defines it; `torch.nn.LSTM` may have been set to ours"""
_CHECKS = ("check_forward_args", "check_input", "check_hidden_size", "get_expected_hidden_size", "permute_hidden")
"""methods that torch's forward calls"""


def run(layer: Any, x: Any, hx: Any, why: str) -> tuple[Any, Any] | None:
    """torch's own forward, for the `reason` why; a valid padded batch goes straight to its kernel, because the checks
    in torch's forward take as long as a short call. None: the engine runs the call, which was meant to run by torch's
    cell but is not of the plain kind or not valid."""
    states = None if torch.compiler.is_compiling() else _fitting(layer, x, hx)
    if why is STEP:
        return None if states is None or any(s.dtype != x.dtype for s in states) else _one_step(layer, x, states)
    if states is None:
        return torchs_class(type(layer)).forward(layer, x, hx)
    y, *final = _KERNELS[layer.mode](
        x, states, layer._flat_weights, layer.bias, layer.num_layers, layer.dropout, layer.training,
        layer.bidirectional, layer.batch_first,
    )  # fmt: skip
    return y, tuple(final) if layer.mode == "LSTM" else final[0]


def _one_step(layer: Any, x: Tensor, initial: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An LSTM over one step, by torch's cell."""
    time = 1 if layer.batch_first else 0
    row = x.select(time, 0)
    n, finals = 4 if layer.bias else 2, []
    weights = [layer._flat_weights[k : k + n] for k in range(0, len(layer._flat_weights), n)]
    places = zip(initial[0].unbind(0), initial[1].unbind(0), weights, strict=True)
    for number in range(layer.num_layers):
        if number and layer.dropout and layer.training:
            row = dropout(row, layer.dropout)
        here = []
        for _ in range(2 if layer.bidirectional else 1):
            h, c, w = next(places)
            here.append(torch.lstm_cell(row, (h, c), *w))
        row = torch.cat([h for h, _ in here], dim=-1) if layer.bidirectional else here[0][0]
        finals += here
    # Copies: the output may be changed in place, and the final state stays.
    h_n, c_n = (torch.stack(s) for s in zip(*finals, strict=True))
    return torch.stack([row], dim=time), (h_n, c_n)


def update_flat_weights(module: nn.RNNBase) -> None:
    """As torch's method, which takes longer: weights that were replaced enter the list that a call uses."""
    names, used = module._flat_weights_names, module._flat_weights
    if torch.compiler.is_compiling() or not all(map(is_, map(module._parameters.get, names), used)):
        module._update_flat_weights()


def _fitting(layer: Any, x: Any, hx: Any) -> Any:
    """The initial states as torch's kernel takes them; None where the call is not of the plain kind or not valid:
    torch's forward then runs it, or raises the error."""
    torchs = torchs_class(type(layer))
    # If torch's forward has been replaced, as by a watch, the replacement must run.
    if torchs.forward is not _FORWARD[torchs] or not _checks_as_torch(type(layer)):
        return None
    if type(x) is not Tensor or x.dim() != 3 or x.shape[2] != layer.input_size:
        return None
    update_flat_weights(layer)
    if x.dtype != layer._flat_weights[0].dtype:
        return None
    B, places = x.shape[0 if layer.batch_first else 1], layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: 2 if layer.mode == "LSTM" else 1]
    if hx is None:
        states = tuple([x.new_zeros(places, B, n) for n in widths])
    else:
        states = hx if layer.mode == "LSTM" else (hx,)
        if type(states) is not tuple or len(states) != len(widths):
            return None
        for s, n in zip(states, widths, strict=True):
            if type(s) is not Tensor or s.shape != (places, B, n):
                return None
    return states if layer.mode == "LSTM" else states[0]


@cache
def _checks_as_torch(kind: type[nn.RNNBase]) -> bool:
    return all(getattr(kind, name) is getattr(torchs_class(kind), name) for name in _CHECKS)


@cache
def torchs_class(kind: type[nn.RNNBase]) -> type[nn.RNNBase]:
    """The class among torch's RNN, LSTM and GRU that a class derives from."""
    return next(base for base in kind.__mro__ if base in _FORWARD)


def _steps(layer: nn.RNNBase, x: Tensor | PackedSequence) -> int:
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes)
    return x.shape[1 if layer.batch_first and x.dim() == 3 else 0] if x.dim() else 0
