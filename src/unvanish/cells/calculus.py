"""The calculus of a step: adjoint, Jacobian–vector product and Jacobian of any cell, from its elementwise derivatives.

Since the step is elementwise, each of its derivatives is a diagonal. With s_t = φ(p_t, q_t, s_{t-1}; v) and, where a
state is made from another of the same step (the LSTM's h_t = o_t ⊙ tanh c_t),

    U_ab = ∂s^a_t/∂s^b_t        K_aγ = ∂s^a_t/∂q^γ_t        C_ab = ∂s^a_t/∂s^b_{t-1}      at fixed other arguments,

one step back is, for a total derivative δs_t,

    δs^b_t     += Σ_a U_ab ⊙ δs^a_t                               states made from it in the same step
    δq^γ_t      = Σ_a K_aγ ⊙ δs^a_t
    δs^b_{t-1} += Σ_a C_ab ⊙ δs^a_t + Σ_{γ: src γ = b} W_γᵀ δq^γ_t

and the Jacobian ∂s_t/∂s_{t-1} has the blocks C_ab + Σ_γ diag(K_aγ) W_γ, completed along U. The gates in
`Cell.same_step` read a state of the same step: their W_γᵀ δq^γ_t goes to δs^b_t instead. A projection W_hr acts on h
last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from unvanish.cells.cell import Cell, State, Weights, blocks

Diagonals = dict[tuple[str, str], Tensor]
"""(state, argument) → `[..., H]`; what is identically zero is absent"""


Stacked = dict[str, tuple[tuple[str, ...], Tensor]]
"""state a → (gates, K_aγ of these gates side by side `[..., n, H]`)"""


@dataclass(frozen=True)
class Partials:
    """The derivatives of one or many steps, each a diagonal; the first of each pair of names is the state derived."""

    made: Diagonals
    """U: (a, b) for a state a made from state b of the same step"""
    q: Diagonals
    """K: (a, γ)"""
    p: Diagonals
    """(a, γ), by the input's share; the same tensors as in `q` where p and q enter as a sum"""
    s: Diagonals
    """C: (a, b)"""
    v: Diagonals
    """(a, vector)"""
    stacked: Stacked | None = None
    """`q` again, where whoever made it has it so; see `by_state`"""

    def map(self, f: Callable[[Tensor], Tensor]) -> "Partials":
        """f of every diagonal."""
        q = {key: f(d) for key, d in self.q.items()}
        p = q if self.p is self.q else {key: q[key] if self.q.get(key) is d else f(d) for key, d in self.p.items()}
        made, s, v = ({key: f(d) for key, d in kind.items()} for kind in (self.made, self.s, self.v))
        return Partials(made, q, p, s, v)

    def at(self, where: int | slice) -> "Partials":
        """Of one step or a slice of them."""
        return self.map(lambda d: d[where])

    def steps(self, T: int) -> "list[Partials]":
        """Of each of T steps: as `at`, but fast."""
        kinds = [
            ({key: d.unbind(0) for key, d in kind.items()}) for kind in (self.made, self.q, self.p, self.s, self.v)
        ]
        found = []
        for t in range(T):
            made, q, p, s, v = ({key: d[t] for key, d in kind.items()} for kind in kinds)
            if self.p is self.q:
                p = q
            else:
                p = {key: q[key] if self.q.get(key) is d else p[key] for key, d in self.p.items()}
            found.append(Partials(made, q, p, s, v))
        return found

    def by_state(self, cell: Cell) -> Stacked:
        """K side by side for each state that gates move directly, gates in the order of `Cell.sources`."""
        if self.stacked is not None:
            return self.stacked
        gates = {a: tuple(g for g in cell.sources if (a, g) in self.q) for a in cell.states}
        return {a: (names, torch.stack([self.q[a, g] for g in names], dim=-2)) for a, names in gates.items() if names}


