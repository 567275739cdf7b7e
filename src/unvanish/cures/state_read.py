"""How a cure reaches the state that one of torch's cells reads: a forward pre-hook."""

from typing import Any

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


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is hooked to its calls, which would be lost with it."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def set_state_read(cell: nn.RNNCellBase, kind: type[StateRead], hook: StateRead | None) -> None:
    """Let `hook` take the place of the cell's hook of this kind; None: there is none any more."""
    for key, found in list(cell._forward_pre_hooks.items()):
        if isinstance(found, kind):
            del cell._forward_pre_hooks[key]
            cell._forward_pre_hooks_with_kwargs.pop(key, None)
    if hook is not None:
        cell.register_forward_pre_hook(hook, with_kwargs=True)
