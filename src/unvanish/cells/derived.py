"""The derivatives of a step by autograd, and what its structure is.

Since the step is elementwise, one vector–Jacobian product with ones per state gives each derivative as a diagonal, for
every step and sample at once. (A vjp and not a jvp: a spiking cell's surrogate gradient is a custom backward.)

Which derivatives exist at all, which states are made from which, and which gate carries the memory is found once per
cell, by evaluating its step at random numbers.
"""

import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from unvanish.cells.calculus import Diagonals, Partials, Point
from unvanish.cells.cell import Cell, State

UNITS, SAMPLES = 16, 64
"""of the random evaluation"""

CHUNK_ELEMENTS = 2**16
"""of each state that are derived at a time"""


@dataclass(frozen=True)
class Structure:
    """Which derivatives of a step are not identically zero."""

    made: tuple[tuple[str, str], ...]
    q: tuple[tuple[str, str], ...]
    p: tuple[tuple[str, str], ...]
    s: tuple[tuple[str, str], ...]
    v: tuple[tuple[str, str], ...]
    shared: frozenset[str]
    """gates whose p and q enter as a sum"""
    carry_gate: tuple[str, int] | None
    """see `Cell.carry_gate`"""

    def asks(self, kind: int, state: str, name: str) -> bool:
        """Whether a derivative has to be computed; kinds in the order of `Partials`."""
        if kind == 2 and name in self.shared:
            return False
        return (state, name) in (self.made, self.q, self.p, self.s, self.v)[kind]


_STRUCTURES: WeakKeyDictionary[Cell, Structure] = WeakKeyDictionary()


def structure(cell: Cell) -> Structure:
    """The structure of a cell's step.

    Raises:
        ValueError: the declarations contradict each other, `step` returns something else than its states, or it is not
            elementwise over the units.
    """
    if cell not in _STRUCTURES:
        _STRUCTURES[cell] = _probe(cell)
    return _STRUCTURES[cell]


