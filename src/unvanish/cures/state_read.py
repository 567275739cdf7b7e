"""How a cure reaches the state that one of torch's cells reads: a forward pre-hook."""

from typing import Any

import torch
from torch import Tensor, nn


class StateRead:
    """Hands a cell its state through `read`, which a subclass says; None leaves the call as it is."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1:
            return (args[0], self.read(module, args[1]), *args[2:]), kwargs
        return args, {**kwargs, "hx": self.read(module, kwargs.get("hx"))}

    def read(self, module: nn.Module, hx: Any) -> Tensor | tuple[Tensor, ...] | None:
        """The state, one tensor or (h, c), as the cell is to read it."""
        raise NotImplementedError


class _Unread(torch.autograd.Function):
    """The identity, whose backward hands nothing back."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *errors: Any) -> None:
        return None


def without_gradient(h: Tensor, attached: bool) -> Tensor:
    """h for a cell's matrices to read, such that no gradient goes back through it; `whole` finds h again.

    attached: let it hang on the graph of h, by which a step is known to go on from the one before. It then costs the
    product that a detached h saves.
    """
    read: Any = _Unread.apply(h) if attached else h.detach()
    read.whole = h
    return read


def whole(h: Any) -> Any:
    """The state as it was before `without_gradient`."""
    return getattr(h, "whole", h)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is hooked to its calls, which would be lost with it."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def set_state_read(
    cell: nn.RNNCellBase, kind: type[StateRead], hook: StateRead | None, outermost: bool = False
) -> None:
    """Let `hook` take the place of the cell's hook of this kind; None: there is none any more.

    outermost: it comes before other hooks, so that what these hand back passes through it.
    """
    for key, found in list(cell._forward_pre_hooks.items()):
        if isinstance(found, kind):
            del cell._forward_pre_hooks[key]
            cell._forward_pre_hooks_with_kwargs.pop(key, None)
    if hook is not None:
        cell.register_forward_pre_hook(hook, with_kwargs=True, prepend=outermost)
