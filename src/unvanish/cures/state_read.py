"""Changing the state that one of torch's cells reads: a forward pre-hook."""

from typing import Any

import torch
from torch import Tensor, nn


class StateRead:
    """Passes a cell's state through `read`, which a subclass defines; None leaves the call unchanged."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1:
            return (args[0], self.read(module, args[1]), *args[2:]), kwargs
        return args, {**kwargs, "hx": self.read(module, kwargs.get("hx"))}

    def read(self, module: nn.Module, hx: Any) -> Tensor | tuple[Tensor, ...] | None:
        """The state, one tensor or (h, c), that the cell reads instead."""
        raise NotImplementedError


class _Unread(torch.autograd.Function):
    """The identity, whose backward returns no gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *errors: Any) -> None:
        return None


def without_gradient(h: Tensor, attached: bool) -> Tensor:
    """h for a cell's matrices to read, without a gradient back through it; `whole` returns h again.

    attached: keep it connected to the graph of h, which shows that a step continues the one before. This costs the
    product that a detached h saves.
    """
    read: Any = _Unread.apply(h) if attached else h.detach()
    read.whole = h
    return read


def whole(h: Any) -> Any:
    """The state as it was before `without_gradient`."""
    return getattr(h, "whole", h)


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks on its calls, which a replacement would lose."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def set_state_read(
    cell: nn.RNNCellBase, kind: type[StateRead], hook: StateRead | None, outermost: bool = False
) -> None:
    """Replace the cell's hook of this kind by `hook`; None: remove it.

    outermost: run it before other hooks, so that the gradients they return pass through it.
    """
    for key, found in list(cell._forward_pre_hooks.items()):
        if isinstance(found, kind):
            del cell._forward_pre_hooks[key]
            cell._forward_pre_hooks_with_kwargs.pop(key, None)
    if hook is not None:
        cell.register_forward_pre_hook(hook, with_kwargs=True, prepend=outermost)