def partials(cell: Cell, at: Point) -> Partials:
    """All derivatives at these points, without those that are identically zero; differentiable where gradients are
    enabled and an argument of the step is part of a graph."""
    known, p, q, v = structure(cell), at.p, at.q, at.weights.v
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (p, q, v, *at.before)):
        return _derive(cell, known, p, q, at.before, v, graph=True)
    p = p.detach()
    lead, H = at.before[-1].shape[:-1], at.before[-1].shape[-1]
    span = max(1, CHUNK_ELEMENTS // max(1, math.prod(lead[1:]) * H)) if len(lead) > 1 else 0
    if not span or span >= lead[0]:
        return _derive(cell, known, p, q, at.before, v)
    # A few steps at a time, so that the many intermediate values stay in the cache.
    like = p.new_empty(0)
    stacked = {
        a: (gates, like.new_empty(*lead, len(gates), H))
        for a in cell.states
        if (gates := tuple(g for g in cell.sources if (a, g) in known.q))
    }
    dq = {(a, g): k[..., i, :] for a, (gates, k) in stacked.items() for i, g in enumerate(gates)}
    made, dp, ds, dv = (
        {key: like.new_empty(*lead, H) for key in keys}
        for keys in (known.made, [k for k in known.p if k[1] not in known.shared], known.s, known.v)
    )
    for first in range(0, lead[0], span):
        part = slice(first, first + span)
        found = _derive(cell, known, p[part], None if q is None else q[part], tuple(s[part] for s in at.before), v)
        for whole, kind in ((made, found.made), (dq, found.q), (dp, found.p), (ds, found.s), (dv, found.v)):
            for key, into in whole.items():
                into[part] = kind[key]
    return Partials(made, dq, _with_shared(cell, known, dq, dp), ds, dv, stacked)


def _derive(
    cell: Cell,
    known: Structure | None,
    p: Tensor,
    q: Tensor | None,
    before: State,
    v: Tensor | None,
    graph: bool = False,
) -> Partials:
    """By one vjp with ones per state; `known` None: everything is asked for, and absent where autograd finds no
    path. `graph`: the derivatives stay parts of the arguments' graph."""

    def leaf(x: Tensor) -> Tensor:
        return x.view_as(x) if graph and x.requires_grad else x.detach().requires_grad_()

    lead, H = before[-1].shape[:-1], p.shape[-1] // len(cell.input_gates)
    wide = None if v is None else v.expand(*lead, *v.shape).movedim(-2, 0)
    arguments = cell.arguments(p, q, before, wide)
    with torch.enable_grad():
        leaves = [type(group)(*map(leaf, group)) for group in arguments]
        out = cell.step(*leaves)
        # A state that is an argument handed on, or returned twice, becomes a tensor of its own.
        states: list[Tensor] = []
        arrived = {id(x) for group in leaves for x in group}
        for a in out if isinstance(out, tuple) else (out,):
            states.append(a.view_as(a) if id(a) in arrived else a)
            arrived.add(id(a))
    made, dq, dp, ds, dv = kinds = [Diagonals() for _ in range(5)]
    named_states = dict(zip(cell.states, states, strict=True))
    for a, value in named_states.items():
        if not value.requires_grad:
            continue
        others = [(b, s) for b, s in named_states.items() if b != a and s.requires_grad and not s.is_leaf]
        by_kind = [others, *(zip(g._fields, g, strict=True) for g in (leaves[1], leaves[0], leaves[2], leaves[3]))]
        asked = [
            (kind, name, leaf)
            for kind, pairs in enumerate(by_kind)
            for name, leaf in pairs
            if known is None or known.asks(kind, a, name)
        ]
        if asked:
            for (kind, name, _), diagonal in zip(asked, _vjp(value, asked, graph), strict=True):
                if diagonal is not None:
                    kinds[kind][a, name] = diagonal
                elif known is not None:
                    kinds[kind][a, name] = torch.zeros_like(value).expand(*lead, H)
    return Partials(made, dq, dp if known is None else _with_shared(cell, known, dq, dp), ds, dv)


def _vjp(value: Tensor, asked: list[tuple[int, str, Tensor]], graph: bool) -> list[Tensor | None]:
    """The derivative of a state by each of these; what comes through another state of the same step (kind 0) stops
    there, since it is that state's."""
    through: dict[str, Tensor] = {}

    def stop(name: str) -> Any:
        def hook(d: Tensor) -> Tensor:
            through[name] = d
            return torch.zeros_like(d)

        return hook

    handles = [leaf.register_hook(stop(name)) for kind, name, leaf in asked if kind == 0]
    try:
        # Of the sum: with `grad_outputs` torch imports SymPy to compare shapes, which takes more than a second.
        with torch.enable_grad():
            total = value.sum()
        found = torch.autograd.grad(
            total, [leaf for *_, leaf in asked], retain_graph=True, create_graph=graph, allow_unused=True
        )
    finally:
        for handle in handles:
            handle.remove()
    return [through.get(name) if kind == 0 else d for (kind, name, _), d in zip(asked, found, strict=True)]


def _with_shared(cell: Cell, known: Structure, dq: Diagonals, dp: Diagonals) -> Diagonals:
    """∂/∂p with the gates whose p and q enter as a sum; `dq` itself where these are all."""
    if len(known.shared) == len(cell.gates):
        return dq
    return dp | {(a, g): d for (a, g), d in dq.items() if g in known.shared}


def _probe(cell: Cell) -> Structure:
    _check_names(cell)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    G, Q, V = len(cell.input_gates), len(cell.sources), len(cell.vectors)
    p, q = draw(SAMPLES, G * UNITS), draw(SAMPLES, Q * UNITS) if Q else None
    before = tuple(draw(SAMPLES, UNITS) for _ in cell.states)
    v = draw(V, UNITS) if V else None
    _check_step(cell, p, q, before, v)
    with_hooks = _derive(cell, None, p, q, before, v)
    found = (with_hooks.made, with_hooks.q, with_hooks.p, with_hooks.s, with_hooks.v)
    kinds = [tuple(key for key, d in kind.items() if bool((d != 0).any())) for kind in found]
    made, dq, dp, ds, dv = kinds
    shared = frozenset(
        g
        for g in cell.input_gates
        if g in cell.sources
        and {a for a, x in dq if x == g} == {a for a, x in dp if x == g} != set()
        and all(torch.equal(with_hooks.q[a, g], with_hooks.p[a, g]) for a, x in dq if x == g)
    )
    # A peephole's carry is f plus what its vectors add: the gate shows where they are zero.
    bare = None if v is None else torch.zeros_like(v)
    at_zero = with_hooks if v is None else _derive(cell, None, p, q, before, bare)
    return Structure(made, dq, dp, ds, dv, shared, _carry_gate(cell, at_zero, p, q))


def _carry_gate(cell: Cell, d: Partials, p: Tensor, q: Tensor | None) -> tuple[str, int] | None:
    m = cell.remembers
    carry = d.s.get((m, m))
    if carry is None:
        return None
    shares = dict(zip(cell.input_gates, p.chunk(len(cell.input_gates), dim=-1), strict=True))
    if q is not None:
        for gate, share in zip(cell.sources, q.chunk(len(cell.sources), dim=-1), strict=True):
            shares[gate] = shares[gate] + share if gate in shares else share
    for gate, a in shares.items():
        for sign, value in ((1, a.sigmoid()), (-1, 1 - a.sigmoid())):
            if torch.allclose(carry, value, rtol=1e-12, atol=0):
                return gate, sign
    return None


def _check_names(cell: Cell) -> None:
    def complain(what: str) -> Any:
        return ValueError(f"{type(cell).__name__}: {what}")

    for attribute in ("gates", "states"):
        names = getattr(cell, attribute, ())
        if not names or not isinstance(names, tuple) or len(set(names)) < len(names):
            raise complain(f"{attribute}: expected a tuple of different names, got {names!r}")
    for attribute, names, known in (
        ("recurrent", tuple(cell.recurrent or ()), cell.gates),
        ("recurrent", tuple(cell.sources.values()), cell.states),
        ("inputs", cell.input_gates, cell.gates),
        ("given", cell.given, tuple(g for g in cell.input_gates[-len(cell.given) :] if g not in cell.sources)),
        ("same_step", cell.same_step, tuple(cell.sources)),
        ("memory", (cell.remembers,), cell.states),
        ("initial", tuple(cell.initial), cell.states),
        ("write_gate", () if cell.write_gate is None else (cell.write_gate,), cell.gates),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise complain(f"{attribute}: expected names among {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    if not cell.learnt_gates:
        raise complain("inputs: expected at least one gate that reads the input")


def _check_step(cell: Cell, p: Tensor, q: Tensor | None, before: State, v: Tensor | None) -> None:
    """`step` returns the states, and a unit's depend on that unit alone."""
    out = cell.evaluate(p, q, before, v)
    found = [getattr(a, "shape", type(a).__name__) for a in out]
    if len(out) != len(cell.states) or any(not isinstance(a, Tensor) or a.shape != before[0].shape for a in out):
        raise ValueError(
            f"{type(cell).__name__}.step: expected {', '.join(cell.states)}, each as large as the states it is given "
            f"{tuple(before[0].shape)}, got {', '.join(map(str, found))}"
        )
    half = slice(None, None, 2)

    def part(stacked: Tensor | None, n: int) -> Tensor | None:
        return None if stacked is None else torch.cat([c[..., half] for c in stacked.chunk(n, dim=-1)], dim=-1)

    fewer = cell.evaluate(
        part(p, len(cell.input_gates)),  # type: ignore[arg-type]
        part(q, len(cell.sources)),
        tuple(s[..., half] for s in before),
        None if v is None else v[:, half],
    )
    for name, whole, alone in zip(cell.states, out, fewer, strict=True):
        if not torch.allclose(whole[..., half], alone, rtol=1e-12, atol=1e-12, equal_nan=True):
            raise ValueError(
                f"{type(cell).__name__}.step: expected every operation to act on each unit alone, but state "
                f"{name!r} of a unit changes with the other units (a sum, a norm or a softmax over the last axis?)"
            )
