"""Any cell in the C++ kernels, by programs of its step (`unvanish.engine.program`): the fast way of the manual rung.

float32 and float64 on the CPU. A sequence is one call each way: products on packed weights and the step's program in
turn. What the way forward keeps for the way back lies in the kernels' own layout.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unvanish.cells import Cell, State, Weights
from unvanish.engine import native, reference
from unvanish.engine.program import Programs, programs
from unvanish.engine.sequence import transform

OPERATIONS = {} if native.MISSING else {name: i for i, name in enumerate(native._native.step_operations())}
"""of the interpreter, by name"""


class Ran(NamedTuple):
    """A layer and direction run forward."""

    after: tuple[Tensor | None, ...]
    """the states `[T, B, H]`, 0 at inactive steps; where nothing is kept only the first"""
    final: State
    kept: Tensor | None


class Back(NamedTuple):
    """What the way back yields; what was not asked for is None."""

    dx: Tensor | None
    dinitial: State
    weights: Weights
    dstate: State | None
    """per state the total errors `[T, B, H]`"""
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
    if not native._is_eager(x, *state, *(w or ())):
        return transform() or "a graph is captured, a mode is active, or a tensor is of a class of its own"
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

    def sizes(self) -> tuple[int, int, int, int]:
        """T, B, I, H"""
        T, B, n_in = self.x.shape
        return T, B, n_in, self.state[0].shape[1]

    def addresses(self, kept: Tensor | None) -> list[int]:
        w = self.w
        return [native._address(v) for v in (self.lengths, self.x, w.w_ih, w.w_hh, w.b_ih, w.b_hh, w.v, kept)]


def _contiguous(x: Tensor, state: State, w: Weights, lengths: Tensor | None) -> _Inputs:
    return _Inputs(
        x.contiguous(),
        tuple(s.contiguous() for s in state),
        Weights(*(None if v is None else v.contiguous() for v in w)),  # type: ignore[arg-type]
        None if lengths is None else lengths.contiguous(),
    )


def _all(tensors: tuple[Tensor | None, ...]) -> list[int]:
    return [native._address(v) for v in tensors]


@torch.no_grad()
def forward(cell: Cell, x: Tensor, state: State, w: Weights, lengths: Tensor | None, reverse: bool, keep: bool) -> Ran:
    """Run forward; `keep`: what `backward` needs."""
    given = _contiguous(x, state, w, lengths)
    T, B, _, H = given.sizes()
    found, built = _cell(cell, x.dtype, keep, totals=False)
    after = tuple(native._pooled(x, T, B, H) if keep or a == 0 else None for a in range(len(state)))
    final = tuple(torch.empty_like(s, memory_format=torch.contiguous_format) for s in state)
    kept = None
    if keep:
        lanes = native._call("layout", x.dtype)(0, H, native._forced_isa())[0]
        kept = native._pooled(x, T, B, len(found.kept), math.ceil(H / lanes) * lanes)
    run = native._call("step_forward", x.dtype)
    threads = torch.get_num_threads()
    run(
        built, reverse, given.sizes(), given.addresses(kept), _all(given.state), _all(after), _all(final), threads,
        native._forced_isa(),
    )  # fmt: skip
    return Ran(after, final, kept)


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
    want_dx: bool,
    want_deltas: bool,
) -> Back:
    """The errors of everything that `forward` read, from dy `[T, B, H]` and dfinal; None is zero."""
    given = _contiguous(x, state, w, lengths)
    T, B, _, H = given.sizes()
    G, Q = len(cell.input_gates), len(cell.sources)
    found, built = _cell(cell, x.dtype, keep=True, totals=want_deltas)
    dx = native._pooled(x, *x.shape) if want_dx else None
    dinitial = tuple(torch.empty_like(s, memory_format=torch.contiguous_format) for s in state)
    grads = Weights(
        *(None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in w)  # type: ignore[arg-type]
    )
    dstate = tuple(native._pooled(x, T, B, H) if want_deltas else None for _ in state)
    summed = found.p_from_q == list(range(Q))
    dp = native._pooled(x, T, B, G * H) if want_deltas and not summed else None
    dq = native._pooled(x, T, B, Q * H) if want_deltas and Q else None
    arriving = [None if d is None else d.contiguous() for d in (dy, *dfinal)]
    out = (arriving[0], dx, grads.w_ih, grads.w_hh, grads.b_ih, grads.b_hh, grads.v, dp, dq)
    run = native._call("step_backward", x.dtype)
    threads = torch.get_num_threads()
    run(
        built, reverse, given.sizes(), given.addresses(ran.kept), _all(given.state), _all(ran.after), _all(out),
        _all(tuple(arriving[1:])), _all(dinitial), _all(dstate), clip or 0.0, threads, native._forced_isa(),
    )  # fmt: skip
    return Back(dx, dinitial, grads, dstate if want_deltas else None, dq if summed else dp, dq)  # type: ignore[arg-type]


class _Stepped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Cell, lengths: Tensor | None, reverse: bool, clip: float | None, *inputs: Any) -> Any:
        x, *rest = inputs
        n = len(cell.states)
        ran = forward(cell, x, tuple(rest[:n]), Weights(*rest[n:]), lengths, reverse, keep=True)
        ctx.save_for_backward(*inputs, lengths, ran.kept, *ran.after)
        ctx.cell, ctx.reverse, ctx.clip = cell, reverse, clip
        ctx.set_materialize_grads(False)
        return (ran.after[0], *ran.final)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy, *dfinal = grads
        cell, n = ctx.cell, len(ctx.cell.states)
        saved = ctx.saved_tensors
        x, state, w = saved[0], saved[1 : 1 + n], Weights(*saved[1 + n : 7 + n])
        lengths, kept, *after = saved[7 + n :]
        if torch.is_grad_enabled():
            found = reference.gradients(cell, x, state, w, lengths, ctx.reverse, ctx.clip, dy, tuple(dfinal))
            return None, None, None, None, *found
        ran = Ran(tuple(after), (), kept)
        back = backward(
            cell, x, state, w, lengths, ctx.reverse, ran, dy, tuple(dfinal), ctx.clip,
            want_dx=ctx.needs_input_grad[4], want_deltas=False,
        )  # fmt: skip
        return None, None, None, None, back.dx, *back.dinitial, *back.weights


def run(
    cell: Cell, x: Tensor, state: State, w: Weights, lengths: Tensor | None, reverse: bool, clip: float | None
) -> tuple[Tensor, State]:
    """(y, final state) for x `[T, B, I]`; see `unvanish.engine.run`."""
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, *state, *w)):
        y, *final = _Stepped.apply(cell, lengths, reverse, clip, x, *state, *w)  # type: ignore[misc]
        return y, tuple(final)
    ran = forward(cell, x, state, w, lengths, reverse, keep=False)
    assert ran.after[0] is not None
    return ran.after[0], ran.final
