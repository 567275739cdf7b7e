"""Watch the gradient travel back through the recurrent layers of any model, without touching the model's own numbers.

Forward and backward run as always. A layer of `unvanish.nn` measures while it runs. For any other layer, a watch keeps
its input and, through hooks on its output, ∂E/∂h_t as it arrives from outside; from these it replays the layer's
backpropagation through time. So outputs and gradients stay bitwise the same, and the record can be compared with
autograd's ∂E/∂W (`residual`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils.hooks import RemovableHandle

from unvanish import torch_internals
from unvanish.capture import Call, Capture, Returned, hidden_parts, link, returned
from unvanish.capture.named_states import Getter, NamedStates
from unvanish.capture.parts import unseen
from unvanish.flow.backward_runs import BackwardRun, BackwardRuns, OneAtATime
from unvanish.flow.module_sequence import ModuleSequence
from unvanish.flow.nonfinite import NonFiniteOrigin, first_origin
from unvanish.flow.passes import Passes
from unvanish.flow.record import Flow, LayerFlow, NoBackwardError, NonFiniteError
from unvanish.flow.recorded_sequence import RecordedCall, RecordedSequence
from unvanish.flow.residual import with_residuals
from unvanish.flow.stream import Stream
from unvanish.flow.transfer import numbers
from unvanish.flow.watched_sequence import CellSequence, MarkSequence, Measured, Sequence
from unvanish.nn.layers import EngineSequence
from unvanish.nn.modules import RecurrentModule, as_states

S = TypeVar("S", bound=Sequence)


class MarkObserver(NamedTuple):
    """Receives the states that `uv.mark` shows, where nothing else is recorded."""

    mark: Callable[[str, Any], None]


@contextmanager
def marks_go_to(show: Callable[[str, Any], None]) -> Iterator[None]:
    """Within the block, `uv.mark(h, name)` calls show(name, h), and no surrounding watch records the state."""
    observer = MarkObserver(show)
    Watch._active.append(observer)
    try:
        yield
    finally:
        Watch._active.remove(observer)


class Watch(Flow):
    """A flow that fills with records during backward passes; see `watch`."""

    _active: ClassVar[list[Watch | MarkObserver]] = []

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
        self._want_partial = partial
        self._capture = Capture(model, self._after, self._before)
        self._alone = OneAtATime(self._capture.problems)
        self._named = NamedStates(model, states or {}, self.mark, self._capture.problems)
        self._stream = None if stream is None else Stream(Path(stream))
        self._names = [n for path, module in self._capture.parts.modules.items() for n in _record_names(path, module)]
        self._handles: list[RemovableHandle] = []
        self._sequences: WeakSet[Sequence] = WeakSet()
        self._current: WeakValueDictionary[str, Sequence] = WeakValueDictionary()
        self._last: dict[str, Returned] = {}
        self._epoch = self._cut = self._count = 0
        self._runs = BackwardRuns(self._finish)
        self._passes = Passes(keep)
        self._seen: dict[str, int] = {}
        """name → calls, or marks, so far"""
        self._reached: set[str] = set()
        """parameters that a gradient came back to"""
        self._bad_parameter: str | None = None

    @property
    def dropped(self) -> int:
        """Passes measured and forgotten, since more than `keep` of a layer came."""
        return self._passes.dropped

    @property
    def on(self) -> bool:
        """Whether the present training step is one of those recorded."""
        return self._every == 1 or (self._epoch - 1) % self._every == 0

    @property
    def skipped(self) -> dict[str, str]:
        """Name → why, of recurrent parts that were not recorded, or not at every call."""
        found = {
            name: "a gradient came back to its weights, but no call of it was seen: it ran inside what torch.compile "
            "made, or another module used its weights; watch the model uncompiled, or the other by its name in states="
            for name, module in self._capture.parts.modules.items()
            if any(f"{name}.{key}".removeprefix(".") in self._reached for key, _ in module.named_parameters())
        }
        found |= dict(hidden_parts(self._model)) | self._named.called
        found = {name: why for name, why in found.items() if {name, name or "cell"}.isdisjoint(self._seen)}
        recorded = {*self._names, *self._capture.parts.modules, *self._passes.latest(), *self._capture.problems}
        found |= {name: self._unreached(name) for name in self._seen if self._cut and name not in recorded}
        return found | self._named.unrecorded | self._capture.problems

    def __enter__(self) -> Watch:
        if self in Watch._active:
            raise RuntimeError("this watch is already active; make a second one with uv.watch(model)")
        # torch's hooks for all modules: one on the model itself would be pickled and copied with it.
        self._handles.append(hooks.register_module_forward_pre_hook(self._begin))
        self._named.open()
        self._capture.__enter__()
        self._runs.observe_parameters(self._model)
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
        self._runs.close()
        for held in (self._handles, self._current, self._last):
            held.clear()
        if kind is None and not self._capture.parts.modules and not self._seen and not self.skipped:
            raise ValueError(
                f"model: {type(self._model).__name__} has no nn.RNN, nn.LSTM, nn.GRU or cell, and nothing was marked; "
                "mark the states of a custom cell with uv.mark(h, 'name'), or name the module with states={'name': ...}"
            )

    @property
    def layers(self) -> dict[str, LayerFlow]:
        """Name → the record of the latest pass that a gradient reached.

        Raises:
            NoBackwardError: no gradient has reached any layer.
            NonFiniteError: a NaN or infinity turned up; the message says where it first appeared.
        """
        latest = self._passes.latest()
        if not latest:
            raise NoBackwardError(self._silence(None))
        for measured in latest.values():
            if measured.nonfinite is not None:
                raise NonFiniteError(measured.nonfinite.sentence)
        order = [*self._names, *self._seen]
        return {name: latest[name].flow for name in sorted(latest, key=order.index)}

    def __getitem__(self, name: str) -> LayerFlow:
        if name in self._passes.latest():
            return self.passes(name)[-1]
        if name in self._names or name in self._seen or name in self.skipped:
            raise NoBackwardError(self._silence(name))
        known = dict.fromkeys([*self._names, *self._passes.latest()])
        raise KeyError(f"no layer {name!r} here; there are {', '.join(known) or 'none'}")

    @property
    def kind(self) -> str:
        return "Flow"

    def passes(self, name: str) -> list[LayerFlow]:
        """The records of the last `keep` passes of one layer, oldest first.

        Raises:
            KeyError, NoBackwardError, NonFiniteError: as for `flow[name]`.
        """
        found = self._passes.of(name)
        if not found:
            self[name]
        for measured in found:
            if measured.nonfinite is not None:
                raise NonFiniteError(measured.nonfinite.sentence)
        return [measured.flow for measured in found]

    def __repr__(self) -> str:
        nothing = f"Watch of {type(self._model).__name__}: no gradient has arrived yet"
        text = super().__repr__() if self._passes else nothing
        return "\n".join([text, *(f"not recorded: {name or 'the model'}: {why}" for name, why in self.skipped.items())])

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
        return f"{what}: a backward pass ran, but no gradient reached it: the loss does not depend on it"

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
        if isinstance(call.module, EngineSequence) and not self._want_partial:
            call.recorders = RecordedCall(call.module)
        return True

    def _after(self, call: Call) -> None:
        with self._alone(call.name) as alone:
            if alone:
                self._add(call)

    def _add(self, call: Call) -> None:
        """Add the call to the sequence that it continues, or to a new one."""
        name = call.name
        if isinstance(call.module, nn.RNNCellBase):
            name = name or "cell"
            sequence = self._going_on(name, call)
            if not isinstance(sequence, CellSequence):
                sequence = self._new(name, CellSequence(name, call.module, self._runs.catch, self._want_partial))
            self._runs.observe_weights(call.module)
            sequence.add(call)
            return
        sequence = self._going_on(name, call)
        if call.module.bidirectional or self._want_partial:
            sequence = None
        self._runs.observe_weights(call.module)
        measured = call.recorders
        if isinstance(measured, RecordedCall) and measured.complete(call.x):
            if not isinstance(sequence, RecordedSequence):
                sequence = self._new(name, RecordedSequence(name, self._runs.catch))
            sequence.add(measured)
            return
        if not isinstance(sequence, ModuleSequence):
            sequence = self._new(name, ModuleSequence(name, call.module, self._runs.catch, self._want_partial))
        sequence.add(call)

    def _going_on(self, name: str, call: Call) -> Sequence | None:
        """The sequence that this call continues."""
        last = self._last.get(name)
        found = link(as_states(call.hx), last)
        self._last[name] = now = returned(call.states)
        sequence = self._current.get(name)
        self._seen[name] = self._seen.get(name, 0) + 1
        if found is None or sequence is None or sequence.era != (self._cut, torch_internals.backward_number()):
            return None
        if last is None or last.states[0].shape != now.states[0].shape:
            # Samples were dropped or added in between, but a record has the same ones at every step.
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
        # For a model that is itself called step after step, a step does not begin a new pass.
        same = sequence is not None and (sequence.era == era or (sequence.era[:2] == era[:2] and link((h,), last)))
        if not isinstance(sequence, MarkSequence) or not same:
            sequence = self._new(name, MarkSequence(name, self._runs.catch))
        sequence.era = era
        sequence.add(h)

    @torch.no_grad()
    def _finish(self, run: BackwardRun | None) -> None:
        """A backward pass has ended: measure every sequence it reached, before an optimizer moves the weights."""
        self._cut += 1
        if run is not None:
            with self._alone("") as alone:
                if alone:
                    self._capture.guarded("", lambda: self._measure(run))

    def _measure(self, run: BackwardRun) -> None:
        names, totals = [name for name, _ in run.sums], numbers([total for _, total in run.sums])
        bad = [name for name, total in zip(names, totals, strict=True) if not math.isfinite(total)]
        self._reached.update(names)
        measured: list[tuple[Sequence, list[Measured]]] = []
        for sequence, errors in run.errors.items():
            if sequence.differentiated:
                # Part of this pass runs through the gradients of an earlier one, which are no errors of the sequence:
                # the record stays that of the gradient that was differentiated.
                continue
            sequence.differentiated = run.differentiable
            found = self._capture.guarded(sequence.name, lambda s=sequence, e=errors: s.arrive(e)) or []
            measured.append((sequence, found))
        self._bad_parameter = bad[0] if bad else None
        if not measured:
            return
        # Gradients arrive at the last call first; records are in the order of the calls.
        measured = with_residuals(sorted(measured, key=lambda m: m[0].number), run.gradients, self._runs.weights)
        first = first_origin(part.nonfinite for _, found in measured for part in found)
        for sequence, found in measured:
            for index, part in enumerate(found):
                record = replace(part.flow, step=self._epoch)
                origin = part.nonfinite
                if origin is None and bad:
                    says = f"its gradient is not finite, although every gradient at {record.name} is"
                    origin = NonFiniteOrigin(False, bad[0], says)
                elif origin is not None and not origin.forward:
                    # A NaN or infinity that another layer produced in the forward pass comes back to this one.
                    origin = first if first is not None and first.forward else origin
                self._passes.add((sequence.number, index), replace(part, gradients={}, flow=record, nonfinite=origin))
        if self._stream is not None:
            latest = {name: m.flow for name, m in self._passes.latest(self._epoch).items()}
            self._stream.write(Flow(latest), self._epoch)


def _record_names(path: str, module: RecurrentModule) -> list[str]:
    if isinstance(module, nn.RNNCellBase):
        return [path or "cell"]
    ends = ("", ".reverse") if module.bidirectional else ("",)
    return [f"{path}.l{k}{end}".removeprefix(".") for k in range(module.num_layers) for end in ends]