class Adjoint(NamedTuple):
    """What one step of backpropagation through time yields."""

    state: State
    """δs_t: total derivatives of the error with respect to each state at t"""
    da: Tensor
    """[..., G·H] with respect to the input's shares p_t, gates in the order of `Cell.input_gates`"""
    da_hh: Tensor | None
    """[..., G·H] with respect to the recurrent shares q_t, gates in the order of `Cell.sources`; the same tensor as
    `da` where the two enter as a sum; None for a cell without matrices"""
    previous: State
    """what the error of step t and later contributes to δs_{t-1}"""


class Point:
    """One or many steps of a cell whose states are known: where its derivatives are taken.

    All tensors are `[..., H]` with the same leading dimensions.
    """

    def __init__(
        self,
        cell: Cell,
        weights: Weights,
        x: Tensor,
        before: State,
        after: State,
        kept: Tensor | None = None,
    ) -> None:
        self.cell, self.weights, self.x, self.before, self.after = cell, weights, x, before, after
        self._kept = kept

    @cached_property
    def kept(self) -> Tensor | None:
        """[..., ≥ G, H] the gates' values, where whoever ran the steps kept them, and after them what else the cell's
        own `partials` reads."""
        return self._kept

    @cached_property
    def p(self) -> Tensor:
        """[..., G·H] the input's shares."""
        return self.cell.project(self.x, self.weights)

    @cached_property
    def q(self) -> Tensor | None:
        """[..., G·H] the recurrent shares."""
        return self.cell.shares(self.before, self.after, self.weights)

    @cached_property
    def gates(self) -> Tensor:
        """[..., G, H] the gates' values."""
        if self.kept is None:
            return self.cell.activations(self)
        return self.kept[..., : len(self.cell.gates), :]

    @cached_property
    def partials(self) -> Partials:
        """The step's derivatives here."""
        return self.cell.partials(self)

    def state_before(self, name: str) -> Tensor:
        """s_{t-1} by name."""
        return self.before[self.cell.states.index(name)]


def backward_order(cell: Cell, made: Diagonals) -> list[str]:
    """The states, each after all that are made from it in the same step."""
    return list(_backward_order(cell.name, cell.states, tuple(made), cell.same_step, tuple(cell.sources.items())))


@lru_cache
def _backward_order(
    name: str,
    states: tuple[str, ...],
    made: tuple[tuple[str, str], ...],
    same_step: tuple[str, ...],
    sources: tuple[tuple[str, str], ...],
) -> tuple[str, ...]:
    order: list[str] = []
    waiting = list(states)
    read = {source for gate, source in sources if gate in same_step}
    later = {*made, *((a, source) for source in read for a in states if a not in read)}
    while waiting:
        ready = [b for b in waiting if not any(y == b and x in waiting and x != b for x, y in later)]
        if not ready:
            raise ValueError(f"step: states of {name} are made from each other in a circle: {', '.join(waiting)}")
        order += ready
        waiting = [b for b in waiting if b not in ready]
    return tuple(order)


def adjoint(cell: Cell, d: Partials, error: State, w: Weights) -> Adjoint:
    """One step back; error = what arrives at each state at t from outside and from later steps, not through another
    state of the same step."""
    names = cell.states
    total, dq = completed(cell, d, dict(zip(names, error, strict=True)), w)
    reported = tuple(total[a] for a in names) if w.w_hr is None else (error[0], *(total[a] for a in names[1:]))
    for gate in cell.sources:
        if gate not in dq:
            dq[gate] = sum_of(d.q, gate, total)
    ordered = [dq[gate] for gate in cell.sources]
    da_hh = None if not ordered else ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim=-1)
    if d.p is d.q:
        assert da_hh is not None
        da = da_hh
    else:
        parts = [dq[g] if same(d, g) and g in dq else sum_of(d.p, g, total) for g in cell.input_gates]
        da = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    stacked = None if da_hh is None else da_hh.unflatten(-1, (len(ordered), -1))
    previous = handed_back(cell, d, total, w, stacked)
    like = dict(zip(names, error, strict=True))
    back = tuple(previous[a] if a in previous else torch.zeros_like(like[a]) for a in names)
    return Adjoint(reported, da, da_hh, back)


