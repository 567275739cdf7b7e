"""What each recurrent module of a model is fed: its steps, and the scale of its input."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish.diagnosis.interventions.material import Material

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
        """More of it: x `[…, I]`."""
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
    """Path → what torch's recurrent modules and cells are fed, in one pass over the samples that are judged."""
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
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
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
