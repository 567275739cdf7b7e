"""Weights of other frameworks, converted to this library's layout.

`Weights` holds W_ih `[G·H, I]`, W_hh `[G·H, R]` and two biases `[G·H]`, gates in torch's order: i f g o, r z n. The
layouts below hold the same cells under other names, transposed, or in another order:

    torch   weight_ih [G·H, I], weight_hh [G·H, R], bias_ih, bias_hh [G·H], weight_hr [P, H]     i f g o; r z n
    keras   kernel [I, G·H], recurrent_kernel [H, G·H], bias [G·H], GRU [2, 3H]                  i f c o; z r h
    flax    one Dense per gate: ii if ig io hi hf hg ho; ir iz in hr hz hn; i h                  kernel [·, H], bias [H]
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unvanish.cells import Cell, Weights


class Sizes(NamedTuple):
    """The layer's sizes, from the input and the gradient at the outputs."""

    inputs: int
    """I"""
    outputs: int
    """R, the size of h"""


def as_weights(layout: str, cell: Cell, weights: Any, sizes: Sizes) -> Weights:
    """The weights of one layer and direction, in float64 and torch's order.

    Raises:
        ValueError: `layout` is unknown; a weight is missing, unknown or of a shape that does not fit.
        TypeError: a weight is not an array of real numbers.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    return LAYOUTS[layout](cell, weights, sizes)


def as_float64(name: str, value: Any) -> Tensor:
    """A NumPy array, a tensor, or anything that NumPy can read, in float64 on the CPU and outside any graph.

    Raises:
        TypeError: it is not an array of real numbers.
    """
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        real = not (tensor.is_complex() or tensor.dtype == torch.bool)
        kind = str(tensor.dtype)
    else:
        array = np.asarray(value)
        # "V" is bfloat16, which NumPy knows from JAX.
        real, kind = array.dtype.kind in "fiuV", str(array.dtype)
        tensor = torch.from_numpy(array.astype(np.float64)) if real else torch.empty(0)
    if not real:
        raise TypeError(f"{name}: expected an array of real numbers, got a {type(value).__name__} of {kind}")
    return tensor.double()


def _torch(cell: Cell, weights: Any, sizes: Sizes) -> Weights:
    """As `torch.nn`: a state_dict of one layer and direction, or (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    without what the layer does not have."""
    if isinstance(weights, Mapping):
        found = _without_suffix(weights)
    else:
        given = list(weights)
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
        if len(given) == 3:
            names = ["weight_ih", "weight_hh", "weight_hr"]
        if len(given) not in (2, 3, 4, 5):
            raise ValueError(
                f"weights: expected 2 to 5 arrays for layout 'torch' (weight_ih, weight_hh, bias_ih, bias_hh, "
                f"weight_hr), got {len(given)}"
            )
        found = dict(zip(names, given, strict=False))
    # A projection shrinks an output that is made from the memory.
    projects = cell.remembers != cell.states[0]
    optional = ["bias_ih", "bias_hh", *(["weight_hr"] if projects else [])]
    _check_names("torch", found, ["weight_ih", "weight_hh"], optional)
    arrays = {name: as_float64(name, v) for name, v in found.items()}
    G, R = len(cell.gates), sizes.outputs
    H = arrays["weight_hr"].shape[-1] if "weight_hr" in arrays else R
    expected = {"weight_ih": (G * H, sizes.inputs), "weight_hh": (G * H, R), "weight_hr": (R, H)}
    for name, v in arrays.items():
        _check_shape(name, v, expected.get(name, (G * H,)), cell)
    b_ih, b_hh = arrays.get("bias_ih"), arrays.get("bias_hh")
    if b_ih is None or b_hh is None:
        # Where a layer has one bias, the other is 0.
        given = b_hh if b_ih is None else b_ih
        b_ih, b_hh = (None, None) if given is None else (given, torch.zeros_like(given))
    return Weights(arrays["weight_ih"], arrays["weight_hh"], b_ih, b_hh, arrays.get("weight_hr"))


def _keras(cell: Cell, weights: Any, sizes: Sizes) -> Weights:
    """As Keras: `layer.get_weights()`, (kernel, recurrent_kernel, bias), or a dict with these names."""
    if isinstance(weights, Mapping):
        # A variable's path ends in its name: "lstm/lstm_cell/kernel".
        found = {str(key).rpartition("/")[2].removesuffix(":0"): v for key, v in weights.items()}
        if len(found) < len(weights):
            raise ValueError(f"weights: expected one layer and direction, got {', '.join(map(str, weights))}")
    else:
        given = list(weights)
        if len(given) not in (2, 3):
            raise ValueError(
                f"weights: expected kernel, recurrent_kernel and bias for layout 'keras', got {len(given)} arrays; "
                "pass the weights of one layer and direction"
            )
        found = dict(zip(("kernel", "recurrent_kernel", "bias"), given, strict=False))
    _check_names("keras", found, ["kernel", "recurrent_kernel"], ["bias"])
    arrays = {name: as_float64(name, v) for name, v in found.items()}
    # Of Keras' cells only the GRU has another order of gates and a bias [2, 3H].
    G, H, gru = len(cell.gates), sizes.outputs, cell.name == "gru"
    _check_shape("kernel", arrays["kernel"], (sizes.inputs, G * H), cell)
    _check_shape("recurrent_kernel", arrays["recurrent_kernel"], (H, G * H), cell)
    bias = arrays.get("bias")
    if gru and (bias is None or bias.dim() == 1):
        got = "no bias, which leaves open which of the two it is" if bias is None else f"a bias {tuple(bias.shape)}"
        raise ValueError(
            f"weights: expected a Keras GRU with reset_after=True, whose bias is [2, 3H], got {got}; with "
            "reset_after=False the reset gate acts before the matrix product, which is another cell"
            + ("; if it is reset_after=True, pass zeros [2, 3H] as the bias" if bias is None else "")
        )
    if bias is not None:
        _check_shape("bias", bias, (2, G * H) if gru else (G * H,), cell)

    def gates(v: Tensor) -> Tensor:
        """[G·H, ...] in torch's order: Keras has z r h for r z n, and i f c o for i f g o."""
        if not gru:
            return v
        z, r, h = v.chunk(3)
        return torch.cat([r, z, h])

    w_ih, w_hh = gates(arrays["kernel"].mT), gates(arrays["recurrent_kernel"].mT)
    if bias is None:
        return Weights(w_ih.contiguous(), w_hh.contiguous())
    b_ih, b_hh = bias if gru else (bias, torch.zeros_like(bias))
    return Weights(w_ih.contiguous(), w_hh.contiguous(), gates(b_ih), gates(b_hh))


# Part of the names of flax's parameters, which differ from cell to cell.
_FLAX_GATES = {"lstm": ("i", "f", "g", "o"), "gru": ("r", "z", "n")}


def _flax(cell: Cell, weights: Any, sizes: Sizes) -> Weights:
    """As `flax.linen`: the parameters of an LSTMCell, OptimizedLSTMCell, GRUCell or SimpleCell, one Dense per gate."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected the parameter dict of a flax.linen cell, got {type(weights).__name__}")
    while len(weights) == 1 and isinstance(inner := next(iter(weights.values())), Mapping):
        weights = inner  # {"params": {"cell": ...}}
    gates = _FLAX_GATES.get(cell.name, ("",))
    _check_names("flax", weights, [side + gate for side in "ih" for gate in gates], [])
    H = sizes.outputs
    sides = []
    for side, size in (("i", sizes.inputs), ("h", H)):
        kernels, biases = [], []
        for gate in gates:
            name, dense = side + gate, weights[side + gate]
            if not isinstance(dense, Mapping):
                raise TypeError(f"weights[{name!r}]: expected a dict of kernel and bias, got {type(dense).__name__}")
            _check_names(f"flax, {name!r}", dense, ["kernel"], ["bias"])
            arrays = {key: as_float64(f"weights[{name!r}][{key!r}]", v) for key, v in dense.items()}
            for key, v in arrays.items():
                _check_shape(f"weights[{name!r}][{key!r}]", v, (size, H) if key == "kernel" else (H,), cell)
            kernels.append(arrays["kernel"].mT)
            biases.append(arrays.get("bias", torch.zeros(H, dtype=torch.float64)))
        sides.append((torch.cat(kernels), torch.cat(biases)))
    (w_ih, b_ih), (w_hh, b_hh) = sides
    return Weights(w_ih, w_hh, b_ih, b_hh)


LAYOUTS: dict[str, Callable[[Cell, Any, Sizes], Weights]] = {"torch": _torch, "keras": _keras, "flax": _flax}


def _without_suffix(weights: Mapping[Any, Any]) -> dict[str, Any]:
    """A state_dict's names without their common suffix: "weight_ih_l0_reverse" → "weight_ih"."""
    stems = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    found, suffixes = {}, set()
    for key, v in weights.items():
        last = str(key).rpartition(".")[2]
        stem = next((s for s in stems if last == s or last.startswith(f"{s}_l")), last)
        suffixes.add(str(key)[: len(str(key)) - len(last)] + last.removeprefix(stem))
        found[stem] = v
    if len(suffixes) > 1 and len(found) < len(weights):
        raise ValueError(f"weights: expected one layer and direction, got {', '.join(map(str, weights))}")
    return found


def _check_names(layout: str, found: Mapping[Any, Any], required: list[str], optional: list[str]) -> None:
    missing = [name for name in required if name not in found]
    unknown = [str(name) for name in found if name not in (*required, *optional)]
    if missing or unknown:
        faults = [f"no {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        known = ", ".join(required) + (f" (and {', '.join(optional)})" if optional else "")
        raise ValueError(f"weights: expected {known} for layout {layout}, got {' and '.join(faults)}")


def _check_shape(name: str, v: Tensor, shape: tuple[int, ...], cell: Cell) -> None:
    if v.shape != shape:
        raise ValueError(f"{name}: expected {shape} for a {cell.name} with the sizes of x and dy, got {tuple(v.shape)}")
