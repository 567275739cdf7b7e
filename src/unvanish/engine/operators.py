"""The kernels as operators of torch.library, and the native rung, which calls them.

torch.compile, export, modes and transforms see operators. Where none of these is active, the native rung bypasses
torch's dispatcher, which takes longer than a short sequence does. A graph or vmap calls an operator with whatever it
holds, so an operator checks all its arguments itself; the native rung is reached through `unvanish.engine.run`, which
has checked them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from unvanish import torch_internals
from unvanish.cells import Cell, State, Weights
from unvanish.engine import flops, native, reference
from unvanish.engine.operator_checks import SCHEMA, LayerTensors, check_backward, check_forward
from unvanish.engine.sequence import sort

_EIGHT = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"


def _forward(*given: Any) -> tuple[Tensor, ...]:
    *tensors, cell, _, clip, save, closed = given
    check_forward(LayerTensors(*tensors), cell=cell, clip=clip, save=save, closed=closed)
    inputs: Any = (*_contiguous(tensors), *given[len(tensors) :])
    # The same call returns the same values, as torch's own checks of operators demand.
    y, h, c, gates, cells, *rest = native.forward(*inputs, twice=save, clear=True)
    statistics = rest[:3] if closed else _no_statistics(y)
    return y, h, c, gates, cells, *statistics, rest[-1] if save else y.new_empty(0)


def _no_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(0, dtype=torch.float64), x.new_empty(0, dtype=torch.float64), x.new_empty(0, dtype=torch.float64)


forward_operator = torch.library.custom_op(
    "unvanish::forward",
    _forward,
    mutates_args=(),
    schema=f"({SCHEMA}, int cell, bool reverse, float clip, bool save, float closed) -> ({_EIGHT}, Tensor)",
)
"""`native.forward`, checked; statistics are empty where `closed` is 0, the second y where nothing is saved."""


@forward_operator.register_fake
def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, cut, cell, reverse, clip, save, closed):
    T, B, _, H, R = native.sizes(x, w_ih, w_hh, cell)
    layer = native.cell_of(cell)
    kept = native.layout(layer, H, x.dtype)
    nothing = x.new_empty(0)
    c = x.new_empty(B, H) if c0 is not None else nothing
    gates = x.new_empty(T * B * kept.saved) if save and native.keeps_gates(layer, H, kept) else nothing.clone()
    cells = x.new_empty(T * B * kept.padded) if save and c0 is not None else nothing.clone()
    statistics = native.statistics_shapes(x, T, B, H, cell) if closed else _no_statistics(x)
    own = x.new_empty(T, B, R) if save else nothing.clone()
    return x.new_empty(T, B, R), x.new_empty(B, R), c, gates, cells, *statistics, own


def _gradients(*given: Any) -> tuple[Tensor, ...]:
    """The gradients of `native.backward`, always the same number: torch can't batch an operator that returns a
    list."""
    return tuple(native.backward(*given, want_delta=False, want_norms=False))


def _backward(*given: Any) -> tuple[Tensor, ...]:
    *tensors, cell, reverse, clip, want_dx = given
    check_backward(tensors[:3], LayerTensors(*tensors[3:-3]), tensors[-3:], cell=cell, clip=clip)
    return _gradients(*_contiguous(tensors), cell, reverse, clip, want_dx)


backward_operator = torch.library.custom_op(
    "unvanish::backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor? dy, Tensor? dh, Tensor? dc, {SCHEMA}, Tensor y, Tensor gates, Tensor cells, "
    f"int cell, bool reverse, float clip, bool want_dx) -> ({_EIGHT})",
)
"""The gradients of `native.backward`, checked."""


@backward_operator.register_fake
def _(dy, dh, dc, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, cut, y, gates, cells, cell, reverse, clip, want_dx):
    shapes = native.gradient_shapes(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, want_dx, False, False)
    return tuple(shapes)


def _contiguous(given: Any) -> list[Tensor | None]:
    return [None if v is None else v.contiguous() for v in given]


def keep(ctx: Any, layer: Sequence[Tensor | None], own: Tensor, gates: Tensor, cells: Tensor) -> None:
    """Save a call's tensors for its backward, except the biases: torch's layers allow them to be changed in between,
    since only a graph of the gradients reads them."""
    *most, b_ih, b_hh, w_hr, lengths, cut = layer
    ctx.save_for_backward(*most, w_hr, lengths, cut, own, gates, cells)
    ctx.biases = b_ih, b_hh
    ctx.versions = None if torch_internals.captures_graph() else _versions(ctx.biases)


def kept(ctx: Any) -> tuple[Any, ...]:
    """What `keep` saved, in the order of the operators' arguments. Read once: a checkpoint recomputes it."""
    *most, w_hr, lengths, cut, y, gates, cells = ctx.saved_tensors
    return (*most, *ctx.biases, w_hr, lengths, cut, y, gates, cells)


