"""Standardised inputs for one recurrent module, without touching the data: a hook in front of it.

    x̂ = (x − mean) / spread

Folding this into the first weights would compute the same, but not train the same: Adam moves every weight by its
learning rate, whatever the weight's size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class Standardiser:
    """A forward pre-hook that standardises the module's input."""

    def __init__(self, mean: Tensor, spread: Tensor) -> None:
        self.mean, self.spread = mean, spread

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (self._changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self._changed(kwargs["input"])}

    def _changed(self, x: Tensor | PackedSequence) -> Any:
        if isinstance(x, PackedSequence):
            return x._replace(data=self._changed(x.data))
        return (x - self.mean.to(x)) / self.spread.to(x)


def standardise_(module: nn.Module, mean: Sequence[float], spread: Sequence[float]) -> nn.Module:
    """Standardise the input of a recurrent module or cell before every forward pass.

    Args:
        module: whose first argument is x `[…, I]`, or a packed sequence of such.
        mean: `[I]`, or one number for all features.
        spread: `[I]` standard deviations, or one number for all features.

    Returns:
        module, with a forward pre-hook that moves along in `deepcopy`, but not in its state_dict.

    Raises:
        ValueError: a spread is not positive, or the lengths differ.
    """
    if len(mean) != len(spread):
        raise ValueError(f"mean, spread: expected as many of each, got {len(mean)} and {len(spread)}")
    if not all(s > 0 for s in spread):
        raise ValueError(f"spread: expected standard deviations above 0, got {list(spread)}")
    hook = Standardiser(torch.tensor(list(mean)), torch.tensor(list(spread)))
    module.register_forward_pre_hook(hook, with_kwargs=True)
    return module
