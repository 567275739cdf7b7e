"""The calls of a model's recurrent layers, isolated in the graph: their inputs, outputs and weights.

A tap puts a copy of each tensor between a layer and the rest of the model. The kept tensor belongs to the tap alone, so
autograd's gradient with respect to it is that of this call, without other uses of an input, a state or a weight.
"""

import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish.nn.layers import GRU, LSTM, RNN, SequenceLayer
from unvanish.nn.modules import (
    CellModule,
    RecurrentModule,
    as_states,
    cell_of,
    draws_cuts,
    draws_dropout,
    evaluating,
)
from unvanish.nn.observing import TORCHS
from unvanish.nn.recurrent import Recurrent

_LAYERS = (Recurrent, RNN, LSTM, GRU, *TORCHS)
"""classes whose forward computes the cell's equations, listed by name, since a subclass may compute others"""
_not_compiled: Any = torch.compiler.disable
"""Compiled code must not look inside: it would trace the bookkeeping instead of doing it."""

_NO_GRADIENTS = "it was called without gradients (under no_grad, or in a reentrant checkpoint)"
_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass
class TappedCall:
    """One call of a recurrent layer or cell; every tensor is part of the graph of this call and no other."""

    x: Tensor | PackedSequence
    hx: tuple[Tensor, ...]
    """() where none was given"""
    lengths: Any
    weights: dict[str, Tensor]
    """torch's name → the tensor that was used"""
    dtype: torch.dtype
    """the input's, or autocast's"""
    rng: Tensor | None
    """the CPU generator's state before the call, where it drew something; see `unvanish.nn.modules.drawn_again`"""
    drawn_in: torch.dtype
    """the dtype of the input, in which dropout is drawn"""
    y: Any = None
    """the output: a Tensor or a PackedSequence"""
    final: tuple[Tensor, ...] = ()


@dataclass
class Tapped:
    """The observed calls of one module."""

    module: RecurrentModule
    own_forward: bool
    """whether it is of a subclass with a forward of its own, or had its forward replaced"""
    calls: list[TappedCall] = field(default_factory=list)
    """of the module itself"""
    inner: list[TappedCall] = field(default_factory=list)
    """of torch's forward, or ours, by a subclass's own forward or directly"""
    problems: list[str] = field(default_factory=list)
    """why a call could not be tapped"""


def tap(module: RecurrentModule) -> Tapped:
    """Tap every call of `module` from now on. The module must be one that nobody else uses: it stays tapped.

    This is the only place that depends on how a call is observed: hooks observe calls of the module; a class inserted
    between the module's own and torch's observes calls of torch's forward, made by a subclass's forward or directly.
    """
    standard = _standard(module)
    seen = Tapped(module, "forward" in vars(module) or type(module).forward is not standard.forward)
    open_calls: list[_Open] = []

    @_not_compiled
    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        opened = _Open(*_own_weights(module))
        open_calls.append(opened)
        opened.call, args, kwargs = _enter(seen, opened.weights, args, kwargs)
        return args, kwargs

    @_not_compiled
    def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        opened = open_calls.pop()
        try:
            return output if opened.call is None else _leave(seen, seen.calls, opened.call, output)
        finally:
            opened.undo()

    @_not_compiled
    def inside(self: Any, *args: Any, **kwargs: Any) -> Any:
        if open_calls and not seen.own_forward:
            return standard.forward(self, *args, **kwargs)  # the hooks see it
        opened = _Open(dict(open_calls[-1].weights), _nothing) if open_calls else _Open(*_own_weights(self))
        try:
            call, args, kwargs = _enter(seen, opened.weights, args, kwargs)
            output = standard.forward(self, *args, **kwargs)
            return output if call is None else _leave(seen, seen.inner, call, output)
        finally:
            opened.undo()

    module.register_forward_pre_hook(before, with_kwargs=True)
    # First: another hook may change what the layer returned.
    module.register_forward_hook(after, with_kwargs=True, prepend=True)
    kind = type(module)
    # Deriving a class runs __init_subclass__, which is the user's own business.
    if not any("__init_subclass__" in vars(c) for c in kind.__mro__ if c not in standard.__mro__):
        between = type(standard.__name__, (standard,), {"forward": inside})
        module.__class__ = types.new_class(kind.__name__, (between,) if kind is standard else (kind, between))
    return seen


@dataclass
class _Open:
    """A call that has not returned."""

    weights: dict[str, Tensor]
    undo: Callable[[], None]
    call: TappedCall | None = None


def _of_a_cell(module: nn.Module) -> bool:
    return isinstance(module, CellModule)


def _nothing() -> None:
    pass


def _standard(module: nn.Module) -> type[Any]:
    """The class whose forward computes the cell's equations."""
    return next((base for base in type(module).__mro__ if base in _LAYERS), nn.RNNBase)


