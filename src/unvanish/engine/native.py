"""The native rung: C++ kernels for float32 and float64 on the CPU, as operators that torch.compile can see.

What the forward pass keeps for the backward lies in the kernels' own layout: `gates` `[T, B, saved]` and `cells`
`[T, B, padded]`.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from unvanish.cells import CELLS, Cell, State, Weights
from unvanish.engine import reference
from unvanish.engine.sequence import Sorted, sort, transform

try:
    from unvanish import _native
except ImportError as error:
    _native: Any = None
    MISSING = f"the extension is not built ({error}); reinstall with a C++20 compiler"
else:
    MISSING = ""

NUMBER = {name: i for i, name in enumerate(("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru"))}
_KINDS = {name: type(CELLS[name]) for name in NUMBER}
_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}


def obstacle(cell: Cell, x: Tensor) -> str | None:
    """Why the kernels can't run this cell over x, or None if they can."""
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
    return transform()


def isa(dtype: torch.dtype = torch.float32) -> str:
    """The instruction set whose kernels run here: "avx512", "avx2" or "baseline"; UNVANISH_ISA forces one.

    Raises:
        RuntimeError: the kernels are not built.
    """
    if MISSING:
        raise RuntimeError(f"isa: no kernels run here, {MISSING}")
    return _forced_isa() or _call("isa", dtype)()


class Layout(NamedTuple):
    """How the kernels keep a layer's states."""

    lanes: int
    padded: int
    saved: int


def layout(cell: Cell, H: int, dtype: torch.dtype) -> Layout:
    """Vector lanes, H rounded up to whole blocks, and the width of what is kept of the gates."""
    return Layout(*_call("layout", dtype)(NUMBER[cell.name], H, _forced_isa()))


def block_rows(B: int) -> int:
    """Samples that the kernels work on together, and keep their states beside each other."""
    return _native.block_rows(B)


def _keeps_gates(cell: Cell, H: int, kept: Layout) -> bool:
    """A plain RNN's gate is its state: where H fills whole blocks, y lies as the kernels would keep it."""
    return len(cell.gates) > 1 or kept.saved != H


def _forced_isa() -> str | None:
    return os.environ.get("UNVANISH_ISA")


def _call(name: str, dtype: torch.dtype) -> Any:
    return getattr(_native, f"{name}_{_SUFFIX[dtype]}")


def _pooled(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised memory that goes back to the kernels' pool: fresh pages cost as much as the arithmetic. What is
    small malloc keeps mapped itself."""
    count = math.prod(shape)
    if count * like.element_size() < 2**17:
        return like.new_empty(shape)
    return _call("empty", like.dtype)(count).view(shape)


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _sizes(x: Tensor, w_ih: Tensor, w_hh: Tensor, cell: int) -> tuple[int, ...]:
    T, B, n_in = x.shape
    return T, B, n_in, w_ih.shape[0] // len(_cell(cell).gates), w_hh.shape[1]


def _cell(number: int) -> Cell:
    return CELLS[list(NUMBER)[number]]


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
    cell: int,
    reverse: bool,
    clip: float,
    save: bool,
    closed: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, final h, final c, gates, cells), then the gates' (mean, saturated, Σ ln carry) with `closed` > 0; what does
    not exist is empty."""
    T, B, _, H, R = sizes = _sizes(x, w_ih, w_hh, cell)
    has_c, kept = c0 is not None, layout(_cell(cell), H, x.dtype)
    y, h = _pooled(x, T, B, R), x.new_empty(B, R)
    c = x.new_empty(B, H) if has_c else x.new_empty(0)
    apart = _keeps_gates(_cell(cell), H, kept)
    gates = _pooled(x, T * B * kept.saved) if save and apart else x.new_empty(0)
    cells = _pooled(x, T * B * kept.padded) if save and has_c else x.new_empty(0)
    inputs = [_address(v) for v in (lengths, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y)]
    states = [_address((gates if apart else y) if save else None), _address(cells if save and has_c else None)]
    outs = [_address(h), _address(c if has_c else None)]
    statistics = _statistics_shapes(x, T, B, H, cell, closed)
    wanted = [_address(v if v.numel() else None) for v in statistics]
    _call("forward", x.dtype)(
        cell, reverse, sizes, inputs + states, outs, closed, wanted, torch.get_num_threads(), _forced_isa()
    )
    return y, h, c, gates, cells, *statistics


def _statistics_shapes(x: Tensor, T: int, B: int, H: int, cell: int, closed: float) -> tuple[Tensor, Tensor, Tensor]:
    G = len(_cell(cell).gates)
    like = partial(x.new_full, fill_value=torch.nan, dtype=torch.float64)
    if not closed:
        return like((0,)), like((0,)), like((0,))
    return like((T, B, G)), like((T, B, G)), like((H if G > 1 else 0,))


# What torch.compile and export see; calls outside any graph go to the functions themselves.
forward_operator = torch.library.custom_op("unvanish::forward", forward, mutates_args=())


@forward_operator.register_fake
def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, cell, reverse, clip, save, closed):
    T, B, _, H, R = _sizes(x, w_ih, w_hh, cell)
    kept = layout(_cell(cell), H, x.dtype)
    nothing = x.new_empty(0)
    c = x.new_empty(B, H) if c0 is not None else nothing
    gates = x.new_empty(T * B * kept.saved) if save and _keeps_gates(_cell(cell), H, kept) else nothing.clone()
    cells = x.new_empty(T * B * kept.padded) if save and c0 is not None else nothing.clone()
    return x.new_empty(T, B, R), x.new_empty(B, R), c, gates, cells, *_statistics_shapes(x, T, B, H, cell, closed)


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
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    cell: int,
    reverse: bool,
    clip: float,
    want_dx: bool,
    want_delta: bool,
    want_norms: bool,
) -> list[Tensor]:
    """[dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr], then [δh, δc, δa, δa_hh] if want_delta, then the norms of
    [h, c, a, w] if want_norms; empty where absent."""
    sizes = _sizes(x, w_ih, w_hh, cell)
    ragged = lengths is not None
    wants = want_dx, want_delta, want_norms
    out = _gradient_shapes(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, *wants, ragged, _pooled)
    present = [v if v.numel() else None for v in out]
    dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr, *rest = present
    delta, norms = rest[: 4 * want_delta], rest[4 * want_delta :]
    if not _keeps_gates(_cell(cell), sizes[3], layout(_cell(cell), sizes[3], x.dtype)):
        gates = y
    kept = [_address(v) for v in (lengths, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, gates)]
    kept.append(_address(cells if c0 is not None else None))
    wanted = [dy, dh, dc, dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, dh0, dc0, *(delta or [None] * 4)]
    addresses, measured = [_address(v) for v in wanted], [_address(v) for v in norms or [None] * 4]
    threads = torch.get_num_threads()
    _call("backward", x.dtype)(cell, reverse, sizes, kept, addresses, clip, measured, threads, _forced_isa())
    return out


