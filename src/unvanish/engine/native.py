"""The C++ kernels for float32 and float64 on the CPU, called with the addresses of their arrays.

The kernels trust what they are given: `obstacle` says which tensors they can't read; `unvanish.engine.checks`, or
`operator_checks` where an operator is called by itself, checks the rest. What the forward pass keeps for the backward
lies in the kernels' own layout: `gates` `[T, B, saved]` and `cells` `[T, B, padded]`.
"""

import math
import os
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unvanish import torch_internals
from unvanish.cells import CELLS, Cell, Weights
from unvanish.engine.sequence import Sorted, transform

try:
    from unvanish import _native
except ImportError as error:
    _native: Any = None
    MISSING = f"the extension is not built ({error}); reinstall with a C++20 compiler"
else:
    MISSING = ""

# The cells with kernels of their own, as enum Cell of csrc/unvanish.h numbers them.
NUMBER = {name: i for i, name in enumerate(("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru"))}
_CELLS = tuple(CELLS[name] for name in NUMBER)
_KINDS = {cell.name: type(cell) for cell in _CELLS}
PROBES = 16
"""columns of the matrix by which `backward` may multiply gradients of weights; kProbes in csrc/unvanish.h"""
_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}


def obstacle(cell: Cell, x: Tensor, others: Iterable[Tensor | None] = ()) -> str | None:
    """Why the kernels can't run this cell over x, with `others` as states and weights, or None if they can."""
    if MISSING:
        return MISSING
    if type(cell) is not _KINDS.get(cell.name):
        return f"its kernels are for torch's cells, this is a {type(cell).__name__}"
    if x.device.type != "cpu":
        return f"its kernels are for the CPU, the input is on {x.device}"
    if x.dtype not in _SUFFIX:
        return f"its kernels are for float32 and float64, the input is {x.dtype}"
    if x.numel() == 0:
        return "the input is empty"
    return transform() or unreadable((x, *others))


def unreadable(given: Iterable[Tensor | None]) -> str | None:
    """Why the kernels can't read the memory of these tensors, or None if they can. A graph that is being captured holds
    the operator, which is called with other tensors later."""
    if torch.compiler.is_compiling():
        return None
    if torch_internals.mode_active():
        if torch_internals.captures_graph():
            return None
        if torch_internals.fake_mode_active():
            return "a FakeTensorMode is active, whose tensors have no memory to read"
    odd = torch_internals.odd_one(given)
    if odd is None:
        return None
    return f"its kernels read plain memory, and a tensor of shape {tuple(odd.shape)} {torch_internals.kind(odd)}"


def arrived(d: Tensor | None) -> Tensor | None:
    """A gradient that autograd or a caller passes in, as the kernels read it.

    Raises:
        RuntimeError: it has no plain memory.
    """
    if d is None:
        return None
    d = torch_internals.materialised(d)
    why = unreadable((d,))
    if why is not None:
        raise RuntimeError(f"error: {why}")
    return d.contiguous()


def isa(dtype: torch.dtype = torch.float32) -> str:
    """The instruction set whose kernels run here: "avx512", "avx2" or "baseline"; UNVANISH_ISA forces one.

    Raises:
        RuntimeError: the kernels are not built.
    """
    if MISSING:
        raise RuntimeError(f"isa: no kernels run here, {MISSING}")
    return forced_isa() or call("isa", dtype)


class Layout(NamedTuple):
    """How the kernels keep a layer's states."""

    lanes: int
    padded: int
    saved: int


def layout(cell: Cell, H: int, dtype: torch.dtype) -> Layout:
    """The vector lanes, H rounded up to whole blocks, and the width of the gates that are kept."""
    return _layout(NUMBER[cell.name], int(H), dtype, forced_isa())


@cache
def _layout(number: int, H: int, dtype: torch.dtype, isa: str | None) -> Layout:
    return Layout(*call("layout", dtype, number, H, isa))


def block_rows(B: int) -> int:
    """How many samples the kernels process together, with their states stored side by side."""
    return _native.block_rows(B)


def keeps_gates(cell: Cell, H: int, kept: Layout) -> bool:
    """Whether gates are stored apart from y. A plain RNN's gate is its state: where H fills whole blocks, y already has
    the kernels' layout."""
    return len(cell.gates) > 1 or kept.saved != H


