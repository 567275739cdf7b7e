"""A cell's step and its derivative as programs for the kernels' interpreter.

The step is recorded once per cell and dtype, followed by autograd's vector–Jacobian product: from the gradients that
arrive at the states of a step it computes δq, δp, δv, the gradient that reaches s_{t-1} without passing the matrices,
and the states' total gradients. The forward program keeps what the backward one can't cheaply recompute from them.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from unvanish import torch_internals
from unvanish.cells import Cell
from unvanish.cells.cell import named
from unvanish.engine.elementwise import Graph, Recorder, UnsupportedError

KINDS = ("share", "before", "after", "vector", "kept", "arrived", "dq", "dp", "ds", "dv", "total")
"""the meaning of a program's input or output, numbered as `Kind` in csrc/program.h"""

CHEAP = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "abs", "sign", "dsigmoid", "dtanh", "relu", "maximum", "minimum"),
        *("lt", "le", "eq", "ne", "where"),
    )
)
"""operations that cost no more than storing their result"""

AROUND = ("project", "recur", "evaluate", "arguments", "advance", "completed", "shares")
"""methods of a cell around its step that the kernels' products replace"""

Place = tuple[str, int]
"""(kind, index)"""


class Program(NamedTuple):
    """A program in the kernels' format: five numbers per instruction, two per input and output."""

    code: list[int]
    inputs: list[int]
    outputs: list[int]
    constants: list[float]
    temporaries: int


NOTHING = Program([], [], [], [], 0)


