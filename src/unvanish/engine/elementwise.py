"""Elementwise torch code as a graph: what a function does to each element, recorded while it runs.

Operations that autograd adds are recorded like the function's own. Nodes are operations of the kernels' interpreter
(csrc/program.h) on values of one shape; masks are the numbers 1 and 0. Equal expressions are one node.
"""

import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unvanish import torch_internals


class UnsupportedError(Exception):
    """The function is not a graph of the known operations; the message gives the reason, as part of a sentence."""


class Node(NamedTuple):
    """One value: an input, a constant, or the result of an operation on other values."""

    op: str
    args: tuple[int, ...] = ()
    key: Any = None
    """the name of an input, the number of a constant"""


class Graph:
    """Nodes in the order of their creation, so that arguments precede the nodes that use them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._known: dict[Any, int] = {}

    def __call__(self, op: str, *args: "int | float") -> int:
        """The number of the node `op` of these nodes; a float is a constant."""
        given = tuple(self.constant(a) if isinstance(a, float) else a for a in args)
        if op in ("mul", "div") and self._is(given[1], 1.0):
            return given[0]
        if op == "mul" and self._is(given[0], 1.0):
            return given[1]
        if op in ("add", "mul", "eq", "ne") and given[0] > given[1]:
            given = given[::-1]
        return self._node(Node(op, given), (op, given))

    def input(self, name: Any) -> int:
        """The node of the input with this name."""
        return self._node(Node("input", (), name), ("input", name))

    def constant(self, value: float) -> int:
        """The node of a constant."""
        return self._node(Node("constant", (), float(value)), ("constant", struct.pack("d", value)))

    def _is(self, number: int, value: float) -> bool:
        return self.nodes[number].op == "constant" and self.nodes[number].key == value

    def _node(self, node: Node, key: Any) -> int:
        if key not in self._known:
            self._known[key] = len(self.nodes)
            self.nodes.append(node)
        return self._known[key]

    def reachable(self, ends: Iterable[int], leaves: Iterable[int] = ()) -> list[int]:
        """These nodes and all that they depend on, arguments first; the search stops at `leaves`."""
        stop, found = set(leaves), dict[int, None]()
        stack = [(end, False) for end in reversed(list(ends))]
        while stack:
            number, ready = stack.pop()
            if ready:
                found[number] = None
            elif number not in found:
                stack.append((number, True))
                if number not in stop:
                    stack += [(a, False) for a in reversed(self.nodes[number].args) if a not in found]
        return list(found)


def _power(g: Graph, x: int, y: int) -> int:
    short: dict[float, Callable[[], int]] = {
        0.0: lambda: g.constant(1.0),
        1.0: lambda: x,
        2.0: lambda: g("mul", x, x),
        3.0: lambda: g("mul", g("mul", x, x), x),
        0.5: lambda: g("sqrt", x),
        -0.5: lambda: g("div", 1.0, g("sqrt", x)),
        -1.0: lambda: g("div", 1.0, x),
        -2.0: lambda: g("div", 1.0, g("mul", x, x)),
    }
    exponent = g.nodes[y]
    return short[exponent.key]() if exponent.op == "constant" and exponent.key in short else g("pow", x, y)


def _division(g: Graph, x: int, y: int, rounding_mode: str | None = None) -> int:
    whole = {None: None, "floor": "floor", "trunc": "trunc"}[rounding_mode]
    return g("div", x, y) if whole is None else g(whole, g("div", x, y))


def _clamp(g: Graph, x: int, low: int | None = None, high: int | None = None) -> int:
    x = x if low is None else g("maximum", x, low)
    return x if high is None else g("minimum", x, high)


def _true(g: Graph, x: int) -> int:
    """x ≠ 0 as a mask; a mask is returned unchanged."""
    return x if g.nodes[x].op in MASKS else g("ne", x, 0.0)


def _hardsigmoid_backward(g: Graph, d: int, x: int) -> int:
    inside = g("mul", g("lt", -3.0, x), g("lt", x, 3.0))
    # torch's kernel multiplies by the float32 next to 1/6, whatever the dtype; its decomposition does not.
    return g("where", inside, g("mul", d, float(torch.tensor(1 / 6))), 0.0)


MASKS = ("lt", "le", "eq", "ne")
_SAME = (
    *("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "relu", "sin", "cos", "tan", "atan", "erf", "floor", "ceil"),
    *("round", "trunc", "sqrt", "abs", "neg", "sign", "maximum", "minimum", "eq", "ne", "lt", "le"),
)
"""ATen operations with the same name in the interpreter"""

_AGAIN = (
    *("detach", "alias", "clone", "contiguous", "view", "_unsafe_view", "reshape", "expand", "lift_fresh", "positive"),
    *("view_as", "unsqueeze", "squeeze"),
)
"""ATen operations that change no value"""


OPERATIONS: dict[str, Callable[..., int]] = {
    **{name: (lambda g, *a, op=name: g(op, *a)) for name in _SAME},
    **{name: (lambda g, x, *_: x) for name in _AGAIN},
    "add": lambda g, a, b, alpha=None: g("add", a, b if alpha is None else g("mul", b, alpha)),
    "sub": lambda g, a, b, alpha=None: g("sub", a, b if alpha is None else g("mul", b, alpha)),
    "rsub": lambda g, a, b, alpha=None: g("sub", b, a if alpha is None else g("mul", a, alpha)),
    "mul": lambda g, a, b: g("mul", a, b),
    "div": _division,
    "pow": _power,
    "square": lambda g, x: g("mul", x, x),
    "reciprocal": lambda g, x: g("div", 1.0, x),
    "rsqrt": lambda g, x: g("div", 1.0, g("sqrt", x)),
    "sgn": lambda g, x: g("sign", x),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda g, x, high: g("minimum", x, high),
    "fmax": lambda g, a, b: g("where", g("ne", a, a), b, g("where", g("ne", b, b), a, g("maximum", a, b))),
    "fmin": lambda g, a, b: g("where", g("ne", a, a), b, g("where", g("ne", b, b), a, g("minimum", a, b))),
    "addcmul": lambda g, x, a, b, value=None: g("add", x, _scaled(g, g("mul", a, b), value)),
    "addcdiv": lambda g, x, a, b, value=None: g("add", x, _scaled(g, g("div", a, b), value)),
    "lerp": lambda g, a, b, w: g("add", a, g("mul", w, g("sub", b, a))),
    "gt": lambda g, a, b: g("lt", b, a),
    "ge": lambda g, a, b: g("le", b, a),
    "isnan": lambda g, x: g("ne", x, x),
    "logical_not": lambda g, x: g("eq", x, 0.0),
    "bitwise_not": lambda g, x: g("eq", x, 0.0),
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), lambda g, a, b: g("mul", _true(g, a), _true(g, b))),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), lambda g, a, b: g("maximum", _true(g, a), _true(g, b))),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), lambda g, a, b: g("ne", _true(g, a), _true(g, b))),
    "where": lambda g, c, a, b: g("where", c, a, b),
    "masked_fill": lambda g, x, mask, value: g("where", mask, value, x),
    "threshold_backward": lambda g, d, x, at: g("where", g("le", x, at), 0.0, d),
    "sigmoid_backward": lambda g, d, y: g("dsigmoid", d, y),
    "tanh_backward": lambda g, d, y: g("dtanh", d, y),
    "hardsigmoid_backward": _hardsigmoid_backward,
    "copy": lambda g, x, y, *_: y,
    "fill": lambda g, x, value: value,
    "zero": lambda g, x: g.constant(0.0),
}
"""ATen operation, without overload and trailing underscore → its node, from the nodes of its arguments"""

CREATED = {
    **dict.fromkeys(("zeros_like", "zeros", "new_zeros"), 0.0),
    **dict.fromkeys(("ones_like", "ones", "new_ones"), 1.0),
    **dict.fromkeys(("full_like", "full", "new_full", "scalar_tensor"), None),
}
"""operations that fill a tensor with one number; None: the number is their last positional argument"""

CONVERSIONS = ("_to_copy", "convert_element_type", "to")


def _scaled(g: Graph, x: int, by: int | None) -> int:
    return x if by is None else g("mul", x, by)


class Recorder(TorchDispatchMode):
    """Records the operations on its input tensors into `graph` while the mode is active.

    All inputs have the same shape and dtype. An unknown operation is decomposed into known ones where torch can do so;
    otherwise the recording ends with an `UnsupportedError`.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.graph = Graph()
        self._shape, self._dtype = shape, dtype
        self._held: list[Tensor] = []  # keeps tensors alive: a freed storage could be reused
        self._numbers: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: it never runs while a graph is captured, and True would import the compiler, which takes a second."""
        return False

    def input(self, tensor: Tensor, name: Any) -> Tensor:
        """Register `tensor` as the input of this name; returns the tensor."""
        self._bind(tensor, self.graph.input(name))
        return tensor

    def number(self, tensor: Tensor) -> int:
        """The node whose value a tensor holds.

        Raises:
            UnsupportedError: the tensor is not computed from the inputs.
        """
        storage, key = tensor.untyped_storage(), torch_internals.storage_key(tensor)
        if key not in self._numbers:
            raise UnsupportedError("it reads a tensor that is none of its arguments")
        single = storage.nbytes() == tensor.element_size()
        if not single and (tensor.shape != self._shape or not tensor.is_contiguous()):
            raise UnsupportedError(f"it makes a tensor of another shape than its states, {tuple(tensor.shape)}")
        return self._numbers[key]

    def _bind(self, tensor: Tensor, number: int) -> None:
        self._held.append(tensor)
        self._numbers[torch_internals.storage_key(tensor)] = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        full = func._schema.name.split("::")[-1]
        special = full.startswith("__")  # as __and__
        name = full if special else full.rstrip("_")
        in_place = full.endswith("_") and not special
        if name in CONVERSIONS:
            return self._convert(func, args, given)
        if name in CREATED:
            out = func(*args, **given)
            value = CREATED[name] if CREATED[name] is not None else given.get("fill_value", args[-1])
            self._check(func, out)
            self._bind(out, self._of(value))
            return out
        if name not in OPERATIONS:
            simpler = None if in_place else torch_internals.decomposition(func)
            if simpler is None:
                raise UnsupportedError(f"there is no compiled instruction for {func}")
            try:
                with self:
                    return simpler(*args, **given)
            except UnsupportedError as why:
                raise UnsupportedError(f"there is no compiled instruction for {func}") from why
        if name == "lift_fresh" and args[0].numel() == 1:
            self._bind(args[0], self.graph.constant(float(args[0])))
        wanted = {k: v for k, v in given.items() if k in ("alpha", "value", "rounding_mode", "min", "max")}
        renamed = {{"min": "low", "max": "high"}.get(k, k): v for k, v in wanted.items()}
        if set(given) - set(wanted) - {"memory_format"}:
            raise UnsupportedError(f"there is no compiled instruction for {func} with {', '.join(given)}")
        positional = args[:1] if name in _AGAIN else args
        try:
            node = OPERATIONS[name](
                self.graph,
                *(self._of(a) for a in positional),
                **{k: v if k == "rounding_mode" else self._of(v) for k, v in renamed.items()},
            )
        except TypeError:
            raise UnsupportedError(f"there is no compiled instruction for {func} with these arguments") from None
        out = func(*args, **given)
        self._check(func, out)
        self._bind(args[0] if in_place else out, node)
        return out

    def _convert(self, func: Any, args: Any, given: dict[str, Any]) -> Any:
        out = func(*args, **given)
        self._check(func, out)
        node = self.number(args[0])
        truth = out.dtype == torch.bool and args[0].dtype != torch.bool
        self._bind(out, _true(self.graph, node) if truth else node)
        return out

    def _check(self, func: Any, out: Any) -> None:
        if not isinstance(out, Tensor):
            raise UnsupportedError(f"there is no compiled instruction for {func}")
        if out.numel() != 1 and out.shape != self._shape:
            raise UnsupportedError(f"{func} makes a tensor of another shape than its states")
        name = func._schema.name.split("::")[-1].rstrip("_")
        single = out.numel() == 1 and (out.dtype.is_floating_point or name == "lift_fresh")
        truth = out.dtype == torch.bool and name != "add"  # the sum of two masks is a mask
        chosen = out.dtype == torch.int64 and name == "where"  # of two whole numbers
        if not (out.dtype == self._dtype or truth or single or chosen):
            raise UnsupportedError(f"{func} makes a tensor of {out.dtype}")
        if name.startswith(("bitwise", "__")) and out.dtype != torch.bool:
            raise UnsupportedError(f"there is no compiled instruction for {func} of numbers")

    def _of(self, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Tensor):
            return self.number(value)
        if isinstance(value, bool | int | float):
            return self.graph.constant(float(value))
        raise UnsupportedError(f"an operation has the argument {value!r}")