def forced_isa() -> str | None:
    """The value of UNVANISH_ISA; None: not set."""
    return os.environ.get("UNVANISH_ISA")


def call(name: str, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """What the extension's function of this name returns for this dtype."""
    return getattr(_native, f"{name}_{_SUFFIX[dtype]}")(*args, **kwargs)


def pooled(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised memory that is returned to the kernels' pool: fresh pages cost as much as the arithmetic. Small
    blocks are left to malloc, which keeps them mapped."""
    count = math.prod(shape)
    if count * like.element_size() < 2**17:
        return like.new_empty(shape)
    return call("empty", like.dtype, count).view(shape)


def address(v: Tensor | None) -> int:
    """The address of v; 0, the null pointer, for None or an empty tensor."""
    return 0 if v is None else v.data_ptr()


def _layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    cell: int,
    reverse: bool,
) -> dict[str, int]:
    """The arguments that describe a layer to both kernels, by the names in csrc/bindings.cpp."""
    T, B, n_in, H, R = sizes(x, w_ih, w_hh, cell)
    return {
        "cell": cell,
        "reverse": reverse,
        "T": T,
        "B": B,
        "I": n_in,
        "H": H,
        "R": R,
        "lengths": address(lengths),
        "x": x.data_ptr(),
        "h0": h0.data_ptr(),
        "c0": address(c0),
        "w_ih": w_ih.data_ptr(),
        "w_hh": w_hh.data_ptr(),
        "b_ih": address(b_ih),
        "b_hh": address(b_hh),
        "w_hr": address(w_hr),
    }


def sizes(x: Tensor, w_ih: Tensor, w_hh: Tensor, cell: int) -> tuple[int, ...]:
    """T, B, I, H, R."""
    T, B, n_in = x.shape
    return T, B, n_in, w_ih.shape[0] // len(cell_of(cell).gates), w_hh.shape[1]


def cell_of(number: int) -> Cell:
    """The cell that the kernels know by this number."""
    return _CELLS[number]


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    cut: Tensor | None,
    cell: int,
    reverse: bool,
    clip: float,
    save: bool,
    closed: float,
    twice: bool = False,
    clear: bool = False,
) -> tuple[Tensor, ...]:
    """(y, final h, final c, gates, cells); those that the cell lacks are empty. With `closed` > 0 the gates' (mean,
    saturated, Σ ln carry) follow, and with `twice` y again, for `backward`: the first may be changed in place, as the
    output of torch's layers may. Where a sample is inactive `gates` and `cells` are undefined, or 0 with `clear`.
    `clip` and `cut` are for the backward pass."""
    T, B, _, H, R = sizes(x, w_ih, w_hh, cell)
    y, h = pooled(x, T, B, R), x.new_empty(B, R)
    own = pooled(x, T, B, R) if twice else y
    c = x.new_empty(0) if c0 is None else x.new_empty(B, H)
    gates, cells, kept_gates = x.new_empty(0), x.new_empty(0), None
    if save:
        kept = layout(cell_of(cell), H, x.dtype)
        if keeps_gates(cell_of(cell), H, kept):
            kept_gates = gates = pooled(x, T * B * kept.saved)
        else:
            kept_gates = own
        if c0 is not None:
            cells = pooled(x, T * B * kept.padded)
        if clear and lengths is not None:
            gates.zero_()
            cells.zero_()
    statistics = statistics_shapes(x, T, B, H, cell) if closed else ()
    mean, saturated, log_carry = statistics or (None, None, None)
    call(
        "forward",
        x.dtype,
        forced_isa(),
        torch.get_num_threads(),
        **_layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, cell, reverse),
        y=own.data_ptr(),
        y_again=y.data_ptr() if twice else 0,
        gates=address(kept_gates),
        cells=address(cells),
        h=h.data_ptr(),
        c=address(c),
        closed=closed,
        mean=address(mean),
        saturated=address(saturated),
        log_carry=address(log_carry),
    )
    return y, h, c, gates, cells, *statistics, *([own] if twice else [])


def statistics_shapes(x: Tensor, T: int, B: int, H: int, cell: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gates' (mean, saturated, Σ ln carry), to be written."""
    G = len(cell_of(cell).gates)
    like = partial(x.new_full, fill_value=torch.nan, dtype=torch.float64)
    return like((T, B, G)), like((T, B, G)), like((H if G > 1 else 0,))


def backward(
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    lengths: Tensor | None,
    cut: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    cell: int,
    reverse: bool,
    clip: float,
    want_dx: bool,
    want_delta: bool,
    want_norms: bool,
    probes: Tensor | None = None,
) -> list[Tensor]:
    """[dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr], then [δh, δc, δa, δa_hh] if want_delta, then the norms of
    [h, c, a, w] if want_norms; empty where absent. With `probes` `[G·H, PROBES]` the five gradients of weights and
    biases stay empty, and [∂E/∂W_ih, ∂E/∂W_hh]ᵀ probes `[I + R, PROBES]` follows at the end."""
    ragged = lengths is not None
    wants = want_dx, want_delta, want_norms
    out = gradient_shapes(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, *wants, ragged, pooled, want_weights=probes is None
    )
    dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr, *rest = out
    delta_h, delta_c, delta_a, delta_a_hh = rest[:4] if want_delta else [None] * 4
    norm_h, norm_c, norm_a, norm_w = rest[-4:] if want_norms else [None] * 4
    sketch = None if probes is None else x.new_empty(x.shape[-1] + w_hh.shape[-1], PROBES)
    call(
        "backward",
        x.dtype,
        forced_isa(),
        torch.get_num_threads(),
        **_layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, cell, reverse),
        y=y.data_ptr(),
        y_again=0,
        gates=address(gates) or y.data_ptr(),
        cells=address(cells),
        dy=address(dy),
        dh=address(dh),
        dc=address(dc),
        clip=clip,
        cut=address(cut),
        dx=address(dx),
        dw_ih=address(dw_ih),
        dw_hh=address(dw_hh),
        db_ih=address(db_ih),
        db_hh=address(db_hh),
        dw_hr=address(dw_hr),
        dh0=dh0.data_ptr(),
        dc0=address(dc0),
        delta_h=address(delta_h),
        delta_c=address(delta_c),
        delta_a=address(delta_a),
        delta_a_hh=address(delta_a_hh),
        probes=address(probes),
        sketch=address(sketch),
        norm_h=address(norm_h),
        norm_c=address(norm_c),
        norm_a=address(norm_a),
        norm_w=address(norm_w),
    )
    return out if sketch is None else [*out, sketch]


