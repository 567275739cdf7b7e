"""The derivatives of a step by autograd, and what its structure is.

Since the step is elementwise, one vector–Jacobian product with ones per state gives each derivative as a diagonal, for
every step and sample at once. (A vjp and not a jvp: a spiking cell's surrogate gradient is a custom backward.)

Which derivatives exist at all, which states are made from which, and which gate carries the memory is found once per
cell, by evaluating its step at random numbers.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from unvanish.cells.base import Cell, State
from unvanish.cells.calculus import Diagonals, Partials, Point

UNITS, SAMPLES = 16, 64
"""of the random evaluation"""


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
    """All derivatives at these points, without those that are identically zero."""
    return _derive(cell, structure(cell), at.p.detach(), at.q, at.before, at.weights.v)


def _derive(
    cell: Cell, known: Structure | None, p: Tensor, q: Tensor | None, before: State, v: Tensor | None
) -> Partials:
    """By one vjp with ones per state; `known` None: everything is asked for, and absent where autograd finds no path."""
    shape = before[-1].shape[:-1] + (p.shape[-1] // max(1, len(cell.input_gates)),)
    arguments = cell.arguments(p, q, before, None if v is None else v.expand(*shape[:-1], *v.shape).movedim(-2, 0))
    with torch.enable_grad():
        leaves = [type(group)(*(x.detach().requires_grad_() for x in group)) for group in arguments]
        out = cell.step(*leaves)
        # A state that is an argument handed on, or returned twice, becomes a tensor of its own.
        states: list[Tensor] = []
        for a in out if isinstance(out, tuple) else (out,):
            states.append(a.view_as(a) if a.is_leaf or any(a is b for b in states) else a)
    named = dict(zip(cell.states, states, strict=True))
    kinds: list[Diagonals] = [{}, {}, {}, {}, {}]
    names = (cell.states, tuple(cell.sources), cell.input_gates, cell.states, cell.vectors)
    groups = (leaves[1], leaves[0], leaves[2], leaves[3])
    for a, value in named.items():
        if not value.requires_grad:
            continue
        others = {b: w for b, w in named.items() if b != a and w.requires_grad and not w.is_leaf}
        asked: list[tuple[int, str, Tensor]] = []
        for b, other in others.items():
            if known is None or (a, b) in known.made:
                asked.append((0, b, other))
        for kind, (fields, group) in enumerate(zip(names[1:], groups, strict=True), start=1):
            wanted = None if known is None else (known.q, known.p, known.s, known.v)[kind - 1]
            for field, leaf in zip(fields, group, strict=True):
                if wanted is not None and ((a, field) not in wanted or (kind == 2 and field in known.shared)):  # type: ignore[union-attr]
                    continue
                asked.append((kind, field, leaf))
        if not asked:
            continue
        # What comes through another state of the same step is that state's: its derivative stops there.
        through: dict[str, Tensor] = {}

        def stop(b: str, through: dict[str, Tensor] = through) -> Any:
            def hook(d: Tensor) -> Tensor:
                through[b] = d
                return torch.zeros_like(d)

            return hook

        stops = [other.register_hook(stop(b)) for kind, b, other in asked if kind == 0]
        try:
            found = torch.autograd.grad(
                value, [leaf for *_, leaf in asked], torch.ones_like(value), retain_graph=True, allow_unused=True
            )
        finally:
            for handle in stops:
                handle.remove()
        for (kind, field, _), reached in zip(asked, found, strict=True):
            diagonal = through.get(field) if kind == 0 else reached
            if diagonal is not None:
                kinds[kind][a, field] = diagonal
            elif known is not None:
                kinds[kind][a, field] = torch.zeros_like(value)
    made, dq, dp, ds, dv = kinds
    if known is not None and known.shared:
        shared = {(a, g): d for (a, g), d in dq.items() if g in known.shared}
        dp = {**dp, **shared}
        if set(dp) == set(dq) and len(shared) == len(dq) and cell.input_gates == tuple(cell.sources):
            dp = dq
    return Partials(made, dq, dp, ds, dv)


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
    kinds = [tuple(key for key, d in kind.items() if bool((d != 0).any())) for kind in with_hooks]
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
        ("same_step", cell.same_step, tuple(cell.sources)),
        ("memory", (cell.remembers,), cell.states),
        ("initial", tuple(cell.initial), cell.states),
        ("write_gate", () if cell.write_gate is None else (cell.write_gate,), cell.gates),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise complain(f"{attribute}: expected names among {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    if not cell.input_gates:
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
