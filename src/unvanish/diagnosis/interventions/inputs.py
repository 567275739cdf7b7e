"""The inputs of a model's recurrent modules: their steps and their scale."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish.diagnosis.interventions.material import Material
from unvanish.nn.modules import RecurrentModule

LARGE, SMALL, OFF = 3.0, 0.1, 3.0
"""root mean square of an input's features, and distance of their mean from 0 in spreads, that ask for a trial of
standardised inputs"""


@dataclass
class Fed:
    """The input of one recurrent module over one pass."""

    steps: int = 0
    count: int = 0
    total: Tensor | float = 0.0
    """`[I]`"""
    squares: Tensor | float = 0.0

    def add(self, x: Tensor, steps: int) -> None:
        """Add x `[…, I]` to the statistics."""
        rows = x.detach().double().flatten(0, -2)
        self.steps += steps
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """`[I]`"""
        return torch.as_tensor(self.total / max(self.count, 1))

    @property
    def spread(self) -> Tensor:
        """`[I]` standard deviation; 1 where a feature is constant."""
        spread = (torch.as_tensor(self.squares / max(self.count, 1)) - self.mean.square()).clamp_min(0).sqrt()
        return torch.where(spread > 1e-9 * (1 + self.mean.abs()), spread, 1.0)

    @property
    def off_scale(self) -> bool:
        """Whether standardising could matter."""
        if self.count == 0 or not bool(torch.as_tensor(self.squares).isfinite().all()):
            return False
        size = float(torch.as_tensor(self.squares / self.count).mean().sqrt())
        off = float((self.mean.abs() / self.spread).max())
        return size > LARGE or 0 < size < SMALL or (off > OFF and size > 1)


def fed(material: Material, seed: int) -> dict[str, Fed]:
    """Path → the input of each of torch's recurrent modules and cells, in one pass over the judging samples."""
    twin = material.subject.twin()
    found: dict[str, Fed] = {}
    handles = []
    passes = 0

    def listen(path: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, PackedSequence):
                found.setdefault(path, Fed()).add(x.data, len(x.batch_sizes))
            elif isinstance(x, Tensor) and x.dim() >= 1:
                axis = 1 if getattr(module, "batch_first", False) and x.dim() == 3 else 0
                steps = 1 if isinstance(module, nn.RNNCellBase) else x.shape[axis]
                found.setdefault(path, Fed()).add(x if x.dim() > 1 else x[None], steps)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def count(module: nn.Module, args: Any) -> None:
        nonlocal passes
        passes += 1

    for path, module in twin.named_modules():
        if isinstance(module, RecurrentModule):
            handles.append(listen(path, module))
    handles.append(twin.register_forward_pre_hook(count))
    try:
        with material.subject.rng(seed), torch.no_grad():
            groups = len(material.judged(twin))
    finally:
        for handle in handles:
            handle.remove()
    for entry in found.values():
        entry.steps //= max(passes, groups, 1)
    return found


def reaching(material: Material, seed: int) -> float:
    """How much of the gradient reaches the first steps, along any path: recurrence, attention, pooling, or a target of
    their own.

        min over recurrent modules of   mean over the first tenth of the steps of ‖∂E/∂x_t‖ / max over t of ‖∂E/∂x_t‖

    1 where no module has a sequence. With a target at every step this does not show how far a single error reaches.
    """
    twin = material.subject.twin()
    steps: dict[str, list[tuple[Tensor, int | None]]] = {}
    handles = []

    def listen(path: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            if not args or not isinstance(args[0], Tensor):
                return None
            x = args[0].clone() if args[0].requires_grad else args[0].detach().clone().requires_grad_()
            x.retain_grad()
            cell = isinstance(module, nn.RNNCellBase)
            axis = None if cell else 1 if getattr(module, "batch_first", False) and x.dim() == 3 else 0
            steps.setdefault(path, []).append((x, axis))
            return (x, *args[1:]), kwargs

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    for path, module in twin.named_modules():
        if isinstance(module, RecurrentModule):
            handles.append(listen(path, module))
    try:
        with material.subject.rng(seed), torch.enable_grad():
            material.loss(twin, 0).backward()
    finally:
        for handle in handles:
            handle.remove()
    return min((_share(calls) for calls in steps.values()), default=1.0)


def _share(calls: list[tuple[Tensor, int | None]]) -> float:
    norms: list[float] = []
    for x, axis in calls:
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        parts = [grad] if axis is None else list(grad.unbind(axis))
        norms += [float(part.double().norm()) for part in parts]
    most = max(norms, default=0.0)
    first = norms[: max(len(norms) // 10, 1)]
    return sum(first) / len(first) / most if most > 0 and math.isfinite(most) else 1.0