def handed_back(
    cell: Cell, d: Partials, total: dict[str, Tensor], w: Weights, dq: Tensor | None, cut: bool = False
) -> dict[str, Tensor]:
    """What goes to each state at t − 1: Σ_a C_ab ⊙ δs^a_t + Σ_γ W_γᵀ δq^γ_t, from the complete δs_t and
    δq_t `[..., Q, H]`; with `cut` the first sum alone. States to which nothing goes are absent."""
    found: dict[str, Tensor] = {}
    if w.w_hh is not None and not cut:
        assert dq is not None
        for source, rows, weights in _by_source(cell, w):
            # Not by a list of indices, which a GPU would be sent, and waited for, at every step.
            part = dq.flatten(-2) if rows is None else torch.cat([dq[..., row, :] for row in rows], dim=-1)
            found[source] = part @ weights
    for (a, b), c in d.s.items():
        found[b] = torch.addcmul(found[b], c, total[a]) if b in found else c * total[a]
    return found


def _by_source(cell: Cell, w: Weights) -> list[tuple[str, list[int] | None, Tensor]]:
    """(state, which of the gates read it at t − 1, their rows of W_hh); None for all of them."""
    assert w.w_hh is not None
    sources = cell.sources
    gates = tuple(g for g in sources if g not in cell.same_step)
    groups = blocks(tuple(sources.items()), gates)
    if len(groups) == 1 and len(gates) == len(sources):
        return [(groups[0][0], None, w.w_hh)]
    H = w.w_hh.shape[0] // len(sources)
    stacked = w.w_hh.view(len(sources), H, -1)
    found = []
    for source, rows in groups:
        chosen = [row for _, row in rows]
        found.append((source, chosen, torch.cat([stacked[row] for row in chosen])))
    return found


