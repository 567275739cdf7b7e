"""Tensors inside the containers that models are given and return: tuples, dicts, dataclasses, packed sequences."""

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish.flow.model_copy import in_one_block


def mapped(value: Any, change: Callable[[Tensor], Any], packed: Callable[[PackedSequence], Any] | None = None) -> Any:
    """The same structure with `change` applied to every tensor in it; to a packed sequence `packed`, or `change` to its
    data. Objects of other types are returned as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return packed(value) if packed is not None else value._replace(data=change(value.data))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, change, packed) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(v, change, packed) for v in value)
    if isinstance(value, Mapping):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = mapped(item, change, packed)  # type: ignore[index]
        return made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, mapped(getattr(value, field.name), change, packed))
        return made
    return value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in the structure, in order; of a packed sequence its data."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, note)
    return found


def floating(value: Any) -> list[Tensor]:
    """The floating-point ones of `tensors`."""
    return [t for t in tensors(value) if t.is_floating_point()]


def detached_copy(model: nn.Module) -> nn.Module:
    """A deep copy in which tensors that belong to a graph are replaced by detached ones, wherever the model holds them.

    A Lightning trainer is left out.

    Raises:
        TypeError: something in the model can't be copied.
    """
    memo: dict[int, Any] = {}
    kept: list[Any] = []
    for item in _reachable(model):
        if isinstance(item, Tensor):
            if not item.is_leaf:
                memo[id(item)] = item.detach().clone()
                kept.append(item)
        elif (trainer := getattr(item, "__dict__", {}).get("_trainer")) is not None:
            memo[id(trainer)] = None
    try:
        return in_one_block(copy.deepcopy(model, memo))
    except (TypeError, RuntimeError, ValueError, NotImplementedError) as error:
        raise TypeError(
            f"model: expected one that copy.deepcopy can copy, since it is tried on copies only; it raised "
            f"{type(error).__name__}: {error}"
        ) from error


def graph_tensors(model: nn.Module) -> list[Tensor]:
    """Tensors that the model holds and that belong to an earlier graph."""
    return [t for t in _reachable(model) if isinstance(t, Tensor) and not t.is_leaf]


def _reachable(root: Any) -> list[Any]:
    """The objects that a deep copy would copy, as far as they are plain containers or have attributes."""
    seen: set[int] = set()
    found: list[Any] = []
    waiting: list[Any] = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, str | bytes | int | float | complex | type | type(None)):
            continue
        seen.add(id(item))
        found.append(item)
        if isinstance(item, Tensor | torch.dtype | torch.device):
            continue
        if isinstance(item, Mapping):
            waiting += list(item.values())
        elif isinstance(item, list | tuple | set | frozenset | deque):
            waiting += list(item)
        if not callable(item) or isinstance(item, nn.Module):
            waiting += [v for k, v in getattr(item, "__dict__", {}).items() if k != "_trainer"]
            for kind in type(item).__mro__:
                slots = kind.__dict__.get("__slots__", ())
                names = (slots,) if isinstance(slots, str) else tuple(slots)
                waiting += [getattr(item, name) for name in names if hasattr(item, name) and name != "__weakref__"]
    return found
