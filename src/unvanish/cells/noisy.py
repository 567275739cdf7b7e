"""Any cell with noise in its recurrence: zoneout of its states, dropout of what its matrices read.

s̃_t = φ(p_t, W r_{t-1} + b, s_{t-1})            the cell's own step
s_t = s_{t-1} + m_t ⊙ (s̃_t − s_{t-1})          zoneout: where m = 0 a unit keeps its old state
r_t = d_t ⊙ s_t                                 recurrent dropout: the matrices read r in the place of s

Masks come with the input (`Cell.given`), so that a step stays an elementwise function of what it is given: every
measurement sees the noise that was drawn, and a run with the same masks is the same run.

Source: Krueger et al. 2017, equations 3 and 4 (zoneout; h̃ is made from the LSTM's c̃, not from c); Gal & Ghahramani
2016, section 4.2 (dropout).
"""

from typing import Any

import torch
from torch import Tensor

from unvanish.cells.cell import Cell, State, Weights, named


class Noisy(Cell):
    """cell: whose step it is; zoned: the states with a mask m each; dropped: whether r takes the place of what the
    matrices read. The masks' shares are called `m_{state}`, and `d_{state}` for each state that a matrix reads."""

    def __init__(self, cell: Cell, zoned: tuple[str, ...] = (), dropped: bool = False) -> None:
        self.cell, self.zoned, self.dropped = cell, zoned, dropped
        self._read = tuple(dict.fromkeys(cell.sources.values())) if dropped else ()

    # What a cell declares, here of the one inside; a class's attributes, and so not an instance's to annotate.

    @property
    def given(self) -> tuple[str, ...]:  # type: ignore[override]
        """The masks."""
        return (*(f"m_{s}" for s in self.zoned), *(f"d_{s}" for s in self._read))

    @property
    def gates(self) -> tuple[str, ...]:  # type: ignore[override]
        """The cell's, and the masks."""
        return (*self.cell.gates, *self.given)

    @property
    def states(self) -> tuple[str, ...]:  # type: ignore[override]
        """The cell's, and what the matrices read of them."""
        return (*self.cell.states, *(f"r_{s}" for s in self._read))

    @property
    def vectors(self) -> tuple[str, ...]:  # type: ignore[override]
        """The cell's."""
        return self.cell.vectors

    @property
    def recurrent(self) -> dict[str, str]:  # type: ignore[override]
        """Each gate reads the dropped copy of its state, where there is one."""
        return {gate: f"r_{s}" if s in self._read else s for gate, s in self.cell.sources.items()}

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The cell's, and the masks."""
        return (*self.cell.input_gates, *self.given)

    @property
    def same_step(self) -> tuple[str, ...]:  # type: ignore[override]
        """The cell's."""
        return self.cell.same_step

    @property
    def memory(self) -> str:  # type: ignore[override]
        """The cell's."""
        return self.cell.remembers

    @property
    def write_gate(self) -> str | None:  # type: ignore[override]
        """The cell's."""
        return self.cell.write_gate

    @property
    def titles(self) -> Any:  # type: ignore[override]
        """The cell's."""
        return self.cell.titles

    @property
    def initial(self) -> dict[str, float]:  # type: ignore[override]
        """The cell's; a dropped copy starts as its state does, before any mask."""
        return {**self.cell.initial, **{f"r_{s}": self.cell.initial.get(s, 0.0) for s in self._read}}

    @property
    def name(self) -> str:  # type: ignore[override]
        """The cell's."""
        return f"noisy {self.cell.name}"

    @property
    def carry_gate(self) -> tuple[str, int] | None:
        """The cell's: what carries where a mask lets the step pass."""
        return self.cell.carry_gate

    def effective(self, w: Weights) -> Weights:
        """As the cell's."""
        return self.cell.effective(w)

    def initialise_(self, w: Weights, generator: torch.Generator | None = None) -> None:
        """As the cell's."""
        self.cell.initialise_(w, generator)

    def step(self, p: Any, q: Any, s: Any, v: Any) -> State | Tensor:
        """The cell's step, what zoneout leaves of it, and the copies that the matrices read."""
        inner = self.cell
        own = named(inner.input_gates)(*(getattr(p, gate) for gate in inner.input_gates))
        before = named(inner.states)(*(getattr(s, state) for state in inner.states))
        out = inner.step(own, q, before, v)
        new = dict(zip(inner.states, out if isinstance(out, tuple) else (out,), strict=True))
        for state in self.zoned:
            old = getattr(s, state)
            new[state] = old + getattr(p, f"m_{state}") * (new[state] - old)
        found = (*new.values(), *(getattr(p, f"d_{state}") * new[state] for state in self._read))
        return found if len(self.states) > 1 else next(iter(found))