class Programs:
    """All programs of one cell in one dtype.

    Raises:
        UnsupportedError: the step can't be given by programs.
    """

    def __init__(self, cell: Cell, dtype: torch.dtype, operations: Mapping[str, int]) -> None:
        self.cell, self._operations = cell, operations
        self.built: dict[Any, Any] = {}
        """the kernels' cells made from `native`, by its arguments"""
        r = _record(cell, dtype)
        self._graph, self._names = r.graph, r.places
        self._states, self._back = r.states, r.back
        self._fuse_shares()
        # A state that is an argument handed on keeps its own name.
        self._free = {n: place for place, n in self._names.items() if place[0] in ("before", "vector", "arrived")}
        for a, n in enumerate(self._states):
            self._free.setdefault(n, ("after", a))
        self.kept = self._choose_kept()
        self._check_late()

    def _fuse_shares(self) -> None:
        """Replace p and q by their sum for gates that use nothing else; the product adds them at no extra cost."""
        g, cell = self._graph, self.cell
        gates = tuple(cell.sources)
        needed = g.reachable([*self._states, *self._back.values()])
        users: dict[int, set[int]] = {}
        for n in needed:
            for a in g.nodes[n].args:
                users.setdefault(a, set()).add(n)
        ends = {*self._states, *self._back.values()}
        shares: dict[tuple[int, int], int] = {}
        for gate in cell.gates:
            p = self._names.pop(("p", cell.input_gates.index(gate)), -1) if gate in cell.input_gates else -1
            q = self._names.pop(("q", gates.index(gate)), -1) if gate in gates else -1
            row_p = cell.input_gates.index(gate) if p >= 0 else -1
            row_q = gates.index(gate) if q >= 0 else -1
            both = users.get(p, set()) | users.get(q, set())
            total = next(iter(both), -1)
            if p >= 0 and q >= 0 and len(both) == 1 and not {p, q} & ends and g.nodes[total] == ("add", (p, q), None):
                shares[row_p, row_q] = total
                continue
            if p >= 0:
                shares[row_p, -1] = p
            if q >= 0:
                shares[-1, row_q] = q
        read = set(needed)

        def operands(share: tuple[int, int]) -> tuple[bool, str, bool, bool]:
            source = "" if share[1] < 0 else cell.sources[gates[share[1]]]
            return share[1] >= 0 and gates[share[1]] in cell.same_step, source, share[0] < 0, share[1] < 0

        self.shares = sorted((s for s, n in shares.items() if n in read), key=operands)
        for i, share in enumerate(self.shares):
            self._names["share", i] = shares[share]

    def _choose_kept(self) -> list[int]:
        """Nodes of the forward pass that the backward pass starts from, besides the states."""
        g, forward = self._graph, set(self._graph.reachable(self._states, self._names.values()))
        back = self._graph.reachable(self._back.values(), {*self._free, *forward})
        wanted = [n for n in back if n in forward and n not in self._free and g.nodes[n].op != "constant"]
        for n in sorted(wanted, reverse=True):
            others = {*wanted} - {n}
            if self._makes(n, others):
                wanted = sorted(others)
        return sorted(wanted)

    def _makes(self, n: int, given: set[int]) -> bool:
        """Whether cheap operations compute this node from `given` and the values that are available anyway."""
        node = self._graph.nodes[n]
        if n in given or n in self._free or node.op == "constant":
            return True
        return node.op in CHEAP and all(self._makes(a, given) for a in node.args)

    def _check_late(self) -> None:
        late = {self._names["share", i] for i in range(len(self.shares)) if self._is_late(self.shares[i][1])}
        read = self._graph.reachable([self._states[a] for a in self._late_sources()], self._names.values())
        if late & set(read):
            raise UnsupportedError("a state that a gate in `same_step` reads depends on such a gate")

    def _is_late(self, q: int) -> bool:
        return q >= 0 and tuple(self.cell.sources)[q] in self.cell.same_step

    def _late_sources(self) -> list[int]:
        return sorted({self.cell.states.index(self.cell.sources[gate]) for gate in self.cell.same_step})

    def forward(self, keep: bool) -> Program:
        """The states, and with `keep` what the backward pass needs."""
        ends: dict[Place, int] = {("after", a): n for a, n in enumerate(self._states)}
        if keep:
            ends |= {("kept", i): n for i, n in enumerate(self.kept)}
        return self._compile(ends, {n: place for place, n in self._names.items() if place[0] != "arrived"})

    @cached_property
    def early(self) -> Program:
        """The states that gates of `same_step` read."""
        ends: dict[Place, int] = {("after", a): self._states[a] for a in self._late_sources()}
        return self._compile(ends, {n: place for place, n in self._names.items()}) if ends else NOTHING

    def backward(self, totals: bool) -> Program:
        """All gradients that follow from those at the states; with `totals` the states' total gradients too."""
        same = self.p_from_q
        ends = {
            place: n
            for place, n in self._back.items()
            if (place[0] != "total" or totals) and not (place[0] == "dp" and same[place[1]] >= 0)
        }
        return self._compile(ends, self._leaves())

    @cached_property
    def late_errors(self) -> Program:
        """δq of the gates in `same_step`."""
        ends = {place: n for place, n in self._back.items() if place[0] == "dq" and self._is_late(place[1])}
        return self._compile(ends, self._leaves()) if ends else NOTHING

    def _leaves(self) -> dict[int, Place]:
        return self._free | {n: ("kept", i) for i, n in enumerate(self.kept)}

    @cached_property
    def p_from_q(self) -> list[int]:
        """For each input gate the recurrent gate with the same gradient; −1 where there is none."""
        rows = {n: i for (kind, i), n in self._back.items() if kind == "dq"}
        found = []
        for i, gate in enumerate(self.cell.input_gates):
            n = self._back["dp", i]
            own = tuple(self.cell.sources).index(gate) if gate in self.cell.sources else -1
            found.append(own if own >= 0 and self._back["dq", own] == n else rows.get(n, -1))
        return found

    def native(self, keep: bool, totals: bool) -> tuple[Any, ...]:
        """The arguments from which `_native.step_cell` builds a cell."""
        cell, gates = self.cell, tuple(self.cell.sources)
        counts = [len(cell.input_gates), len(gates), len(cell.states), len(cell.vectors), len(self.kept) if keep else 0]
        back = (self.late_errors, self.backward(totals)) if keep else (NOTHING, NOTHING)
        return (
            counts,
            [row for share in self.shares for row in share],
            [cell.states.index(source) for source in cell.sources.values()],
            [int(gate in cell.same_step) for gate in gates],
            self.p_from_q,
            self.early,
            self.forward(keep),
            *back,
        )

    def _compile(self, ends: dict[Place, int], leaves: dict[int, Place]) -> Program:
        return _assemble(self._graph, ends, leaves, self._operations)


