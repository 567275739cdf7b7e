"""Any cell in the C++ kernels, by programs of its step (`unvanish.engine.program`): the fast path of the manual rung.

float32 and float64 on the CPU. A sequence is one call per pass, which alternates products on packed weights with the
step's program. What the forward pass keeps for the backward pass has the kernels' own layout.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unvanish import torch_internals
from unvanish.cells import Cell, State, Weights
from unvanish.engine import native, reference
from unvanish.engine.program import Programs, programs
from unvanish.engine.sequence import transform

OPERATIONS = {} if native.MISSING else {name: i for i, name in enumerate(native._native.step_operations())}
"""operations of the interpreter, by name"""


class Ran(NamedTuple):
    """A layer and direction that has run forward."""

    after: tuple[Tensor | None, ...]
    """the states `[T, B, H]`, 0 at inactive steps; only the first state where nothing is kept"""
    final: State
    kept: Tensor | None


class Back(NamedTuple):
    """The results of the backward pass; None for those not requested."""

    dx: Tensor | None
    dinitial: State
    weights: Weights
    dstate: State | None
    """for each state the total gradients `[T, B, H]`"""
    dp: Tensor | None
    """[T, B, G·H]"""
    dq: Tensor | None
    """[T, B, Q·H]; the same tensor as dp where the two shares enter as a sum"""


def obstacle(cell: Cell, x: Tensor, state: State = (), w: Weights | None = None) -> str | None:
    """Why a cell can't run here over x, or None if it can."""
    if native.MISSING:
        return native.MISSING
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return f"programs are for float32 and float64 on the CPU, the input is {x.dtype} on {x.device}"
    if x.numel() == 0:
        return "the input is empty"
    if w is not None and w.w_hr is not None:
        return "programs have no projection"
    if torch.compiler.is_compiling() or torch_internals.mode_active():
        return "a graph is captured or a mode is active, which would not see what the programs do"
    why = transform() or native.unreadable((x, *state, *(w or ())))
    if why is not None:
        return why
    found = programs(cell, x.dtype, OPERATIONS)
    return f"no programs of its step: {found}" if isinstance(found, str) else None


def _cell(cell: Cell, dtype: torch.dtype, keep: bool, totals: bool) -> tuple[Programs, Any]:
    found = programs(cell, dtype, OPERATIONS)
    assert not isinstance(found, str)
    key = keep, totals
    if key not in found.built:
        found.built[key] = native._native.step_cell(found.native(keep, totals))
    return found, found.built[key]


class _Inputs(NamedTuple):
    """As the kernels read them, contiguous."""

    x: Tensor
    state: State
    w: Weights
    lengths: Tensor | None
    reverse: bool

    def named(self, ran: Ran) -> dict[str, Any]:
        """The arguments that describe a layer to both kernels, by the names in csrc/step_bindings.h."""
        T, B, n_in = self.x.shape
        w = self.w
        return {
            "reverse": self.reverse,
            "T": T,
            "B": B,
            "I": n_in,
            "H": self.state[0].shape[1],
            "lengths": native.address(self.lengths),
            "x": self.x.data_ptr(),
            "w_ih": w.w_ih.data_ptr(),
            "w_hh": native.address(w.w_hh),
            "b_ih": native.address(w.b_ih),
            "b_hh": native.address(w.b_hh),
            "v": native.address(w.v),
            "initial": _addresses(self.state),
            "after": _addresses(ran.after),
            "kept": native.address(ran.kept),
        }


def _contiguous(x: Tensor, state: State, w: Weights, lengths: Tensor | None, reverse: bool) -> _Inputs:
    return _Inputs(
        x.contiguous(),
        tuple(s.contiguous() for s in state),
        Weights(*(None if v is None else v.contiguous() for v in w)),  # type: ignore[arg-type]
        None if lengths is None else lengths.contiguous(),
        reverse,
    )


def _addresses(tensors: tuple[Tensor | None, ...]) -> list[int]:
    return [native.address(v) for v in tensors]


@torch.no_grad()
def forward(cell: Cell, x: Tensor, state: State, w: Weights, lengths: Tensor | None, reverse: bool, keep: bool) -> Ran:
    """Run forward; `keep`: what `backward` needs."""
    given = _contiguous(x, state, w, lengths, reverse)
    (T, B, _), H = x.shape, state[0].shape[1]
    found, built = _cell(cell, x.dtype, keep, totals=False)
    after = tuple(native.pooled(x, T, B, H) if keep or a == 0 else None for a in range(len(state)))
    final = tuple(torch.empty_like(s, memory_format=torch.contiguous_format) for s in state)
    kept = None
    if keep:
        lanes = native.call("layout", x.dtype, 0, H, native.forced_isa())[0]
        kept = native.pooled(x, T, B, len(found.kept), math.ceil(H / lanes) * lanes)
    ran = Ran(after, final, kept)
    native.call(
        "step_forward", x.dtype, built, native.forced_isa(), torch.get_num_threads(), **given.named(ran),
        final=_addresses(final),
    )  # fmt: skip
    return ran


