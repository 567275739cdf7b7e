"""What a cell is: an elementwise function of its pre-activations and its states.

    p_t = W_ih x_t + b_ih          the input's share of every gate's pre-activation
    q_t = W_γ s^{src(γ)}_{t-1} + b_hh    the recurrent share, one matrix per gate γ
    s_t = φ(p_t, q_t, s_{t-1}; v)        `Cell.step`, elementwise over the units

A new cell is a class with the names of its gates and states and a `step`; everything else in the library follows from
these (`unvanish.cells.calculus`).

Shapes have any leading dimensions `...`: `[B]` for one step, `[T, B]` for a whole sequence whose states are known.
Symbols: `I` input size, `H` hidden size, `G` gates, `R` size of h (`P` with a projection, else `H`).
"""

from abc import ABC, abstractmethod
from collections import namedtuple
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

if TYPE_CHECKING:
    from unvanish.cells.calculus import Partials, Point
    from unvanish.cells.torch_kernel import TorchKernel

State = tuple[Tensor, ...]
"""One tensor per name in `Cell.states`: (h,), (h, c), …"""


class Weights(NamedTuple):
    """The weights of one layer and direction, in torch's layout; gates are stacked along the first axis."""

    w_ih: Tensor
    """[G·H, I], the gates that read the input"""
    w_hh: Tensor | None
    """[G·H, R], the gates with a recurrent matrix; None for a cell without any"""
    b_ih: Tensor | None = None
    """[G·H]"""
    b_hh: Tensor | None = None
    """[G·H]"""
    w_hr: Tensor | None = None
    """[P, H]: a projection of h"""
    v: Tensor | None = None
    """[V, H]: the cell's learnable vectors"""

    def detach(self) -> "Weights":
        """The same numbers, outside any graph."""
        return Weights(*(None if v is None else v.detach() for v in self))  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> "Weights":
        """In another dtype, as parts of the same graph."""
        return Weights(*(None if v is None else v.to(dtype) for v in self))  # type: ignore[arg-type]


@lru_cache
def named(fields: tuple[str, ...]) -> Any:
    """A tuple type with these field names: what `Cell.step` reads as `p.i`, `s.c`, `v.w_f`."""
    return namedtuple("named", fields)


