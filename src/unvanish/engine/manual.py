"""The manual rung: backpropagation through time of any cell, in torch operations. Any device; real floating dtypes.

forward   p = W_ih x + b_ih for all steps at once, then s_t = cell.step(p_t, q_t, s_{t-1})
backward  the derivatives of the step at all steps at once; then, step by step, the cell's calculus: one matrix product
          and a few multiply–adds
weights   ∂E/∂W_ih = Σ_t δp_tᵀ x_t,  ∂E/∂W_γ = Σ_t δq^γ_tᵀ s^{src γ}_{t-1}: one matrix product over all steps
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unvanish.cells import Cell, Point, State, Weights, calculus
from unvanish.engine import reference
from unvanish.engine.sequence import active_steps, clip_rows, states_before, steps, without_padding


class Trace(Point):
    """One layer and direction run forward, with everything its adjoint needs; time-major, `[T, B, ...]`."""

    def __init__(
        self,
        cell: Cell,
        weights: Weights,
        x: Tensor,
        before: State,
        after: State,
        final: State,
        active: Tensor | None,
        reverse: bool,
        *,
        kept: Tensor | None = None,
        native: Any = None,
    ) -> None:
        super().__init__(cell, weights, x, before, after, kept)
        self.final, self.active, self.reverse, self.native = final, active, reverse, native
        """final: the states after the last step read; active: [T, B, 1], None when all samples have T steps; native:
        what the native rung needs to go back, None when the manual rung ran. x is 0 at inactive steps."""

    @property
    def y(self) -> Tensor:
        """[T, B, R] h_t, 0 at inactive steps."""
        return self.after[0]


@dataclass(frozen=True)
class Deltas:
    """δ at every step of a trace; 0 where a sample is inactive."""

    dstate: State
    """per state its total derivative: δh `[T, B, R]`, the others `[T, B, H]`"""
    da: Tensor
    """[T, B, G·H] with respect to the input's shares"""
    da_hh: Tensor | None
    """[T, B, G·H] with respect to the recurrent shares; the same tensor where the two enter as a sum; None for a cell
    without matrices"""
    dinitial: State
    """with respect to the initial state"""
    weights: Weights | None = None
    """Σ_t g_t, where the rung that ran has it at hand"""


def trace(
    cell: Cell, x: Tensor, state: State, w: Weights, lengths: Tensor | None = None, reverse: bool = False
) -> Trace:
    """Run forward and keep every state."""
    T = x.shape[0]
    active = active_steps(lengths, T, x.device)
    x = without_padding(x, active)
    projected = cell.project(x, w)
    shares = projected.unbind(0)
    before: list[State] = [()] * T
    after: list[State] = [()] * T
    for t in steps(T, reverse):
        before[t] = state
        after[t] = new = cell.advance(shares[t], state, w)
        if active is None:
            state = new
        else:
            state = tuple(torch.where(active[t], n, old) for n, old in zip(new, state, strict=True))
            after[t] = tuple(torch.where(active[t], n, 0.0) for n in new)
    stacked = [tuple(torch.stack(s) for s in zip(*kind, strict=True)) for kind in (before, after)]
    tr = Trace(cell, w, x, *stacked, state, active, reverse)
    tr.__dict__["p"] = projected
    return tr


def adjoint(tr: Trace, dy: Tensor | None, dfinal: tuple[Tensor | None, ...], clip: float | None = None) -> Deltas:
    """Backpropagation through time, from dy `[T, B, R]` = ∂E_t/∂h_t and dfinal = ∂E/∂(final state); None is zero."""
    T, cell = tr.x.shape[0], tr.cell
    later = tuple(torch.zeros_like(s) if d is None else d for s, d in zip(tr.final, dfinal, strict=True))
    found: list[calculus.Adjoint] = [None] * T  # type: ignore[list-item]
    partials = tr.partials.steps(T)
    for t in steps(T, not tr.reverse):
        d = later if dy is None else (later[0] + dy[t], *later[1:])
        state, da, da_hh, back = calculus.adjoint(cell, partials[t], d, tr.weights)
        if clip is not None:
            back = tuple(clip_rows(b, clip) for b in back)
        if tr.active is None:
            later = back
        else:
            on = tr.active[t]
            shared = da_hh is da
            state, da = tuple(torch.where(on, s, 0.0) for s in state), torch.where(on, da, 0.0)
            da_hh = da if shared else None if da_hh is None else torch.where(on, da_hh, 0.0)
            later = tuple(torch.where(on, new, old) for new, old in zip(back, later, strict=True))
        found[t] = calculus.Adjoint(state, da, da_hh, ())
    dstate = tuple(torch.stack(s) for s in zip(*(f.state for f in found), strict=True))
    da = torch.stack([f.da for f in found])
    if found[0].da_hh is None:
        da_hh = None
    else:
        da_hh = da if found[0].da_hh is found[0].da else torch.stack([f.da_hh for f in found])  # type: ignore[misc]
    return Deltas(dstate, da, da_hh, later)


