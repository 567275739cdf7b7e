"""Run a model's torch layers on the engine, and turn them back into torch's; no weight is touched.

Only the class of a layer changes. A layer of a user's subclass gets a class derived on the fly,

    nn.LSTM            →  unvanish.nn.LSTM
    Mine(nn.LSTM)      →  Mine(unvanish.nn.LSTM, Mine)

so that `isinstance(layer, Mine)`, its methods and its name stay. Pickles and copies name Mine and derive the class
again when they are read.
"""

import types
import warnings
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import rnn as torchs
from torch.nn.utils.parametrize import is_parametrized

from unvanish.nn.layers import ADDED, GRU, LSTM, RNN, EngineSequence

M = TypeVar("M", bound=nn.Module)

_OURS: dict[type[nn.Module], type[EngineSequence]] = {torchs.RNN: RNN, torchs.LSTM: LSTM, torchs.GRU: GRU}
_TORCHS: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in _OURS.items()}
_TORCH_NAMES = {kind.__name__ for kind in _OURS}

_UNCALLED = ("permute_hidden",)
"""methods that torch's forward calls and the engine does not"""
_DERIVED = {"__reduce_ex__", "__reduce__", "__init_subclass__", "_origin"}
"""what a derived class defines for itself, or calls"""


def accelerate(model: M, strict: bool = False) -> M:
    """Run every nn.RNN, nn.LSTM and nn.GRU in the model on unvanish's engine; returns the model.

    Only the class of each layer changes: weights, optimizer state, hooks and state_dict stay as they are. A subclass
    that leaves `forward` to torch is accelerated too and remains an instance of its own class. A layer that cannot be
    accelerated stays as it is and is named in one UserWarning: it has a forward of its own, is scripted or quantized,
    or uses a name that unvanish's layers use. nn.RNNCell, nn.LSTMCell and nn.GRUCell stay torch's: the
    engine runs sequences.

    Args:
        model: any module with recurrent layers, or one of them.
        strict: raise instead of leaving a layer as it is; nothing is changed then.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: it contains no recurrent layer; with `strict`, one that cannot be accelerated.

    >>> model = nn.Sequential(nn.LSTM(3, 4))
    >>> restore(accelerate(model))
    Sequential(
      (0): LSTM(3, 4)
    )
    """
    _check(model)
    taken: list[tuple[nn.Module, type[nn.Module]]] = []
    left: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, EngineSequence):
            taken.append((module, _kind(module)))
        elif isinstance(module, nn.RNNBase) or sealed(module):
            why = obstacle(module)
            if why is None:
                taken.append((module, _accelerated(_kind(module))))
            else:
                left.append(f"{name or 'the model itself'} ({_class_name(module)}): {why}")
    if not taken and not left:
        cells = any(isinstance(m, nn.RNNCellBase) for m in model.modules())
        raise ValueError(
            f"model: expected an nn.RNN, nn.LSTM or nn.GRU in it; {type(model).__name__} has "
            + ("only cells, which take one step at a time; the engine runs sequences" if cells else "none")
        )
    if left and strict:
        raise ValueError(f"model: cannot accelerate {'; '.join(left)}. Leave out strict=True to skip these layers")
    for module, kind in taken:
        _turn_into(module, kind)
    if left:
        warnings.warn(f"accelerate left these layers as they are: {'; '.join(left)}", UserWarning, stacklevel=2)
    return model