@torch.no_grad()
def backward(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None,
    reverse: bool,
    ran: Ran,
    dy: Tensor | None,
    dfinal: tuple[Tensor | None, ...],
    clip: float | None,
    cut: Tensor | None,
    want_dx: bool,
    want_deltas: bool,
) -> Back:
    """The gradients of everything that `forward` read, from dy `[T, B, H]` and dfinal; None is zero."""
    given = _contiguous(x, state, w, lengths, reverse)
    (T, B, _), H = x.shape, state[0].shape[1]
    G, Q = len(cell.input_gates), len(cell.sources)
    found, built = _cell(cell, x.dtype, keep=True, totals=want_deltas)
    dx = native.pooled(x, *x.shape) if want_dx else None
    dinitial = tuple(torch.empty_like(s, memory_format=torch.contiguous_format) for s in state)
    grads = Weights(
        *(None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in w)  # type: ignore[arg-type]
    )
    dstate = tuple(native.pooled(x, T, B, H) if want_deltas else None for _ in state)
    summed = found.p_from_q == list(range(Q))
    dp = native.pooled(x, T, B, G * H) if want_deltas and not summed else None
    dq = native.pooled(x, T, B, Q * H) if want_deltas and Q else None
    arriving = [native.arrived(d) for d in (dy, *dfinal)]
    native.call(
        "step_backward", x.dtype, built, native.forced_isa(), torch.get_num_threads(), **given.named(ran),
        dy=native.address(arriving[0]), dfinal=_addresses(tuple(arriving[1:])),
        clip=clip or 0.0, cut=native.address(cut), dx=native.address(dx),
        dw_ih=grads.w_ih.data_ptr(), dw_hh=native.address(grads.w_hh), db_ih=native.address(grads.b_ih),
        db_hh=native.address(grads.b_hh), dv=native.address(grads.v),
        dinitial=_addresses(dinitial), dstate=_addresses(dstate), dp=native.address(dp), dq=native.address(dq),
    )  # fmt: skip
    return Back(dx, dinitial, grads, dstate if want_deltas else None, dq if summed else dp, dq)  # type: ignore[arg-type]


class _Stepped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: Cell,
        lengths: Tensor | None,
        reverse: bool,
        clip: float | None,
        cut: Tensor | None,
        *inputs: Any,
    ) -> Any:
        x, *rest = inputs
        n = len(cell.states)
        ran = forward(cell, x, tuple(rest[:n]), Weights(*rest[n:]), lengths, reverse, keep=True)
        ctx.save_for_backward(*inputs, lengths, ran.kept, *ran.after)
        ctx.cell, ctx.reverse, ctx.clip, ctx.cut = cell, reverse, clip, cut
        ctx.set_materialize_grads(False)
        return (ran.after[0], *ran.final)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy, *dfinal = grads
        cell, n = ctx.cell, len(ctx.cell.states)
        saved = ctx.saved_tensors
        x, state, w = saved[0], saved[1 : 1 + n], Weights(*saved[1 + n : 7 + n])
        lengths, kept, *after = saved[7 + n :]
        odd = native.unreadable(None if d is None else torch_internals.materialised(d) for d in grads)
        if torch.is_grad_enabled() or odd is not None:
            found = reference.gradients(cell, x, state, w, lengths, ctx.reverse, ctx.clip, dy, tuple(dfinal), ctx.cut)
            return None, None, None, None, None, *found
        ran = Ran(tuple(after), (), kept)
        back = backward(
            cell, x, state, w, lengths, ctx.reverse, ran, dy, tuple(dfinal), ctx.clip, ctx.cut,
            want_dx=ctx.needs_input_grad[5], want_deltas=False,
        )  # fmt: skip
        return None, None, None, None, None, back.dx, *back.dinitial, *back.weights


def run(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None,
    reverse: bool,
    clip: float | None,
    cut: Tensor | None,
) -> tuple[Tensor, State]:
    """(y, final state) for x `[T, B, I]`; see `unvanish.engine.run`."""
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, *state, *w)):
        y, *final = _Stepped.apply(cell, lengths, reverse, clip, cut, x, *state, *w)  # type: ignore[misc]
        return y, tuple(final)
    ran = forward(cell, x, state, w, lengths, reverse, keep=False)
    assert ran.after[0] is not None
    return ran.after[0], ran.final