def check_biases(ctx: Any) -> None:
    """Check, where the gradients get a graph of their own, that the biases are still those that the forward read.

    Raises:
        RuntimeError: a bias has been changed in place.
    """
    if ctx.versions is not None and _versions(ctx.biases) != ctx.versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a bias of "
            "a recurrent layer; the graph of its gradients (create_graph=True) needs the values that the forward read"
        )


def _versions(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(v._version for v in tensors if v is not None and not v.is_inference())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, gates, cells, *rest = output
    _keep_call(ctx, inputs, rest[-1], gates, cells)
    ctx.mark_non_differentiable(gates, cells, *rest)


def _keep_call(ctx: Any, inputs: tuple[Any, ...], own: Tensor, gates: Tensor, cells: Tensor) -> None:
    *tensors, ctx.cell, ctx.reverse, ctx.clip, _, _ = inputs
    keep(ctx, tensors, own, gates, cells)
    # Whether backward gets the very tensors that a kernel has read or written.
    ctx.intact = False
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None, dc: Tensor | None = None, *_: Any) -> tuple[Any, ...]:
    saved = kept(ctx)
    x, h0, c0, *weights, lengths, cut, _, _, _ = saved
    nothing = (None,) * 7  # lengths, cut and five numbers
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        check_biases(ctx)
        cell, state = native.cell_of(ctx.cell), (h0,) if c0 is None else (h0, c0)
        clip = ctx.clip or None
        found = reference.gradients(
            cell, x, state, Weights(*weights), lengths, ctx.reverse, clip, dy, (dh, dc)[: len(state)], cut
        )
        dx, dh0, *rest = found
        dc0 = None if c0 is None else rest.pop(0)
        return dx, dh0, dc0, *rest[:5], *nothing
    want_dx = ctx.needs_input_grad[0]
    direct = ctx.intact and is_direct(dy, dh, dc)
    out = gradients((dy, dh, dc), saved, ctx.cell, ctx.reverse, ctx.clip, want_dx, direct)
    found = [g if like is not None else None for g, like in zip(out, (x, h0, c0, *weights), strict=True)]
    return (found[0] if want_dx else None, *found[1:], *nothing)


def gradients(
    errors: Any, saved: Any, cell: int, reverse: bool, clip: float, want_dx: bool, direct: bool
) -> tuple[Tensor, ...]:
    """(dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr) from ∂E/∂(y, final h, final c), empty where absent.

    direct: bypass torch's dispatcher, and with it the operator's checks.
    """
    if direct:
        return _gradients(*_contiguous(errors), *saved, cell, reverse, clip, want_dx)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, *rest = saved
    # The kernels ask only whether there is a bias. A graph that held its values would not let it be changed.
    biases = (None if b is None else w_ih.new_empty(len(w_ih)) for b in (b_ih, b_hh))
    return backward_operator(*errors, x, h0, c0, w_ih, w_hh, *biases, *rest, cell, reverse, clip, want_dx)


torch.library.register_autograd("unvanish::forward", _autograd, setup_context=_setup_context)
register_flop_formula(torch.ops.unvanish.forward)(flops.forward)
register_flop_formula(torch.ops.unvanish.backward)(flops.backward)


class _Eager(torch.autograd.Function):
    """The operator without torch's dispatcher, which takes longer than a short sequence does."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        y, h, c, gates, cells, own = native.forward(*inputs, twice=True)
        _keep_call(ctx, inputs, own, gates, cells)
        ctx.intact = not torch_internals.saved_tensors_hooked()
        # Only outputs that have a gradient: autograd spends time on each one.
        return (y, h) if inputs[2] is None else (y, h, c)

    backward = staticmethod(_autograd)


_eager = partial(torch_internals.apply, _Eager)


def is_direct(*arriving: Tensor | None) -> bool:
    """Whether nothing but autograd sees a call: no graph is captured, no mode or transform is active, and all tensors
    lie in plain memory. Otherwise the dispatcher is needed: it resolves pending operations and handles subclasses."""
    return (
        not torch.compiler.is_compiling()
        and not torch_internals.mode_active()
        and not torch_internals.transform_active()
        and torch_internals.odd_one(arriving) is None
    )


def run(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None = None,
    reverse: bool = False,
    clip: float | None = None,
    cut: Tensor | None = None,
) -> tuple[Tensor, State]:
    """(y, final state) for x `[T, B, I]` that `native.obstacle` admits; see `unvanish.engine.run`."""
    save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, *state, *w))
    given = sort(x, state, lengths)
    inputs = native.prepared(given, w, cut)
    forward: Any = forward_operator if not is_direct() else _eager if save else native.forward
    y, *rest = forward(*inputs, native.NUMBER[cell.name], reverse, clip or 0.0, save, 0.0)
    final = tuple(rest[: len(cell.states)])
    if given.back is None:
        return y, final
    return y.index_select(1, given.back), tuple(s.index_select(0, given.back) for s in final)