class Cell(ABC):
    """One recurrent step, elementwise over the units: s_t = step(p_t, q_t, s_{t-1}; v).

    Subclass it with `gates`, `states` and `step`. The result works in `unvanish.nn.Recurrent` and with everything that
    measures, diagnoses and cures:

        class MinimalGatedUnit(Cell):
            gates, states = ("f", "n"), ("h",)

            def step(self, p, q, s, v):
                f = (p.f + q.f).sigmoid()
                return (1 - f) * s.h + f * (p.n + f * q.n).tanh()

    Constants are arguments of the constructor, kept as attributes. All derivatives come from autograd on `step`, over
    all time steps at once (`unvanish.cells.derived`); a subclass may override `partials` with its own.
    """

    gates: ClassVar[tuple[str, ...]]
    """names of the pre-activations, in the order in which their weights are stacked"""
    states: ClassVar[tuple[str, ...]] = ("h",)
    """names of the states; the first is the layer's output"""
    vectors: ClassVar[tuple[str, ...]] = ()
    """names of learnable `[H]` vectors"""
    recurrent: ClassVar[Mapping[str, str] | None] = None
    """gate → the state that its matrix reads; None: every gate reads the first state; {}: there is no matrix"""
    inputs: ClassVar[tuple[str, ...] | None] = None
    """the gates that read the input; None: all of them"""
    given: ClassVar[tuple[str, ...]] = ()
    """the last of the input gates, whose share is no product but comes with the input: H columns each, behind those
    that W_ih reads. Masks and other signals of a unit's own"""
    same_step: ClassVar[tuple[str, ...]] = ()
    """gates whose matrix reads a state made in this very step, as the second stage of LEM; that state must not depend
    on them"""
    memory: ClassVar[str | None] = None
    """the state that carries the error over time; None: c if there is one, else the first state"""
    write_gate: ClassVar[str | None] = None
    """the gate that scales what is written into the memory, where it is not one minus the carry: the LSTM's i"""
    titles: ClassVar[Mapping[str, str]] = {}
    """gate → its name in words, as records call the path through its matrix; the gate's own name where not listed"""
    rectifies: ClassVar[bool] = False
    """whether a unit either passes the error on unchanged or not at all, and nothing bounds its state: relu"""
    initial: ClassVar[Mapping[str, float]] = {}
    """state → its value before the first step; 0 where not listed"""

    torch_kernel: ClassVar["TorchKernel | None"] = None
    """torch's own kernel for sequences of this cell; not inherited, since a subclass may take another step"""

    name: ClassVar[str]
    """how records and messages call the cell; the class's name in lower case where not given"""

    @property
    def carry_title(self) -> str:
        """What carries the memory, in words: "forget gate"."""
        gate = self.carry_gate
        return "carry" if gate is None else self.titles.get(gate[0], f"gate {gate[0]}").replace("_", " ")

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()
        if "torch_kernel" not in vars(cls):
            cls.torch_kernel = None

    @abstractmethod
    def step(self, p: Any, q: Any, s: Any, v: Any) -> Any:
        """The states at t, in the order of `states`; a single tensor where there is one state.

        Args:
            p: named tuple, gate → `[..., H]` the input's share; the gates in `inputs`.
            q: named tuple, gate → `[..., H]` the recurrent share; the gates in `recurrent`.
            s: named tuple, state → `[..., H]` at t − 1.
            v: named tuple, vector → `[H]`.

        Every operation has to be elementwise over the last axis.
        """

    def effective(self, w: Weights) -> Weights:
        """The weights that the step multiplies with, from the learnt ones; differentiable. The same by default."""
        return w

    def initialise_(self, w: Weights, generator: torch.Generator | None = None) -> None:
        """Change freshly drawn weights in place, which are U(−1/√H, 1/√H); nothing by default."""
        return

    # What follows from the declarations.

    @property
    def sources(self) -> dict[str, str]:
        """Gate → the state that its matrix reads, for gates that have one."""
        chosen = self.recurrent
        return (
            dict.fromkeys(self.gates, self.states[0])
            if chosen is None
            else {g: chosen[g] for g in self.gates if g in chosen}
        )

    @property
    def input_gates(self) -> tuple[str, ...]:
        """The gates that read the input."""
        return self.gates if self.inputs is None else self.inputs

    @property
    def learnt_gates(self) -> tuple[str, ...]:
        """The gates that have rows in W_ih: the input gates that are not `given`."""
        return self.input_gates[: len(self.input_gates) - len(self.given)]

    @property
    def remembers(self) -> str:
        """The state that carries the error over time."""
        return self.memory or ("c" if "c" in self.states else self.states[0])

    def start(self, like: Tensor, sizes: tuple[int, ...]) -> State:
        """The states before the first step, `[B, n]` each, for input like x `[..., B, I]`."""
        B, first = like.shape[-2], self.initial
        return tuple(
            like.new_full((B, n), first[a]) if a in first else like.new_zeros(B, n)
            for a, n in zip(self.states, sizes, strict=True)
        )

    def project(self, x: Tensor, w: Weights) -> Tensor:
        """p = W_ih x + b_ih, `[..., G·H]`: the input's share of the pre-activations, for every step at once."""
        return linear(x, w.w_ih, w.b_ih)

    def recur(self, s: State, w: Weights, gates: tuple[str, ...] | None = None) -> Tensor | None:
        """q = W_hh s + b_hh, `[..., G·H]`: each gate's block times the state it reads; None for a cell without
        matrices. `gates` picks some of them."""
        if w.w_hh is None:
            return None
        sources = self.sources
        wanted = tuple(sources) if gates is None else gates
        groups = blocks(tuple(sources.items()), wanted)
        if len(groups) == 1 and wanted == tuple(sources):
            return linear(s[self.states.index(groups[0][0])], w.w_hh, w.b_hh)
        H = w.w_hh.shape[0] // len(sources)
        parts = {}
        for source, rows in groups:
            for gate, row in rows:
                part = slice(row * H, (row + 1) * H)
                bias = None if w.b_hh is None else w.b_hh[part]
                parts[gate] = linear(s[self.states.index(source)], w.w_hh[part], bias)
        return torch.cat([parts[g] for g in wanted], dim=-1)

    def evaluate(self, p: Tensor, q: Tensor | None, s: State, v: Tensor | None) -> State:
        """`step` on stacked shares, p `[..., G·H]` and q `[..., G·H]`; h before any projection."""
        out = self.step(*self.arguments(p, q, s, v))
        return out if isinstance(out, tuple) else (out,)

    def arguments(self, p: Tensor, q: Tensor | None, s: State, v: Tensor | None) -> tuple[Any, Any, Any, Any]:
        """The named tuples that `step` reads."""
        matrices = tuple(self.sources)
        return (
            named(self.input_gates)(*p.chunk(len(self.input_gates), dim=-1)),
            named(matrices)(*(() if q is None else q.chunk(len(matrices), dim=-1))),
            named(self.states)(*s),
            named(self.vectors)(*(() if v is None else v.unbind(0))),
        )

    def advance(self, p: Tensor, s: State, w: Weights, cut: bool = False) -> State:
        """One step: the states at t from the input's share `[B, G·H]` and the states before; `cut`: no error goes back
        to these through the matrices."""
        q = self.recur(tuple(v.detach() for v in s) if cut else s, w)
        new = self.evaluate(p, q, s, w.v)
        if self.same_step:
            new = self.evaluate(p, self.completed(q, new, w), s, w.v)
        return new if w.w_hr is None else (linear(new[0], w.w_hr), *new[1:])

    def completed(self, q: Tensor | None, new: State, w: Weights) -> Tensor:
        """q with the shares of the `same_step` gates, which read the states just made."""
        assert q is not None
        late = self.recur(new, w, self.same_step)
        assert late is not None
        found = dict(zip(self.sources, q.chunk(len(self.sources), dim=-1), strict=True))
        found |= dict(zip(self.same_step, late.chunk(len(self.same_step), dim=-1), strict=True))
        return torch.cat(list(found.values()), dim=-1)

    def shares(self, before: State, after: State, w: Weights) -> Tensor | None:
        """q of steps whose states before and after are known, for all of them at once."""
        q = self.recur(before, w)
        return self.completed(q, after, w) if self.same_step else q

    def output(self, at: "Point") -> Tensor:
        """`[..., H]`: the first state at these points, before any projection."""
        return self.evaluate(at.p, at.q, at.before, at.weights.v)[0]

    def partials(self, at: "Point") -> "Partials":
        """The derivatives of the step at these points, each a diagonal `[..., H]`; derived by autograd unless a cell
        writes its own."""
        from unvanish.cells.derived import partials

        return partials(self, at)

    def carry(self, at: "Point") -> Tensor | None:
        """C_mm = ∂m_t/∂m_{t-1} of the memory m at fixed shares, `[..., H]`: what a unit keeps of it in one step; None
        for a cell that carries nothing."""
        return at.partials.s.get((self.remembers, self.remembers))

    def activations(self, at: "Point") -> Tensor:
        """`[..., G, H]`: the gates' values; of a gate without a nonlinearity its pre-activation."""
        from unvanish.cells.activations import activations

        return activations(self, at).values

    def sensitivity(self, at: "Point") -> Tensor:
        """`[..., G, H]`: φ'(a) / max φ', in [0, 1], of each gate; near 0 where the gate is saturated."""
        from unvanish.cells.activations import activations

        return activations(self, at).sensitivity

    @property
    def carries(self) -> bool:
        """Whether the memory's old value enters the new one at fixed shares: ∂m_t/∂m_{t-1} ≠ 0."""
        from unvanish.cells.derived import structure

        return (self.remembers, self.remembers) in structure(self).s

    @property
    def carry_gate(self) -> tuple[str, int] | None:
        """(gate, sign): the carry ∂m_t/∂m_{t-1} of the memory m at fixed q is σ(a) of this gate (sign +1) or 1 − σ(a)
        (sign −1); None where no single gate is the carry. Found by evaluating the step."""
        from unvanish.cells.derived import structure

        return structure(self).carry_gate

    def __repr__(self) -> str:
        constants = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({constants})"


@lru_cache
def blocks(
    sources: tuple[tuple[str, str], ...], wanted: tuple[str, ...]
) -> tuple[tuple[str, tuple[tuple[str, int], ...]], ...]:
    """The wanted gates grouped by the state that their matrices read: (state, ((gate, row of blocks), …))."""
    rows = {gate: (i, source) for i, (gate, source) in enumerate(sources)}
    groups: dict[str, list[tuple[str, int]]] = {}
    for gate in wanted:
        row, source = rows[gate]
        groups.setdefault(source, []).append((gate, row))
    return tuple((source, tuple(found)) for source, found in groups.items())
