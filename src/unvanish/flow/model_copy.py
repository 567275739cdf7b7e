"""A copy of a model, for operations that must not change the user's model."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unvanish import torch_internals


def detached_copy(model: nn.Module) -> nn.Module:
    """A deep copy. Tensors inside a graph are copied detached and scripted modules shared: Python copies neither."""
    memo: dict[int, Any] = {}
    met: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in met:
            return
        met.add(id(value))
        if isinstance(value, torch.jit.ScriptModule):
            memo[id(value)] = value
        elif isinstance(value, Tensor):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple | set | frozenset):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            visit(vars(value))

    visit(model)
    return in_one_block(copy.deepcopy(model, memo))


def in_one_block(copied: nn.Module) -> nn.Module:
    """This copy, with each recurrent layer's weights in one block again: others are copied into one at every call of
    cuDNN, and torch warns of them."""
    for module in copied.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    return copied


@contextmanager
def forked(model: nn.Module) -> Iterator[None]:
    """Restore the random generators after the block, and the buffers of scripted modules, which are shared."""
    scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    before = [(b, b.clone()) for m in scripted for b in m.buffers(recurse=False)]
    devices = {p.device for p in (*model.parameters(), *model.buffers()) if p.device.type != "cpu"}
    with ExitStack() as stack:
        if any(d.type == "mps" for d in devices):
            stack.callback(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
        for kind in {d.type for d in devices} - {"mps"}:
            here = [d for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=here, device_type=kind))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(_put_back, before)
        yield


@torch.no_grad()
def _put_back(before: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in before:
        buffer.copy_(value)


def without_compile(model: nn.Module) -> nn.Module:
    """The model with every module that torch.compile made replaced by the one it was made from, in place."""
    inner = torch_internals.compiled(model)
    if inner is not None:
        return without_compile(inner)
    for name, child in model._modules.items():
        if child is not None:
            model._modules[name] = without_compile(child)
    return model