def completed(
    cell: Cell, d: Partials, arrived: dict[str, Tensor], w: Weights
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(δs_t of every state, before any projection; δq of the `same_step` gates) from what arrived at each state from
    outside and from later steps; a state at which nothing arrived may be missing, and stays so."""
    total, dq = dict(arrived), dict[str, Tensor]()
    h = cell.states[0]
    if w.w_hr is not None and h in total:
        total[h] = total[h] @ w.w_hr
    if not (d.made or cell.same_step):
        return total, dq
    for b in backward_order(cell, d.made):
        for (a, of), u in d.made.items():
            if of == b and a in total:
                total[b] = total[b] + u * total[a] if b in total else u * total[a]
        for gate in cell.same_step:
            if cell.sources[gate] == b and any((a, gate) in d.q for a in total):
                dq[gate] = sum_of(d.q, gate, total)
                back = dq[gate] @ block(cell, w, gate)
                total[b] = total[b] + back if b in total else back
    return total, dq


def same(d: Partials, gate: str) -> bool:
    """Whether p and q of a gate enter as a sum, so that their derivatives are one."""
    pairs = [(key, v) for key, v in d.p.items() if key[1] == gate]
    return bool(pairs) and all(d.q.get(key) is v for key, v in pairs)


def sum_of(d: Diagonals, argument: str, total: dict[str, Tensor]) -> Tensor:
    """Σ_a D_a,argument ⊙ δs^a."""
    found: Tensor | None = None
    for (a, name), k in d.items():
        if name == argument and a in total:
            found = k * total[a] if found is None else torch.addcmul(found, k, total[a])
    if found is None:
        a = next(iter(total.values()))
        return torch.zeros_like(a)
    return found


def block(cell: Cell, w: Weights, gate: str) -> Tensor:
    """W_γ `[H, R]`."""
    assert w.w_hh is not None
    gates = tuple(cell.sources)
    H = w.w_hh.shape[0] // len(gates)
    i = gates.index(gate)
    return w.w_hh[i * H : (i + 1) * H]


def jvp(cell: Cell, d: Partials, tangent: State, w: Weights) -> State:
    """J v: how the states at t move with those at t − 1; tangent one `[..., n]` per state."""
    moved = dict(zip(cell.states, tangent, strict=True))
    sources = cell.sources
    dq = {
        gate: moved[source] @ block(cell, w, gate).mT for gate, source in sources.items() if gate not in cell.same_step
    }
    new: dict[str, Tensor] = {}
    for a in reversed(backward_order(cell, d.made)):
        for gate in cell.same_step:
            if gate not in dq and (a, gate) in d.q:
                dq[gate] = new[sources[gate]] @ block(cell, w, gate).mT
        parts = [(c, moved[b]) for (x, b), c in d.s.items() if x == a]
        parts += [(k, dq[gate]) for (x, gate), k in d.q.items() if x == a]
        parts += [(u, new[b]) for (x, b), u in d.made.items() if x == a]
        if not parts:
            new[a] = torch.zeros_like(tangent[cell.states.index(a)])
            continue
        (first, v), *others = parts
        total = first * v
        for k, v in others:
            total = torch.addcmul(total, k, v)
        new[a] = total
    if w.w_hr is not None:
        new[cell.states[0]] = new[cell.states[0]] @ w.w_hr.mT
    return tuple(new[a] for a in cell.states)


def matrices(cell: Cell, d: Partials, w: Weights, memory: dict[tuple[str, str], Tensor] | None = None) -> Diagonals:
    """(a, b) → `[..., H, n_b]` ∂s^a_t/∂s^b_{t-1} directly, not through another state of the same step; C_ab lies on the
    diagonal.

    With `memory`, which keeps each matrix for the next call of the same or fewer leading steps to overwrite, the pairs
    that no matrix connects are left out.
    """
    found: Diagonals = {}
    for gate, source in cell.sources.items():
        if gate in cell.same_step:
            continue
        for (a, name), k in d.q.items():
            if name == gate:
                w_gate = block(cell, w, gate)
                if (a, source) in found:
                    found[a, source].addcmul_(k.unsqueeze(-1), w_gate)
                elif memory is None:
                    found[a, source] = k.unsqueeze(-1) * w_gate
                else:
                    if (a, source) not in memory:
                        memory[a, source] = k.new_empty(*k.shape, w_gate.shape[-1])
                    into = memory[a, source][: len(k)]
                    found[a, source] = torch.mul(k.unsqueeze(-1), w_gate, out=into)
    for (a, b), c in d.s.items():
        if (a, b) in found:
            found[a, b].diagonal(dim1=-2, dim2=-1).add_(c)
        elif memory is None:
            found[a, b] = torch.diag_embed(c)
    return found


def late_matrices(cell: Cell, d: Partials, w: Weights) -> Diagonals:
    """(a, source) → `[..., H, H]` diag(K_aγ) W_γ of the gates that read a state of the same step."""
    found: Diagonals = {}
    for gate in cell.same_step:
        for (a, name), k in d.q.items():
            if name == gate:
                part = k.unsqueeze(-1) * block(cell, w, gate)
                key = a, cell.sources[gate]
                found[key] = part if key not in found else found[key] + part
    return found


def jacobian(cell: Cell, d: Partials, w: Weights, sizes: tuple[int, ...]) -> Tensor:
    """∂s_t/∂s_{t-1}, `[..., S, S]`, of the full state, all states side by side; sizes: of each state."""
    direct, late = matrices(cell, d, w), late_matrices(cell, d, w)
    like = next(iter(direct.values()))
    width = dict(zip(cell.states, sizes, strict=True))
    rows: dict[str, dict[str, Tensor]] = {}

    def add(row: dict[str, Tensor], b: str, part: Tensor) -> None:
        row[b] = row[b] + part if b in row else part

    for a in reversed(backward_order(cell, d.made)):
        row = {b: m for (x, b), m in direct.items() if x == a}
        for (x, c), u in d.made.items():
            if x == a:
                for b, m in rows[c].items():
                    add(row, b, u.unsqueeze(-1) * m)
        for (x, source), through in late.items():
            if x == a:
                for b, m in rows[source].items():
                    add(row, b, through @ m)
        rows[a] = row
    if w.w_hr is not None:
        h = cell.states[0]
        rows[h] = {b: w.w_hr @ m for b, m in rows[h].items()}

    def zero(a: str, b: str) -> Tensor:
        return like.new_zeros(*like.shape[:-2], width[a], width[b])

    return torch.cat(
        [torch.cat([rows[a].get(b, zero(a, b)) for b in cell.states], dim=-1) for a in cell.states], dim=-2
    )