def _own_weights(module: Any) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Name → a view of each weight, which the module uses until the returned function is called.

    A parametrized weight is computed at each call; it is found after the call, if at all.
    """
    flat: bool = isinstance(module, nn.RNNBase)
    names = module._flat_weights_names if flat else list(module._parameters) if _of_a_cell(module) else _CELL_WEIGHTS
    if not torch.is_grad_enabled():
        return {}, _nothing
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    views: dict[str, Tensor] = {}
    for name in names:
        holder: dict[str, Any]
        for holder in (module._parameters, vars(module)):
            if isinstance(holder.get(name), Tensor):
                before.append((holder, name, holder[name]))
                views[name] = holder[name] = holder[name].view_as(holder[name])
    kept: Any = (module._flat_weights, module._flat_weight_refs) if flat else None
    if flat:
        found = zip(names, module._flat_weights, strict=True)
        module._flat_weights = [views.get(name, w) for name, w in found]
        refs: Any = [None if w is None else weakref.ref(w) for w in module._flat_weights]
        module._flat_weight_refs = refs

    def undo() -> None:
        for holder, name, weight in before:
            holder[name] = weight
        if kept is not None and len(views) == len(names):
            module._flat_weights, module._flat_weight_refs = kept
        elif flat:
            module._init_flat_weights()  # some are parametrized, and recomputed whenever they are read

    return views, undo


def _enter(
    seen: Tapped, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[TappedCall | None, tuple[Any, ...], dict[str, Any]]:
    """The call, None where it can't be tapped, and the arguments to go on with."""
    module = seen.module
    if not torch.is_grad_enabled():
        seen.problems.append(_NO_GRADIENTS)
        return None, args, kwargs
    given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
    known = {"input", "hx", *(["lengths"] if isinstance(module, SequenceLayer) else [])}
    foreign = sorted(k for k, v in given.items() if k not in known and v is not None)
    x: Any = given.get("input")
    hx: Any = given.get("hx")
    states = as_states(hx)
    if foreign or len(args) > 2 or not _floating(x) or not all(isinstance(s, Tensor) for s in states):
        named = f" ({', '.join(foreign)})" if foreign else ""
        seen.problems.append(f"it was called with other arguments than torch's layers take{named}")
        return None, args, kwargs
    data = x.data if isinstance(x, PackedSequence) else x
    rng = None
    if draws_dropout(module) and data.device.type != "cpu":
        seen.problems.append(
            f"dropout between its layers is drawn inside the {data.device.type} kernel, where it cannot be drawn "
            "again; set its dropout to 0 for the audit"
        )
        return None, args, kwargs
    if draws_dropout(module) or draws_cuts(module):
        rng = torch.get_rng_state()
    kept_x, handed_x = _tapped(x)
    pairs = [_tapped(s) for s in states]
    dtype = data.dtype
    if torch.is_autocast_enabled(data.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(data.device.type)
    call = TappedCall(kept_x, tuple(p[0] for p in pairs), given.get("lengths"), dict(weights), dtype, rng, data.dtype)
    handed: Any = tuple(p[1] for p in pairs)
    if isinstance(hx, Tensor):
        handed = handed[0]
    elif hx is None:
        handed = None
    args = ((handed_x, handed)[: len(args)]) if args else args
    kwargs = kwargs | {k: v for k, v in (("input", handed_x), ("hx", handed)) if k in kwargs}
    return call, args, kwargs


def _leave(seen: Tapped, calls: list[TappedCall], call: TappedCall, output: Any) -> Any:
    """The output to continue with; the call is kept if its form is known."""
    pair = isinstance(output, tuple) and len(output) == 2 and not isinstance(output, PackedSequence)
    cell = isinstance(seen.module, nn.RNNCellBase)
    y: Any
    y, final = output if pair and not cell else (as_states(output)[0] if cell else output, None)
    states = as_states(output) if cell else as_states(final)
    tensors = isinstance(y, Tensor | PackedSequence) and all(isinstance(s, Tensor) for s in states)
    if not tensors or (cell and len(states) != len(cell_of(seen.module).states)):
        seen.problems.append("it returns something else than (output, state)")
        return output
    if not (y.data if isinstance(y, PackedSequence) else y).requires_grad:
        seen.problems.append(_NO_GRADIENTS)
        return output
    if isinstance(seen.module, nn.RNNBase):
        flat = zip(seen.module._flat_weights_names, seen.module._flat_weights, strict=True)
        call.weights = {name: w for name, w in flat if w is not None} | call.weights
    elif not _of_a_cell(seen.module):
        # A parametrized one: only its value can be had, not the tensor that this call computed.
        with torch.no_grad(), evaluating(seen.module):
            missing = [n for n in _CELL_WEIGHTS if n not in call.weights and getattr(seen.module, n) is not None]
            call.weights |= {name: getattr(seen.module, name).detach() for name in missing}
    pairs = [_tapped(s) for s in states]
    call.final = tuple(p[0] for p in pairs)
    calls.append(call)
    handed: Any = tuple(p[1] for p in pairs)
    if cell:
        call.y = call.final[0]
        return handed if isinstance(output, tuple) else handed[0]
    call.y, handed_y = _tapped(y)
    if not pair:
        return handed_y
    return handed_y, (handed if isinstance(final, tuple | list) else handed[0])


def _tapped(v: Any) -> tuple[Any, Any]:
    """(the tensor to keep, the one to pass on): a clone, so that changes in place don't affect the kept one."""
    if isinstance(v, PackedSequence):
        kept, handed = _tapped(v.data)
        return v._replace(data=kept), v._replace(data=handed)
    kept = v.view_as(v) if v.requires_grad else v.detach().clone().requires_grad_()
    return kept, kept.clone()


def _floating(x: Any) -> bool:
    data = x.data if isinstance(x, PackedSequence) else x
    return isinstance(data, Tensor) and data.is_floating_point()
