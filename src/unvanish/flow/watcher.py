"""Watch the gradient travel back through the recurrent layers of any model, without touching the model's own numbers.

Forward and backward run as always. A layer of `unvanish.nn` measures as it runs. Of any other, a watch keeps what went
in and, through hooks on what came out, ∂E/∂h_t as it arrives from outside; from these it replays the layer's own
backpropagation through time. So outputs and gradients stay bitwise what they were, and the record can be held against
autograd's ∂E/∂W (`residual`).
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import RLock, get_ident
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules import module as hooks
from torch.utils.hooks import RemovableHandle

from unvanish import torch_internals
from unvanish.capture import Call, Capture, Returned, hidden_parts, link, returned
from unvanish.capture.named_states import Getter, NamedStates
from unvanish.capture.parts import unseen
from unvanish.flow.module_sequence import ModuleSequence
from unvanish.flow.nonfinite import NonFiniteOrigin, first_origin
from unvanish.flow.record import Flow, LayerFlow, NoBackwardError, NonFiniteError
from unvanish.flow.recorded_sequence import RecordedCall, RecordedSequence
from unvanish.flow.sequences import CellSequence, MarkSequence, Measured, Sequence, heard_weights, rounding
from unvanish.flow.stream import Stream
from unvanish.nn.layers import EngineSequence
from unvanish.nn.modules import RecurrentModule, as_states, full_precision

S = TypeVar("S", bound=Sequence)


@dataclass
class _Backward:
    """One run of the autograd engine."""

    errors: dict[Sequence, dict[Hashable, Any]] = field(default_factory=dict)
    gradients: dict[Hashable, Tensor] = field(default_factory=dict)
    """weight key → autograd's ∂E/∂W of this run"""
    sums: list[tuple[str, Tensor]] = field(default_factory=list)
    """(parameter, the sum of its gradient): not finite where the gradient is not"""
    thread: int = 0
    """that it runs in"""
    differentiable: bool = False
    """whether its gradients are kept as part of a graph (create_graph)"""


class MarkListener(NamedTuple):
    """Whom `uv.mark` shows a state to, where nothing else is recorded."""

    mark: Callable[[str, Any], None]


@contextmanager
def marks_go_to(show: Callable[[str, Any], None]) -> Iterator[None]:
    """Within, `uv.mark(h, name)` calls show(name, h), and no watch around it records the state."""
    listener = MarkListener(show)
    Watch._active.append(listener)
    try:
        yield
    finally:
        Watch._active.remove(listener)


