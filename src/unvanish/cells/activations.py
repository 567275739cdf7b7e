"""The gates' values of a cell that gives only its step: what its activation functions put out.

A gate's activation is the first nonlinear function in `step` whose argument depends on that gate's pre-activation and
on no other gate's. Which call that is, is found once per cell; the values are then read off one evaluation of the step.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unvanish.cells.calculus import Point
from unvanish.cells.cell import Cell, named

STEEPEST = {"sigmoid": 0.25, "tanh": 1.0, "relu": 1.0, "hardsigmoid": 1 / 6, "hardtanh": 1.0, "softsign": 1.0}
"""max |φ'| of each activation function that can saturate"""


class Activations(NamedTuple):
    """Of every gate, `[..., G, H]`."""

    values: Tensor
    sensitivity: Tensor
    """|φ'(a)| / max |φ'|; 1 where a gate has no function that saturates"""


class _Calls(TorchFunctionMode):
    """Notes the argument and result of every activation function."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if name in STEEPEST:
            self.calls.append((name, args[0] if args else kwargs["input"], out))
        return out


_PLACES: WeakKeyDictionary[Cell, dict[str, int]] = WeakKeyDictionary()


def activations(cell: Cell, at: Point) -> Activations:
    """The values and sensitivities of a cell's gates at these points."""
    places = _places(cell)
    mode = _Calls()
    arguments = cell.arguments(at.p.detach(), None if at.q is None else at.q.detach(), at.before, at.weights.v)
    with torch.no_grad(), mode:
        cell.step(*arguments)
    values, sensitive = [], []
    p, q, *_ = arguments
    for gate in cell.gates:
        if gate in places:
            name, argument, out = mode.calls[places[gate]]
            with torch.enable_grad():
                a = argument.detach().requires_grad_()
                again = getattr(torch.nn.functional, name)(a)
                slope = torch.autograd.grad(again.sum(), a)[0]
            values.append(out)
            sensitive.append(slope.abs() / STEEPEST[name])
        else:
            share = sum(getattr(part, gate) for part in (p, q) if gate in part._fields)
            values.append(share)
            sensitive.append(torch.ones_like(share))  # type: ignore[arg-type]
    wide = torch.broadcast_shapes(*(v.shape for v in values))
    return Activations(*(torch.stack([v.expand(wide) for v in kind], dim=-2) for kind in (values, sensitive)))


def _places(cell: Cell) -> dict[str, int]:
    """Gate → the number of the call of its activation among all that the step makes."""
    if cell in _PLACES:
        return _PLACES[cell]
    generator = torch.Generator().manual_seed(0)

    def draw(names: tuple[str, ...]) -> Any:
        drawn = (torch.randn(4, generator=generator, dtype=torch.float64, device="cpu") for _ in names)
        return named(names)(*(v.requires_grad_() for v in drawn))

    found: dict[str, int] = {}
    with torch.enable_grad():
        p, q = draw(cell.input_gates), draw(tuple(cell.sources))
        mode = _Calls()
        with mode:
            cell.step(p, q, draw(cell.states), draw(cell.vectors))
        leaves = [(name, leaf) for part in (p, q) for name, leaf in zip(part._fields, part, strict=True)]
        for number, (_, argument, _) in enumerate(mode.calls):
            if not argument.requires_grad:
                continue
            reached = torch.autograd.grad(
                argument.sum(), [leaf for _, leaf in leaves], retain_graph=True, allow_unused=True
            )
            gates = {name for (name, _), d in zip(leaves, reached, strict=True) if d is not None}
            direct = gates - set(found)
            # n = tanh(p_n + r ⊙ q_n) depends on r too, whose own activation has come before.
            if len(direct) == 1:
                found[direct.pop()] = number
    _PLACES[cell] = found
    return found