class _Recorded(NamedTuple):
    graph: Graph
    places: dict[Place, int]
    """inputs by name; kinds "p" and "q" are the shares of a gate"""
    states: list[int]
    back: dict[Place, int]


def _record(cell: Cell, dtype: torch.dtype) -> _Recorded:
    one, other = (_record_at(cell, dtype, torch.Size(shape)) for shape in ((2, 3), (3, 5)))
    if one.graph.nodes != other.graph.nodes or one[1:] != other[1:]:
        raise UnsupportedError("its operations differ from call to call, or with the number of samples and units")
    return one


def _record_at(cell: Cell, dtype: torch.dtype, shape: torch.Size) -> _Recorded:
    recorder = Recorder(shape, dtype)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=dtype, device="cpu") * 0.8 + 0.1

    kinds = {"p": cell.input_gates, "q": tuple(cell.sources), "before": cell.states, "vector": cell.vectors}
    places: dict[Place, int] = {}
    groups: list[Any] = []
    with torch.enable_grad(), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        for kind, names in kinds.items():
            tensors = [recorder.input(draw().requires_grad_(), (kind, i)) for i in range(len(names))]
            places |= {(kind, i): recorder.number(x) for i, x in enumerate(tensors)}
            groups.append(named(names)(*tensors))
        arrived = [recorder.input(draw(), ("arrived", i)) for i in range(len(cell.states))]
        places |= {("arrived", i): recorder.number(x) for i, x in enumerate(arrived)}
        with recorder:
            out = cell.step(*groups)
            states: list[Tensor] = []
            for a in out if isinstance(out, tuple) else (out,):
                states.append(a.view_as(a) if a.is_leaf or any(a is b for b in states) else a)
            numbers = [recorder.number(a) for a in states]
            reached = [a for a in states if a.requires_grad]
            asked = [*reached, *(leaf for group in groups for leaf in group)]
            given = [d for a, d in zip(states, arrived, strict=True) if a.requires_grad]
            try:
                found = torch_internals.vjp(reached, given, asked) if reached else [None] * len(asked)
            except RuntimeError as error:
                raise UnsupportedError(f"autograd can't derive it: {error}") from error
            ends = [recorder.graph.constant(0.0) if d is None else recorder.number(d) for d in found]
    totals = iter(ends)
    back: dict[Place, int] = {
        ("total", i): next(totals) if a.requires_grad else recorder.number(arrived[i]) for i, a in enumerate(states)
    }
    for kind, names in (("dp", kinds["p"]), ("dq", kinds["q"]), ("ds", kinds["before"]), ("dv", kinds["vector"])):
        back |= {(kind, i): next(totals) for i in range(len(names))}
    return _Recorded(recorder.graph, places, numbers, back)