class Watch(Flow):
    """A flow that fills as errors come back; see `watch`."""

    _active: ClassVar[list[Watch | MarkListener]] = []

    def __init__(
        self,
        model: nn.Module,
        *,
        states: Mapping[str, Getter] | None = None,
        partial: bool = False,
        keep: int = 8,
        every: int = 1,
        stream: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        for name, value, what in (("keep", keep, "pass"), ("every", every, "step")):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number, at least 1 {what}, got {value!r}")
        self._every = every
        self._model = model
        self._partial = partial
        self._keep = keep
        self._capture = Capture(model, self._after, self._before)
        self._lock = RLock()
        self._named = NamedStates(model, states or {}, self.mark, self._capture.problems)
        self._stream = None if stream is None else Stream(Path(stream))
        self._names = [n for path, module in self._capture.parts.modules.items() for n in _record_names(path, module)]
        self._handles: list[RemovableHandle] = []
        self._weights: dict[Hashable, tuple[Tensor, RemovableHandle]] = {}
        self._heard: dict[int, Tensor] = {}
        """leaf weights that need no further hook, by id"""
        self._sequences: WeakSet[Sequence] = WeakSet()
        self._current: WeakValueDictionary[str, Sequence] = WeakValueDictionary()
        self._last: dict[str, Returned] = {}
        self._epoch = self._cut = self._count = 0
        self._runs: dict[int, _Backward] = {}
        self._passes: OrderedDict[tuple[int, int], Measured] = OrderedDict()
        self._seen: dict[str, int] = {}
        """name → calls, or marks, so far"""
        self._reached: set[str] = set()
        """parameters that a gradient came back to"""
        self._bad_parameter: str | None = None
        self.dropped = 0
        """passes measured and forgotten, since more than `keep` of a layer came"""

    @property
    def on(self) -> bool:
        """Whether the present training step is one of those recorded."""
        return self._every == 1 or (self._epoch - 1) % self._every == 0

    @property
    def skipped(self) -> dict[str, str]:
        """Name → why, of recurrent parts that were not recorded, or not at every call."""
        found = {
            name: "a gradient came back to its weights, but no call of it was seen: it ran inside what torch.compile "
            "made, or something else used its weights; watch the model uncompiled"
            for name, module in self._capture.parts.modules.items()
            if any(f"{name}.{key}".removeprefix(".") in self._reached for key, _ in module.named_parameters())
        }
        found |= dict(hidden_parts(self._model)) | self._named.called
        found = {name: why for name, why in found.items() if {name, name or "cell"}.isdisjoint(self._seen)}
        recorded = {*self._names, *self._capture.parts.modules, *self._passed(), *self._capture.problems}
        found |= {name: self._unreached(name) for name in self._seen if self._cut and name not in recorded}
        return found | self._named.unrecorded | self._capture.problems

    def __enter__(self) -> Watch:
        if self in Watch._active:
            raise RuntimeError("this watch is already active; make a second one with uv.watch(model)")
        # torch's hooks for all modules: one on the model itself would be pickled and copied with it.
        self._handles.append(hooks.register_module_forward_pre_hook(self._begin))
        self._named.open()
        self._capture.__enter__()
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                handle = parameter.register_hook(partial(self._look_at, name))
                self._weights["", name] = (parameter, handle)
        Watch._active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Watch._active.remove(self)
        self._capture.__exit__()
        self._named.close()
        for handle in self._handles:
            handle.remove()
        for sequence in list(self._sequences):
            sequence.close()
        for weight, handle in self._weights.values():
            handle.remove()
            if not weight._backward_hooks:
                weight._backward_hooks = None
        for held in (self._handles, self._weights, self._current, self._last, self._runs, self._heard):
            held.clear()
        if kind is None and not self._capture.parts.modules and not self._seen and not self.skipped:
            raise ValueError(
                f"model: {type(self._model).__name__} has no nn.RNN, nn.LSTM, nn.GRU or cell, and nothing was marked; "
                "mark the states of a custom cell with uv.mark(h, 'name'), or name the module with states={'name': ...}"
            )

    @property
    def layers(self) -> dict[str, LayerFlow]:
        """Name → the record of the latest pass that an error came back to.

        Raises:
            NoBackwardError: no error has come back to any layer.
            NonFiniteError: a NaN or infinity turned up; the message says where it was born.
        """
        latest = {measured.flow.name: measured for measured in self._passes.values()}
        if not latest:
            raise NoBackwardError(self._silence(None))
        for measured in latest.values():
            if measured.nonfinite is not None:
                raise NonFiniteError(measured.nonfinite.sentence)
        order = [*self._names, *self._seen]
        return {name: latest[name].flow for name in sorted(latest, key=order.index)}

    def __getitem__(self, name: str) -> LayerFlow:
        if name in self._passed():
            return self.passes(name)[-1]
        if name in self._names or name in self._seen or name in self.skipped:
            raise NoBackwardError(self._silence(name))
        known = dict.fromkeys([*self._names, *self._passed()])
        raise KeyError(f"no layer {name!r} here; there are {', '.join(known) or 'none'}")

    @property
    def kind(self) -> str:
        return "Flow"

    def passes(self, name: str) -> list[LayerFlow]:
        """The records of the last `keep` passes of one layer, oldest first.

        Raises:
            KeyError, NoBackwardError, NonFiniteError: as for `flow[name]`.
        """
        found = [measured for measured in self._passes.values() if measured.flow.name == name]
        if not found:
            self[name]
        for measured in found:
            if measured.nonfinite is not None:
                raise NonFiniteError(measured.nonfinite.sentence)
        return [measured.flow for measured in found]

    def __repr__(self) -> str:
        nothing = f"Watch of {type(self._model).__name__}: no gradient has come back yet"
        text = super().__repr__() if self._passes else nothing
        return "\n".join([text, *(f"not recorded: {name or 'the model'}: {why}" for name, why in self.skipped.items())])

    def _passed(self) -> dict[str, None]:
        return dict.fromkeys(measured.flow.name for measured in self._passes.values())

    def _silence(self, name: str | None) -> str:
        what = "any layer" if name is None else repr(name)
        for part, why in self.skipped.items():
            if not part or name is None or name == part or name.startswith(f"{part}."):
                return f"{what}: not recorded: {part or 'the model'}: {why}"
        if not self._seen:
            return (
                f"{what}: no forward pass with gradients ran inside the watch; "
                "call the model and loss.backward() in the with block"
            )
        if not self._passes and not self._cut:
            return f"{what}: no backward pass ran inside the watch; call loss.backward() in the with block"
        return f"{what}: a backward pass ran, but no error came back to it: the loss does not depend on it"

    def _unreached(self, name: str) -> str:
        return (
            f"marked {self._seen[name]} times, and no gradient reached it: does it go through a step that has no "
            "derivative, or was it detached?"
        )

    def _begin(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if module is self._model and torch_internals.backward_number() < 0 and torch.is_grad_enabled():
            self._epoch += 1
            # What an aborted backward pass of this thread left behind.
            for task in [task for task, run in self._runs.items() if run.thread == get_ident()]:
                del self._runs[task]

    def _awake(self, name: str) -> bool:
        """Whether a call is to be recorded."""
        if self._every > 1 and not self._epoch:
            self._capture.problems[name] = (
                f"every={self._every} counts calls of the watched {type(self._model).__name__}, but only its parts are "
                "called; watch the module that is called, or leave every=1"
            )
            return False
        return self.on

    def _before(self, call: Call) -> bool:
        if not self._awake(call.name):
            return False
        if isinstance(call.module, EngineSequence) and not self._partial:
            call.recorders = RecordedCall(call.module)
        return True

    def _after(self, call: Call) -> None:
        with self._lock:
            self._add(call)

    def _add(self, call: Call) -> None:
        """To the sequence that it goes on with, or to one of its own."""
        name = call.name
        if isinstance(call.module, nn.RNNCellBase):
            name = name or "cell"
            sequence = self._going_on(name, call)
            if not isinstance(sequence, CellSequence):
                sequence = self._new(name, CellSequence(name, call.module, self._catch, self._partial))
            self._hear_weights(call.module)
            sequence.add(call)
            return
        sequence = self._going_on(name, call)
        if call.module.bidirectional or self._partial:
            sequence = None
        self._hear_weights(call.module)
        measured = call.recorders
        if isinstance(measured, RecordedCall) and measured.complete(call.x):
            if not isinstance(sequence, RecordedSequence):
                sequence = self._new(name, RecordedSequence(name, self._catch))
            sequence.add(measured)
            return
        if not isinstance(sequence, ModuleSequence):
            sequence = self._new(name, ModuleSequence(name, call.module, self._catch, self._partial))
        sequence.add(call)

    def _going_on(self, name: str, call: Call) -> Sequence | None:
        """The sequence that this call goes on with."""
        last = self._last.get(name)
        found = link(as_states(call.hx), last)
        self._last[name] = now = returned(call.states)
        sequence = self._current.get(name)
        self._seen[name] = self._seen.get(name, 0) + 1
        if found is None or sequence is None or sequence.era != (self._cut, torch_internals.backward_number()):
            return None
        if last is None or last.states[0].shape != now.states[0].shape:
            # Samples were dropped or added on the way, and a record has the same ones at every step.
            return None
        if found.cut and sequence.ragged:
            # The cut would come after a different step of each sample, and `detached` names one for all.
            return None
        sequence.goes_on(found)
        return sequence

    def _new(self, name: str, sequence: S) -> S:
        self._count += 1
        sequence.number, sequence.era = self._count, (self._cut, torch_internals.backward_number())
        self._current[name] = sequence
        self._sequences.add(sequence)
        return sequence

    def mark(self, name: str, h: Any) -> None:
        """A state of the next step; see `unvanish.mark`."""
        problems = self._capture.problems
        if name in self._capture.parts.modules or name in self._names:
            problems[name] = "marked under the name of a layer of the model; mark the state under another"
            return
        if not isinstance(h, Tensor):
            problems[name] = (
                f"its state is a {type(h).__name__}, not a tensor; name the place of a tensor in its output"
            )
            return
        why = unseen([h])
        if why is not None:
            problems[name] = why
            return
        if not self._awake(name):
            return
        self._seen[name] = self._seen.get(name, 0) + 1
        if not h.requires_grad:
            problems[name] = "a state of it does not require gradients, so that no gradient can come back to it"
            return
        sequence = self._current.get(name)
        era, last = (self._cut, torch_internals.backward_number(), self._epoch), self._last.get(name)
        self._last[name] = returned((h,))
        # A model that is itself called step after step begins no new pass with each.
        same = sequence is not None and (sequence.era == era or (sequence.era[:2] == era[:2] and link((h,), last)))
        if not isinstance(sequence, MarkSequence) or not same:
            sequence = self._new(name, MarkSequence(name, self._catch))
        sequence.era = era
        sequence.add(h)

    def _hear_weights(self, module: RecurrentModule) -> None:
        held = module._flat_weights if isinstance(module, nn.RNNBase) else module._parameters.values()
        if all(w is None or id(w) in self._heard for w in held):
            return
        for key, weight in heard_weights(module).values():
            if weight.requires_grad and not (weight.is_leaf and key in self._weights):
                handle = weight.register_hook(partial(self._hear, key))
                if weight.is_leaf:
                    self._weights[key] = (weight, handle)
        # By number, and held, so that no other weight can get the number.
        self._heard |= {id(w): w for w in held if w is not None and w.is_leaf and w.requires_grad}

    def _hear(self, key: Hashable, grad: Tensor) -> None:
        gradients = self._run().gradients
        gradients[key] = gradients[key] + grad if key in gradients else grad

    def _look_at(self, name: str, grad: Tensor) -> None:
        if unseen([grad]) is not None:
            return
        dtype = torch.promote_types(grad.dtype, torch.float32)
        self._run().sums.append((name, grad.detach().sum(dtype=dtype)))

    def _run(self) -> _Backward:
        task = torch_internals.backward_number()
        run = self._runs.get(task)
        if run is None:
            run = self._runs[task] = _Backward(thread=get_ident(), differentiable=torch.is_grad_enabled())
            Variable._execution_engine.queue_callback(lambda: self._finish(task))
        return run

    def _catch(self, sequence: Sequence, key: Hashable, error: Any) -> None:
        errors = self._run().errors.setdefault(sequence, {})
        errors[key] = errors[key] + error if key in errors else error

    @torch.no_grad()
    def _finish(self, task: int) -> None:
        """A backward pass has ended: measure every sequence it reached, before an optimizer moves the weights."""
        run = self._runs.pop(task, None)
        self._cut += 1
        if run is not None:
            with self._lock:
                self._capture.guarded("", lambda: self._measure(run))

    def _measure(self, run: _Backward) -> None:
        bad = [name for name, total in run.sums if not math.isfinite(float(total))]
        self._reached.update(name for name, _ in run.sums)
        ours: dict[Hashable, Tensor] = {}
        measured: list[tuple[Sequence, list[Measured]]] = []
        for sequence, errors in run.errors.items():
            if sequence.differentiated:
                # Part of this pass runs through the gradients of an earlier one, which are no errors of the sequence:
                # the record stays that of the gradient that was differentiated.
                continue
            sequence.differentiated = run.differentiable
            with full_precision():
                found = self._capture.guarded(sequence.name, lambda s=sequence, e=errors: s.arrive(e)) or []
            for part in found:
                for key, gradient in part.gradients.items():
                    ours[key] = ours[key] + gradient if key in ours else gradient
            measured.append((sequence, found))
        self._bad_parameter = bad[0] if bad else None
        if not measured:
            return
        # Errors arrive at the last call first; records stand in the order of the calls.
        measured = sorted(measured, key=lambda m: m[0].number)
        first = first_origin(part.nonfinite for _, found in measured for part in found)
        for sequence, found in measured:
            for index, part in enumerate(found):
                record = replace(part.flow, step=self._epoch)
                if not isinstance(sequence, RecordedSequence):
                    record = _judged(record, {key: ours[key] for key in part.gradients}, run.gradients, self._weights)
                origin = part.nonfinite
                if origin is None and bad:
                    says = f"its gradient is not finite, although every gradient at {record.name} is"
                    origin = NonFiniteOrigin(False, bad[0], says)
                elif origin is not None and not origin.forward:
                    # What another layer made on the way forward comes back to this one.
                    origin = first if first is not None and first.forward else origin
                self._store(sequence, index, replace(part, gradients={}, flow=record, nonfinite=origin))
        if self._stream is not None:
            latest = {m.flow.name: m.flow for m in self._passes.values() if m.flow.step == self._epoch}
            self._stream.write(Flow(latest), self._epoch)

    def _store(self, sequence: Sequence, index: int, measured: Measured) -> None:
        token = (sequence.number, index)
        self._passes[token] = measured
        same = [key for key, other in self._passes.items() if other.flow.name == measured.flow.name]
        for key in same[: -self._keep]:
            del self._passes[key]
            self.dropped += 1


def _record_names(path: str, module: RecurrentModule) -> list[str]:
    if isinstance(module, nn.RNNCellBase):
        return [path or "cell"]
    ends = ("", ".reverse") if module.bidirectional else ("",)
    return [f"{path}.l{k}{end}".removeprefix(".") for k in range(module.num_layers) for end in ends]


def _judged(
    record: LayerFlow,
    ours: dict[Hashable, Tensor],
    autograd: dict[Hashable, Tensor],
    weights: Mapping[Hashable, tuple[Tensor, Any]],
) -> LayerFlow:
    """The record with its residual, and with what a large one says."""
    pairs = {key: (mine, autograd[key]) for key, mine in ours.items() if key in autograd}
    if not pairs:
        return record
    apart, size = (
        math.hypot(*(float(torch.linalg.vector_norm(v, dtype=torch.float64)) for v in vs))
        for vs in ([mine - theirs for mine, theirs in pairs.values()], [theirs for _, theirs in pairs.values()])
    )
    residual = apart / size if size > 0 else (0.0 if apart == 0 else math.inf)
    allowed = rounding(next(iter(pairs.values()))[1])
    record = replace(record, residual=residual)
    if residual <= 10 * allowed or record.problem is not None or not math.isfinite(residual):
        return record
    if all(_is_a_penalty(theirs - mine, weights.get(key)) for key, (mine, theirs) in pairs.items()):
        return record
    return replace(
        record,
        problem=f"its own ∂E/∂W differs from autograd's by {residual:.1e} (rounding explains {10 * allowed:.0e}): "
        "a weight takes part elsewhere in the loss too, part of the backward pass is hidden, or the backend's gradient "
        "is wrong, which uv.audit tells",
    )


def _is_a_penalty(extra: Tensor, weight: tuple[Tensor, Any] | None) -> bool:
    """Whether what autograd adds is the gradient of a squared or absolute norm of the weight."""
    if weight is None:
        return False
    w, cosine = weight[0].detach(), nn.functional.cosine_similarity
    return any(float(cosine(extra.flatten(), v.flatten(), dim=0)) > 0.999 for v in (w, w.sign()))
