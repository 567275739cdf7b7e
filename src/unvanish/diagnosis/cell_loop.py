"""Cells that a model steps in its own loop, nn.RNNCell, LSTMCell and GRUCell, as one sequence.

The state that a cell returns is used twice: by its own next step, and by whatever reads it. To separate the two
gradients exactly, the caller gets a view of the state, and where that comes back as the next state, the cell is given
the state itself: the gradient at the view is then the one from outside.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.capture import Call, Returned, link, returned
from unvanish.nn.modules import as_states, cell_of, on_gradient
from unvanish.nn.recurrent import Recurrent


@dataclass
class Step:
    """One call."""

    x: Tensor
    """[B, I]"""
    state: tuple[Tensor, ...]
    """as computed"""
    shown: tuple[Tensor, ...]
    """the views of it that were given to the caller"""
    returned: Returned
    """the states from which a later call may continue"""
    errors: dict[int, Tensor] = field(default_factory=dict)
    """h or c → the gradient from outside, [B, H]"""


@dataclass
class Chain:
    """Calls of which each continues from the state of the one before."""

    start: tuple[Tensor, ...] | None
    """[B, H] each; None: zeros"""
    steps: list[Step] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    """steps whose incoming state was detached"""


class CellLoop:
    """Observes one cell of the copy that is run."""

    def __init__(self, path: str, cell: nn.RNNCellBase) -> None:
        self.path, self.cell = path, cell
        self.chains: list[Chain] = []
        self._now: Chain | None = None

    def before(self, call: Call) -> bool:
        """Called before a call: where the caller passes a view of a state, the call runs from the state itself."""
        given = None if call.hx is None else as_states(call.hx)
        self._now, inner = self._going_on(given)
        if inner is not given and inner is not None:
            call.hx = inner if isinstance(call.hx, tuple | list) else inner[0]
        return True

    def _going_on(self, given: tuple[Tensor, ...] | None) -> tuple[Chain, tuple[Tensor, ...] | None]:
        """The chain that this call belongs to, and the state to compute with."""
        if given is not None:
            for chain in reversed(self.chains):
                last = chain.steps[-1]
                if all(g is s for g, s in zip(given, last.shown, strict=False)):
                    return chain, last.state
                found = link(given, last.returned)
                if found is not None and found.cut and found.resets is None:
                    chain.cuts.append(len(chain.steps))
                    return chain, given
        chain = Chain(None if given is None else tuple(_rows(g.detach()) for g in given))
        self.chains.append(chain)
        return chain, given

    def after(self, call: Call) -> Any:
        """Called after a call: gives the caller views of the states."""
        assert self._now is not None
        chain, state = self._now, call.states
        shown = tuple(s.view_as(s) for s in state)
        step = Step(_rows(call.x.detach()), state, shown, returned(shown))
        for i, shown in enumerate(step.shown):
            if shown.requires_grad:
                on_gradient(shown, lambda grad, i=i: step.errors.__setitem__(i, _rows(grad.detach())))
        chain.steps.append(step)
        return step.shown if isinstance(call.output, tuple) else step.shown[0]

    @property
    def longest(self) -> Chain:
        """Of those that an error reaches, if it reaches any."""
        return max(self.chains, key=lambda chain: (any(step.errors for step in chain.steps), len(chain.steps)))

    @property
    def unseen(self) -> str:
        """Why this cell can't be measured; "" if it can."""
        if len(self.chains) > 1 and len(self.longest.steps) == 1:
            return (
                f"{self.path}: not measured: it is never given exactly the state that it returned last, so its calls "
                "can't be joined into one sequence; uv.watch records each call"
            )
        return ""

    def layer(self) -> Recurrent:
        """A layer of the same weights in float64."""
        cell = self.cell
        made = Recurrent(cell_of(cell), cell.input_size, cell.hidden_size, bias=bool(cell.bias))
        made = made.double().to(cell.weight_hh.device)
        with torch.no_grad():
            for name in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if cell.bias else ())):
                getattr(made, f"{name}_l0").copy_(getattr(cell, name))
        return made.requires_grad_(False)

    def sequence(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None, bool]:
        """x `[T, B, I]`, ∂E/∂h_t from outside `[T, B, H]`, the first state `[1, B, H]`, whether error entered at c."""
        steps = self.longest.steps
        x = torch.stack([step.x for step in steps]).double()
        zero = x.new_zeros(x.shape[1], self.cell.hidden_size)
        error = torch.stack([step.errors.get(0, zero).double() for step in steps])
        start = self.longest.start
        at_c = any(bool((step.errors[1] != 0).any()) for step in steps if 1 in step.errors)
        return x, error, None if start is None else tuple(s.double().unsqueeze(0) for s in start), at_c


def _rows(v: Tensor) -> Tensor:
    """[B, ·]"""
    return v.unsqueeze(0) if v.dim() == 1 else v