def _assemble(g: Graph, ends: dict[Place, int], leaves: dict[int, Place], operations: Mapping[str, int]) -> Program:
    """Instructions for these outputs, with multiply–adds fused and temporaries reused after their last use."""
    order = g.reachable(ends.values(), leaves)
    uses: dict[int, int] = {}
    for n in order:
        for a in () if n in leaves else g.nodes[n].args:
            uses[a] = uses.get(a, 0) + 1
    wanted = set(ends.values())

    def joins(n: int) -> bool:
        return g.nodes[n].op == "mul" and n not in leaves and n not in wanted and uses[n] == 1

    steps: dict[int, tuple[str, tuple[int, ...]]] = {}
    for n in order:
        node = g.nodes[n]
        if n in leaves or node.op == "constant":
            continue
        if node.op == "input":
            raise UnsupportedError(f"its derivative reads {node.key}, which is not there any more")
        steps[n] = node.op, node.args
        if node.op == "add":
            x, y = node.args if joins(node.args[0]) else node.args[::-1]
            if joins(x):
                steps[n] = "fma", (*g.nodes[x].args, y)
                del steps[x]
    inputs = [n for n in order if n in leaves]
    constants = [n for n in order if g.nodes[n].op == "constant" and n not in leaves]
    first: dict[int, int] = {}
    for i, n in enumerate(ends.values()):
        if n in steps:
            first.setdefault(n, len(inputs) + i)
    fixed = {n: i for i, n in enumerate(inputs)} | first
    fixed |= {n: len(inputs) + len(ends) + i for i, n in enumerate(constants)}
    base = len(inputs) + len(ends) + len(constants)
    code: list[int] = []
    temporaries = 0
    registers, spare, last = dict(fixed), list[int](), _last_uses(steps)

    def emit(op: str, to: int, args: Iterable[int]) -> None:
        given = [registers[a] for a in args]
        given += [given[0]] * (3 - len(given))
        code.extend([operations[op], to, *given])

    for n, (op, args) in steps.items():
        done = [registers[a] for a in set(args) if last[a] == n and a not in fixed]
        spare += done
        if n in fixed:
            emit(op, fixed[n], args)
            continue
        if not spare:
            spare.append(base + temporaries)
            temporaries += 1
        emit(op, spare[-1], args)
        registers[n] = spare.pop()
    for i, n in enumerate(ends.values()):
        if fixed.get(n) != len(inputs) + i:
            emit("copy", len(inputs) + i, [n])
    return Program(
        code,
        [v for n in inputs for v in (KINDS.index(leaves[n][0]), leaves[n][1])],
        [v for kind, index in ends for v in (KINDS.index(kind), index)],
        [g.nodes[n].key for n in constants],
        temporaries,
    )


def _last_uses(steps: dict[int, tuple[str, tuple[int, ...]]]) -> dict[int, int]:
    return {a: n for n, (_, args) in steps.items() for a in args}


_KNOWN: WeakKeyDictionary[Cell, dict[Any, "Programs | str"]] = WeakKeyDictionary()


def programs(cell: Cell, dtype: torch.dtype, operations: Mapping[str, int]) -> "Programs | str":
    """The programs of a cell in its current state, or the reason why there are none."""
    own = [name for name in AROUND if getattr(type(cell), name) is not getattr(Cell, name)]
    if own:
        return f"the cell has its own {', '.join(own)}"
    try:
        constants = _constants(vars(cell))
    except UnsupportedError as why:
        return str(why)
    known = _KNOWN.setdefault(cell, {})
    key = dtype, constants
    if key not in known:
        # A changed constant needs new programs; the previous ones are dropped.
        for old in [k for k in known if k[0] == dtype]:
            del known[old]
        try:
            made = Programs(cell, dtype, operations)
            if _constants(vars(cell)) != constants:
                raise UnsupportedError("it changes the cell's attributes")
            known[key] = made
        except UnsupportedError as why:
            known[key] = str(why)
    return known[key]


def _constants(value: Any, depth: int = 5) -> Any:
    """The attributes of a cell that its step may read, in a form that can be compared."""
    kind = type(value)
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | type):
        return kind, value
    if isinstance(value, FunctionType | BuiltinFunctionType | MethodDescriptorType):
        return kind, value
    if isinstance(value, Tensor) or depth == 0:
        raise UnsupportedError(f"the cell holds a {kind.__name__}, which could change between two calls")
    if isinstance(value, Mapping):
        return kind, tuple((k, _constants(v, depth - 1)) for k, v in value.items())
    if isinstance(value, tuple | list | set | frozenset):
        return kind, tuple(_constants(v, depth - 1) for v in value)
    if hasattr(value, "__dict__"):
        return kind, _constants(vars(value), depth - 1)
    raise UnsupportedError(f"the cell holds a {kind.__name__}, which could change between two calls")