def _gradient_shapes(
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
) -> list[Tensor]:
    like = (h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    out = [empty(x, *x.shape) if want_dx else x.new_empty(0)]
    out += [x.new_empty(0) if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in like]
    T, B, _, H, R = _sizes(x, w_ih, w_hh, cell)
    G = len(_cell(cell).gates)
    if want_delta:
        shapes = ((T, B, R), (T, B, H) if c0 is not None else (0,), (T, B, G * H), (T, B, G * H) if G == 3 else (0,))
        # Where a sample is inactive nothing is written.
        make = x.new_zeros if ragged else partial(empty, x)
        out += [make(*shape) for shape in shapes]
    if want_norms:
        shapes = ((T, B), (T, B) if c0 is not None else (0,), (T, B, G), (T,))
        out += [x.new_zeros(shape, dtype=torch.float64) for shape in shapes]
    return out


def _gradients(*given: Any) -> tuple[Tensor, ...]:
    """The gradients of `backward`, as many as there always are: for a list of them torch knows no way to batch it."""
    return tuple(backward(*given, want_delta=False, want_norms=False))


backward_operator = torch.library.custom_op(
    "unvanish::backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor? dy, Tensor? dh, Tensor? dc, Tensor x, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, "
    "Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? lengths, Tensor y, Tensor gates, Tensor cells, "
    "int cell, bool reverse, float clip, bool want_dx) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@backward_operator.register_fake
def _(dy, dh, dc, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, y, gates, cells, cell, reverse, clip, want_dx):
    return tuple(_gradient_shapes(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, want_dx, False, False))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, cell, reverse, clip, _, _ = inputs
    y, _, _, gates, cells, *statistics = output
    ctx.save_for_backward(*tensors, y, gates, cells)
    ctx.cell, ctx.reverse, ctx.clip = cell, reverse, clip
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates, cells, *statistics)


def _autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None, dc: Tensor | None, *_: Any) -> tuple[Any, ...]:
    # Read once: a checkpoint recomputes them for it.
    saved = ctx.saved_tensors
    x, h0, c0, *weights, lengths, _, _, _ = saved
    nothing = (None,) * 5
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        cell, state = _cell(ctx.cell), (h0,) if c0 is None else (h0, c0)
        clip = ctx.clip or None
        found = reference.gradients(
            cell, x, state, Weights(*weights), lengths, ctx.reverse, clip, dy, (dh,) if c0 is None else (dh, dc)
        )
        dx, dh0, *rest = found
        dc0 = None if c0 is None else rest.pop(0)
        return dx, dh0, dc0, *rest[:5], None, *nothing
    d = [None if v is None else v.contiguous() for v in (dy, dh, dc)]
    want_dx = ctx.needs_input_grad[0]
    run: Any = _gradients if _is_eager(*d, *saved) else backward_operator
    out = run(*d, *saved, ctx.cell, ctx.reverse, ctx.clip, want_dx)
    found = [g if like is not None else None for g, like in zip(out, (x, h0, c0, *weights), strict=True)]
    return (found[0] if want_dx else None, *found[1:], None, *nothing)


torch.library.register_autograd("unvanish::forward", _autograd, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator without torch's dispatcher, which takes longer than a short sequence does."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_autograd)


def _is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks on: no graph is captured, no mode or transform is active, and no tensor is of
    a kind of its own."""

    def plain(v: Tensor) -> bool:
        return type(v) in (Tensor, nn.Parameter) and not _functorch.is_legacy_batchedtensor(v)

    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(v is None or plain(v) for v in tensors)
    )


def prepared(given: Sorted, w: Weights) -> list[Tensor | None]:
    """What the kernels read, as they want it: x, h0, c0, w, lengths."""
    h0, c0 = (*given.state, None)[:2]
    return [*(None if v is None else v.contiguous() for v in (given.x, h0, c0, *w[:5])), given.lengths]


def run(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None = None,
    reverse: bool = False,
    clip: float | None = None,
) -> tuple[Tensor, State]:
    """(y, final state) for x `[T, B, I]`; see `unvanish.engine.run`."""
    save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, *state, *w))
    given = sort(x, state, lengths)
    inputs = prepared(given, w)
    apply: Any = forward_operator if not _is_eager(*inputs) else _Eager.apply if save else forward
    y, h, c, *_ = apply(*inputs, NUMBER[cell.name], reverse, clip or 0.0, save, 0.0)
    final = (h, c)[: len(cell.states)]
    if given.back is None:
        return y, final
    return y.index_select(1, given.back), tuple(s.index_select(0, given.back) for s in final)
