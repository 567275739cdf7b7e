"""The manual rung: backpropagation through time of any cell. Any device; real floating dtypes.

On the CPU in the kernels, by programs of the cell's step, where they can (`unvanish.engine.stepped`); else in torch
operations:

forward   p = W_ih x + b_ih for all steps at once, then s_t = cell.step(p_t, q_t, s_{t-1})
backward  the derivatives of the step at all steps at once; then, step by step, the cell's calculus: one matrix product
          and a few multiply–adds
weights   ∂E/∂W_ih = Σ_t δp_tᵀ x_t,  ∂E/∂W_γ = Σ_t δq^γ_tᵀ s^{src γ}_{t-1}: one matrix product over all steps
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unvanish.cells import Cell, Partials, Point, State, Weights, calculus
from unvanish.engine import reference, stepped
from unvanish.engine.sequence import active_steps, clip_rows, cut_steps, states_before, steps, without_padding


class Ran(NamedTuple):
    """What the programs need for the backward pass."""

    given: State
    """the initial states"""
    lengths: Tensor | None
    left: stepped.Ran


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
        kept: Tensor | Callable[[slice], Tensor] | None = None,
        native: Any = None,
        ran: "Ran | None" = None,
        fused: Any = None,
    ) -> None:
        super().__init__(cell, weights, x, before, after)
        self._kept_at = kept
        """`kept`, or a function of steps that lays them out: what the kernels keep of a long sequence is large"""
        self.final, self.active, self.reverse = final, active, reverse
        self.native, self.ran, self.fused = native, ran, fused
        """final: the states after the last step read; active: [T, B, 1], None when all samples have T steps; native:
        what the native rung's backward needs, None when another ran; ran, fused: likewise for the manual rung's
        programs and the fused rung. x is 0 at inactive steps."""

    @cached_property
    def kept(self) -> Tensor | None:
        """[T, B, ≥ G, H] as `Point.kept`."""
        return self._kept_at(slice(None)) if callable(self._kept_at) else self._kept_at

    @cached_property
    def partials_by_step(self) -> list[Partials]:
        """The derivatives of each step."""
        return self.partials.steps(len(self.x))

    @property
    def y(self) -> Tensor:
        """[T, B, R] h_t, 0 at inactive steps."""
        return self.after[0]

    def stretch(self, steps: slice) -> "Trace":
        """These steps alone, without what a backward pass needs; `final` is that of the whole."""
        before, after = (tuple(s[steps] for s in states) for states in (self.before, self.after))
        at = self._kept_at
        kept = None if at is None else at(steps) if callable(at) else at[steps]
        active = None if self.active is None else self.active[steps]
        return Trace(self.cell, self.weights, self.x[steps], before, after, self.final, active, self.reverse, kept=kept)


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
    inputs = (x, *state, *w)
    in_graph = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    if not in_graph and stepped.obstacle(cell, x, state, w) is None:
        left = stepped.forward(cell, x, state, w, lengths, reverse, keep=True)
        states: Any = left.after
        before_each = tuple(states_before(a, s, lengths, reverse) for a, s in zip(states, state, strict=True))
        ran = Ran(state, lengths, left)
        return Trace(cell, w, x, before_each, states, left.final, active, reverse, ran=ran)
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
    was, became = (tuple(torch.stack(s) for s in zip(*kind, strict=True)) for kind in (before, after))
    tr = Trace(cell, w, x, was, became, state, active, reverse)
    tr.__dict__["p"] = projected
    return tr


def adjoint(
    tr: Trace,
    dy: Tensor | None,
    dfinal: tuple[Tensor | None, ...],
    clip: float | None = None,
    cut: Tensor | None = None,
) -> Deltas:
    """Backpropagation through time, from dy `[T, B, R]` = ∂E_t/∂h_t and dfinal = ∂E/∂(final state); None is zero.

    The same step back as `calculus.adjoint`, written into memory for all steps at once.
    """
    cell = tr.cell
    if tr.ran is not None:
        given, n, left = tr.ran
        back = stepped.backward(
            cell, tr.x, given, tr.weights, n, tr.reverse, left, dy, dfinal, clip, cut, want_dx=False,
            want_deltas=True,
        )  # fmt: skip
        assert back.dstate is not None
        assert back.dp is not None
        return Deltas(back.dstate, back.dp, back.dq, back.dinitial, back.weights)
    d, w = tr.partials, tr.weights
    T, B, h = *tr.x.shape[:2], cell.states[0]
    later = {a: torch.zeros_like(s) if e is None else e for a, s, e in zip(cell.states, tr.final, dfinal, strict=True)}
    H, Q = w.w_ih.shape[0] // len(cell.input_gates), len(cell.sources)
    dstate = {a: s.new_empty(T, B, H) for a, s in zip(cell.states, tr.final, strict=True)}
    projected = None if w.w_hr is None else tr.x.new_empty(T, B, w.w_hr.shape[0])
    dq = tr.x.new_empty(T, B, Q, H)
    into = _places(cell, d, dq)
    partials, cuts = d.steps(T), cut_steps(cut, T)
    for t in steps(T, not tr.reverse):
        arrived = dict(later)
        if dy is not None:
            arrived[h] = arrived[h] + dy[t]
        if tr.active is not None:
            arrived = {a: torch.where(tr.active[t], v, 0.0) for a, v in arrived.items()}
        if projected is not None:
            projected[t] = arrived[h]
        total, _ = calculus.completed(cell, partials[t], arrived, w)
        for a, v in total.items():
            dstate[a][t] = v
        for a, k, place, first in into:
            if first:
                torch.mul(k[t], total[a].unsqueeze(-2), out=place[t])
            else:
                place[t].addcmul_(k[t], total[a].unsqueeze(-2))
        back = calculus.handed_back(cell, partials[t], total, w, dq[t], cuts[t])
        if clip is not None:
            back = {a: clip_rows(v, clip) for a, v in back.items()}
        if tr.active is None:
            later = {a: back[a] if a in back else torch.zeros_like(v) for a, v in later.items()}
        else:
            held = tr.active[t]
            later = {a: torch.where(held, back.get(a, 0.0), v) for a, v in later.items()}  # type: ignore[call-overload]
    da_hh = dq.flatten(2) if Q else None
    reported = tuple(dstate[a] if a != h or projected is None else projected for a in cell.states)
    return Deltas(reported, input_deltas(cell, d, dstate, da_hh), da_hh, tuple(later[a] for a in cell.states))


def _places(cell: Cell, d: Partials, dq: Tensor) -> list[tuple[str, Tensor, Tensor, bool]]:
    """What each state adds to δq: (a, K_a, its place in dq, whether it is the first to be written there)."""
    order = {gate: i for i, gate in enumerate(cell.sources)}
    written: set[str] = set()
    found = []
    for a, (gates, k) in d.by_state(cell).items():
        # Adjacent gates are written in one operation if all of them are new or all have been written before.
        run: list[int] = []
        for n, gate in enumerate(gates):
            if run and (order[gate] != order[gates[run[-1]]] + 1 or (gate in written) != (gates[run[-1]] in written)):
                found.append(_run(a, gates, k, run, dq, order, written))
                run = []
            run.append(n)
        found.append(_run(a, gates, k, run, dq, order, written))
        written |= set(gates)
    untouched = [i for gate, i in order.items() if gate not in written]
    dq[:, :, untouched] = 0
    return found


def _run(
    a: str, gates: tuple[str, ...], k: Tensor, run: list[int], dq: Tensor, order: dict[str, int], written: set[str]
) -> tuple[str, Tensor, Tensor, bool]:
    first = order[gates[run[0]]]
    return a, k[..., run[0] : run[-1] + 1, :], dq[:, :, first : first + len(run)], gates[run[0]] not in written


def input_deltas(cell: Cell, d: Partials, dstate: dict[str, Tensor], da_hh: Tensor | None) -> Tensor:
    """δp `[..., G·H]` of all steps from δs; `da_hh` itself where p and q enter as a sum."""
    if d.p is d.q:
        assert da_hh is not None
        return da_hh
    shared = dict(zip(cell.sources, () if da_hh is None else da_hh.chunk(len(cell.sources), dim=-1), strict=True))
    parts = [
        shared[g] if calculus.same(d, g) and g in shared else calculus.sum_of(d.p, g, dstate) for g in cell.input_gates
    ]
    return torch.cat(parts, dim=-1)


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
    """(δq^γ, the state that γ's matrix reads), `[..., n·H]` and `[..., R]`, in the order of the rows of W_hh; gates
    that all read one state are joined."""
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
        state, w = tuple(rest[: len(cell.states)]), Weights(*rest[len(cell.states) :])
        tr = trace(cell, x, state, w, lengths, reverse)
        ctx.save_for_backward(*inputs, lengths, tr.active, *tr.after)
        ctx.cell, ctx.reverse, ctx.clip, ctx.cut = cell, reverse, clip, cut
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
            found = reference.gradients(cell, x, state, w, lengths, ctx.reverse, ctx.clip, dy, tuple(dfinal), ctx.cut)
            return None, None, None, None, None, *found
        before = tuple(states_before(a, s, lengths, ctx.reverse) for a, s in zip(after, state, strict=True))
        # Only the shapes of the final states are read.
        tr = Trace(cell, w, without_padding(x, active), before, tuple(after), state, active, ctx.reverse)
        flow = adjoint(tr, dy, tuple(dfinal), ctx.clip, ctx.cut)
        dx = flow.da @ w.w_ih if ctx.needs_input_grad[5] else None
        return None, None, None, None, None, dx, *flow.dinitial, *weight_gradients(tr, flow)


def how(cell: Cell, x: Tensor) -> str:
    """How this rung runs a cell and an input like x."""
    why = stepped.obstacle(cell, x)
    return "in the kernels, by programs of its step" if why is None else f"in torch operations, {why}"


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
    """(y, final state) for x `[T, B, I]`; see `unvanish.engine.run`."""
    if stepped.obstacle(cell, x, state, w) is None:
        return stepped.run(cell, x, state, w, lengths, reverse, clip, cut)
    y, *final = _Manual.apply(cell, lengths, reverse, clip, cut, x, *state, *w)
    return y, tuple(final)