def weight_gradients(tr: Trace, flow: Deltas) -> Weights:
    """∂E/∂W = Σ_t g_t for every weight present."""
    if flow.weights is not None:
        return flow.weights
    w, cell = tr.weights, tr.cell
    da = flow.da.flatten(0, 1)
    dw_hh = db_hh = dw_hr = dv = None
    if w.w_hh is not None:
        assert flow.da_hh is not None
        pairs = recurrent_pairs(tr, flow.da_hh)
        dw_hh = torch.cat([d.flatten(0, 1).mT @ s.flatten(0, 1) for d, s in pairs])
        db_hh = None if w.b_hh is None else flow.da_hh.flatten(0, 1).sum(0)
    unprojected = dict(zip(cell.states, flow.dstate, strict=True))
    if w.w_hr is not None:
        dh = flow.dstate[0].flatten(0, 1)
        dw_hr = dh.mT @ cell.output(tr).flatten(0, 1)
        unprojected[cell.states[0]] = flow.dstate[0] @ w.w_hr
    if w.v is not None:
        dv = torch.stack(
            [calculus.sum_of(tr.partials.v, vector, unprojected).flatten(0, 1).sum(0) for vector in cell.vectors]
        )
    return Weights(da.mT @ tr.x.flatten(0, 1), dw_hh, None if w.b_ih is None else da.sum(0), db_hh, dw_hr, dv)


def recurrent_pairs(at: Point, da_hh: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(δq^γ, the state that γ's matrix reads), `[..., n·H]` and `[..., R]`, in the order of the rows of W_hh; gates that
    all read one state stand together."""
    cell = at.cell
    sources = cell.sources
    gates = tuple(sources)
    if len(set(sources.values())) == 1 and not cell.same_step:
        return [(da_hh, at.before[cell.states.index(sources[gates[0]])])]
    found = []
    for gate, d in zip(gates, da_hh.chunk(len(gates), dim=-1), strict=True):
        states = at.after if gate in cell.same_step else at.before
        found.append((d, states[cell.states.index(sources[gate])]))
    return found


class _Manual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Cell, lengths: Tensor | None, reverse: bool, clip: float | None, *inputs: Any) -> Any:
        x, *rest = inputs
        state, w = tuple(rest[: len(cell.states)]), Weights(*rest[len(cell.states) :])
        tr = trace(cell, x, state, w, lengths, reverse)
        ctx.save_for_backward(*inputs, lengths, tr.active, *tr.after)
        ctx.cell, ctx.reverse, ctx.clip = cell, reverse, clip
        ctx.set_materialize_grads(False)
        return (tr.y, *tr.final)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy, *dfinal = grads
        cell, n = ctx.cell, len(ctx.cell.states)
        saved = ctx.saved_tensors
        x, state, w = saved[0], saved[1 : 1 + n], Weights(*saved[1 + n : 7 + n])
        lengths, active, *after = saved[7 + n :]
        if torch.is_grad_enabled():
            found = reference.gradients(cell, x, state, w, lengths, ctx.reverse, ctx.clip, dy, tuple(dfinal))
            return None, None, None, None, *found
        before = tuple(states_before(a, s, lengths, ctx.reverse) for a, s in zip(after, state, strict=True))
        # Only the shapes of the final states are read.
        tr = Trace(cell, w, without_padding(x, active), before, tuple(after), state, active, ctx.reverse)
        flow = adjoint(tr, dy, tuple(dfinal), ctx.clip)
        dx = flow.da @ w.w_ih if ctx.needs_input_grad[4] else None
        return None, None, None, None, dx, *flow.dinitial, *weight_gradients(tr, flow)


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
    y, *final = _Manual.apply(cell, lengths, reverse, clip, x, *state, *w)
    return y, tuple(final)
