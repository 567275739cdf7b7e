"""Turn a model's torch layers into ours and back, in place, touching no weight."""

from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from unvanish.nn.layers import GRU, LSTM, RNN, EngineSequence

M = TypeVar("M", bound=nn.Module)

_OURS: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: RNN, nn.LSTM: LSTM, nn.GRU: GRU}
_TORCHS = {ours: theirs for theirs, ours in _OURS.items()}


def accelerate(model: M) -> M:
    """Let every nn.RNN, nn.LSTM and nn.GRU in the model run on unvanish's engine; returns the model.

    Only the class of each layer changes: weights, optimizer state, hooks and state_dict stay what they are.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: it has no nn.RNN, nn.LSTM or nn.GRU, or one of a subclass, whose own forward would be lost; what is
            derived from unvanish.nn stays as it is.

    >>> model = nn.Sequential(nn.LSTM(3, 4))
    >>> restore(accelerate(model))
    Sequential(
      (0): LSTM(3, 4)
    )
    """
    _check(model)
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.RNNBase)}
    if not found:
        raise ValueError(f"model: expected an nn.RNN, nn.LSTM or nn.GRU in it; {type(model).__name__} has none")
    for name, module in found.items():
        if _kind(module) not in _OURS and not isinstance(module, EngineSequence):
            raise ValueError(
                f"model: {name or 'it'} is a {type(module).__name__}, a subclass whose own forward would be lost; "
                "derive it from unvanish.nn instead"
            )
    for module in found.values():
        _turn_into(module, _OURS.get(_kind(module), _kind(module)))
    return model


def restore(model: M) -> M:
    """Undo `accelerate`: our layers become torch's again; returns the model.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: a layer uses what torch's does not have: sigmoid, clip or checkpoint_every.
    """
    _check(model)
    ours = {name: m for name, m in model.named_modules() if _kind(m) in _TORCHS}
    for name, module in ours.items():
        used = [k for k in ("clip", "checkpoint_every") if getattr(module, k) is not None]
        used += ["nonlinearity='sigmoid'"] if module.mode == "RNN_SIGMOID" else []
        if used:
            raise ValueError(
                f"model: {name or 'it'} uses {', '.join(used)}, which torch's layer does not have; unset it first"
            )
    for module in ours.values():
        for k in ("clip", "checkpoint_every"):
            vars(module).pop(k, None)
        _turn_into(module, _TORCHS[_kind(module)])
    return model


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _kind(module: nn.Module) -> type[nn.Module]:
    """Its class; of a parametrised module the one that it had before, from which torch has derived one of its own."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _turn_into(module: Any, kind: type[nn.Module]) -> None:
    if kind is _kind(module):
        return
    if is_parametrized(module):
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        kind = type(type(module).__name__, (kind,), own)
    module.__class__ = kind