def restore(model: M) -> M:
    """Undo `accelerate`: our layers become torch's, or the user's subclass, again; returns the model.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: a layer uses an option that torch's does not have: sigmoid, clip, checkpoint_every or h_detach.
    """
    _check(model)
    ours = [(name, m, origin) for name, m in model.named_modules() if (origin := _origin(_kind(m))) is not None]
    for name, module, _ in ours:
        used = [k for k in ADDED if getattr(module, k) is not None]
        used += ["nonlinearity='sigmoid'"] if module.mode == "RNN_SIGMOID" else []
        if used:
            raise ValueError(
                f"model: {name or 'it'} uses {', '.join(used)}, which torch's layer does not have; unset it first"
            )
    for _, module, origin in ours:
        for k in ADDED:
            vars(module).pop(k, None)
        _turn_into(module, origin)
    return model


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def sealed(module: nn.Module) -> str | None:
    """The form, "scripted" or "quantized", that hides a recurrent layer of torch from Python; None for others."""
    # A scripted subclass goes by its own name, but keeps the attributes of torch's layer.
    if isinstance(module, torch.jit.ScriptModule):
        recurrent = module.original_name in _TORCH_NAMES or hasattr(module, "_flat_weights_names")
        return "scripted" if recurrent else None
    names = {*_TORCH_NAMES, "RNNBase"}
    bases = type(module).__mro__
    return (
        "quantized"
        if any(b.__module__.startswith("torch.ao.nn.quant") and b.__name__ in names for b in bases)
        else None
    )


def _class_name(module: nn.Module) -> str:
    return module.original_name if isinstance(module, torch.jit.ScriptModule) else _kind(module).__name__


def obstacle(module: nn.Module) -> str | None:
    """Why the engine can't run this layer, in words; None if it can."""
    form = sealed(module)
    if form:
        return f"is {form}; accelerate the model before it is {form}"
    kind = _kind(module)
    theirs = next((base for base in kind.__mro__ if base in _OURS), None)
    if theirs is None:
        return "derives from nn.RNNBase, but not from nn.RNN, nn.LSTM or nn.GRU"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if kind.forward is not theirs.forward:
        return "has a forward of its own"
    for name in _UNCALLED:
        if getattr(kind, name) is not getattr(theirs, name):
            return f"has a {name} of its own, which the engine would not call"
    clash = sorted(_defined(kind, theirs) & (_DERIVED | _names(_OURS[theirs])))
    if clash:
        return f"defines {', '.join(clash)}, which unvanish's layer needs for itself"
    held = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    clash = sorted(held & _names(_OURS[theirs]))
    return f"has an attribute {', '.join(clash)}, which means something else to unvanish's layer" if clash else None


def _names(ours: type[EngineSequence]) -> set[str]:
    """Names that our class defines and that a subclass of torch's must not use for something else."""
    shared = {"forward", "extra_repr"}
    return {name for name in _defined(ours, nn.RNNBase) - shared if not name.startswith("__")}


def _defined(kind: type[Any], base: type[Any]) -> set[str]:
    """Names that `kind` and its bases define, without `base`, what it inherits from, and torch's own classes."""
    own = [c for c in kind.__mro__ if c not in base.__mro__ and not c.__module__.startswith("torch.nn.")]
    return {name for c in own for name in vars(c)}


def _kind(module: nn.Module) -> type[Any]:
    """The module's class; for a parametrised module the class that it had before torch derived one from it."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _accelerated(kind: type[Any]) -> type[nn.Module]:
    """Our class for torch's, or one derived from ours and the user's. Derived once and stored in the user's class."""
    if kind in _OURS:
        return _OURS[kind]
    for known in kind.__subclasses__():
        if vars(known).get("_origin") is kind:
            return known
    theirs = next(base for base in kind.__mro__ if base in _OURS)

    def reduce(self: Any, protocol: Any) -> Any:
        """Pickle and copy through the user's class, because the derived one can't be imported."""
        found = super(derived, self).__reduce_ex__(protocol)
        if type(self) is not derived:
            return found
        function, (_, *rest), *state = found
        return _rebuild, (kind, function, *rest), *state

    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    own |= {"_origin": kind, "__reduce_ex__": reduce}
    derived: Any = types.new_class(kind.__name__, (_OURS[theirs], kind), {}, lambda names: names.update(own))
    return derived


def _origin(kind: type[Any]) -> type[nn.Module] | None:
    """The class that `accelerate` found, or None if it did not make `kind`."""
    return _TORCHS.get(kind, vars(kind).get("_origin"))


def _rebuild(origin: type[Any], function: Any, *rest: Any) -> Any:
    return function(_accelerated(origin), *rest)


def _turn_into(module: Any, kind: type[nn.Module]) -> None:
    if kind is _kind(module):
        return
    if is_parametrized(module):
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        kind = type(type(module).__name__, (kind,), own)
    module.__class__ = kind