def gradient_shapes(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    cell: int,
    want_dx: bool,
    want_delta: bool,
    want_norms: bool,
    ragged: bool = True,
    empty: Callable[..., Tensor] = Tensor.new_empty,
    want_weights: bool = True,
) -> list[Tensor]:
    """What `backward` returns, to be written; without want_weights nothing for weights and biases."""
    weights = (w_ih, w_hh, b_ih, b_hh, w_hr)
    like = (h0, c0, *(weights if want_weights else [None] * 5))
    out = [empty(x, *x.shape) if want_dx else x.new_empty(0)]
    out += [x.new_empty(0) if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in like]
    T, B, _, H, R = sizes(x, w_ih, w_hh, cell)
    G = len(cell_of(cell).gates)
    if want_delta:
        shapes = ((T, B, R), (T, B, H) if c0 is not None else (0,), (T, B, G * H), (T, B, G * H) if G == 3 else (0,))
        # Where a sample is inactive nothing is written.
        make = x.new_zeros if ragged else partial(empty, x)
        out += [make(*shape) for shape in shapes]
    if want_norms:
        shapes = ((T, B), (T, B) if c0 is not None else (0,), (T, B, G), (T,))
        out += [x.new_zeros(shape, dtype=torch.float64) for shape in shapes]
    return out


def prepared(given: Sorted, w: Weights, cut: Tensor | None = None) -> list[Tensor | None]:
    """The kernels' inputs in the form that they read: x, h0, c0, w, lengths, cut."""
    h0, c0 = (*given.state, None)[:2]
    return [*(None if v is None else v.contiguous() for v in (given.x, h0, c0, *w[:5])), given.lengths, cut]
