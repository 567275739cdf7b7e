"""The recurrent parts of a model: those that can be recorded, and those that can't, with the reason."""

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn

from unvanish import torch_internals
from unvanish.nn.modules import CellModule, RecurrentModule

_PLAIN = (Tensor, nn.Parameter)
"""checked before anything slower, since this runs at every call"""
# Scripted and quantized modules have no common class to test for, only these class names.
NAMES = frozenset({"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"})


class Parts:
    """The recurrent modules of a model by name, and the lookup of a running module among them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, RecurrentModule] = {
            name: m for name, m in model.named_modules() if isinstance(m, RecurrentModule)
        }
        self._names = {_identity(m): name for name, m in self.modules.items()}

    def name_of(self, module: nn.Module) -> str | None:
        """The name of the module, or of the one that it is a replica of; None for any other, including copies."""
        return self._names.get(_identity(module))


def _identity(module: nn.Module) -> Hashable:
    # nn.DataParallel's replicas share this very dict with their original, and copies do not.
    return id(module._forward_hooks)


def hidden_parts(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, why) of recurrent parts whose calls can't be observed."""
    compiled: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            if getattr(module, "original_name", "") in NAMES:
                why = "inside a scripted module, whose calls can't be seen; watch the model before torch.jit.script"
                yield name, why
        elif type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            if type(module).__name__ in NAMES:
                yield name, "quantized: it has no gradient; watch the model before quantization"
        elif type(module).__name__ == "OptimizedModule":
            compiled.append(name)
        elif isinstance(module, RecurrentModule) and any(_inside(name, outer) for outer in compiled):
            yield name, "inside a compiled module, and never run outside its graph; watch the module it was made from"


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def unseen(tensors: list[Tensor]) -> str | None:
    """Why a call with these tensors can't be recorded; None if it can."""
    if torch_internals.tracing():
        return "ran inside torch.jit.trace, which would trace the recording too; call the model itself"
    transforms = torch_internals.transform_active()
    for v in tensors:
        if v.is_cuda and torch.cuda.is_current_stream_capturing():
            return "ran while a CUDA graph was captured, from which nothing can be read; watch steps outside of it"
        if v.is_meta and not torch_internals.fake(v):
            return "ran on meta tensors, which hold no numbers"
        if type(v) not in _PLAIN and torch_internals.fake(v):
            return "ran on fake tensors, which hold no numbers"
        if transforms and torch_internals.wrapped_by_transform(v):
            return "ran inside a transform of torch.func, which has its own gradients"
    return None


__all__ = ["CellModule", "Parts", "hidden_parts", "unseen"]
