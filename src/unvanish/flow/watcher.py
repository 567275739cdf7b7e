"""Watch the error travel back through the recurrent layers of any model, without touching the model's own numbers.

Forward and backward run as always. A layer of `unvanish.nn` measures as it runs. Of a layer of torch's, a watch keeps
what went in and, through hooks on what came out, ∂E/∂h_t as it arrives from outside; from these it replays the layer's
own backpropagation through time. So outputs and gradients stay bitwise what they were, and the record can be held
against autograd's ∂E/∂W (`residual`).
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from unvanish.flow.module_sequence import ModuleSequence
from unvanish.flow.record import Flow, LayerFlow, NoBackwardError, NonFiniteError
from unvanish.flow.recorded_sequence import RecordedCall, RecordedSequence
from unvanish.flow.sequences import CellSequence, MarkSequence, Measured, Sequence, heard_weights
from unvanish.flow.stream import Stream
from unvanish.nn.layers import EngineSequence
from unvanish.nn.modules import as_states, full_precision

S = TypeVar("S", bound=Sequence)


@dataclass
class _Backward:
    """One run of the autograd engine."""

    errors: dict[Sequence, dict[Hashable, Any]] = field(default_factory=dict)
    gradients: dict[Hashable, Tensor] = field(default_factory=dict)
    """weight key → autograd's ∂E/∂W of this run"""


class Watch(Flow):
    """A flow that fills as errors come back; see `watch`."""

    _active: ClassVar[list[Watch]] = []

    def __init__(
        self,
        model: nn.Module,
        *,
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
        self._stream = None if stream is None else Stream(Path(stream))
        self._model = model
        self._partial = partial
        self._keep = keep
        self._modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)}
        self._names = [name for path, module in self._modules.items() for name in _record_names(path, module)]
        if any(isinstance(m, torch._dynamo.OptimizedModule) for m in model.modules()):
            raise TypeError(
                "model: a torch.compile'd module hides its layers; watch the module it was made from (._orig_mod)"
            )
        self._handles: list[RemovableHandle] = []
        self._weights: dict[Hashable, tuple[Tensor, RemovableHandle]] = {}
        self._sequences: WeakSet[Sequence] = WeakSet()
        self._current: WeakValueDictionary[str, Sequence] = WeakValueDictionary()
        self._last_state: dict[str, tuple[Tensor, ...]] = {}
        self._epoch = self._cut = self._count = 0
        self._runs: dict[int, _Backward] = {}
        self._passes: OrderedDict[tuple[int, int], Measured] = OrderedDict()
        self._seen: dict[str, None] = {}
        self._rng: dict[str, Tensor | None] = {}
        self.dropped = 0
        """passes measured and forgotten, since more than `keep` of a layer came"""

    @property
    def on(self) -> bool:
        """Whether the present training step is one of those recorded."""
        return self._every == 1 or (self._epoch - 1) % self._every == 0

    def __enter__(self) -> Watch:
        if self in Watch._active:
            raise RuntimeError("this watch is already active; make a second one with uv.watch(model)")
        # First, since the model may itself be a layer.
        self._handles.append(self._model.register_forward_pre_hook(self._begin))
        for name, module in self._modules.items():
            if isinstance(module, nn.RNNBase):
                self._handles.append(module.register_forward_pre_hook(self._before_module(name), with_kwargs=True))
                hook = self._after_module(name)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))
            else:
                self._handles.append(module.register_forward_hook(self._after_cell(name), with_kwargs=True))
        Watch._active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Watch._active.remove(self)
        for handle in self._handles:
            handle.remove()
        for sequence in list(self._sequences):
            sequence.close()
        for weight, handle in self._weights.values():
            handle.remove()
            if not weight._backward_hooks:
                weight._backward_hooks = None
        for held in (self._handles, self._weights, self._current, self._last_state, self._runs, self._rng):
            held.clear()
        if kind is None and not self._modules and not self._seen:
            raise ValueError(
                f"model: {type(self._model).__name__} has no nn.RNN, nn.LSTM, nn.GRU or cell, and nothing was marked; "
                "mark the states of a custom cell with uv.mark(h, 'name')"
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
            raise NoBackwardError(self._silence("any layer"))
        for measured in latest.values():
            if measured.nonfinite is not None:
                raise NonFiniteError(measured.nonfinite)
        order = [*self._names, *self._seen]
        return {name: latest[name].flow for name in sorted(latest, key=order.index)}

    def __getitem__(self, name: str) -> LayerFlow:
        if name in self._passed():
            return self.passes(name)[-1]
        if name in self._names or name in self._seen:
            raise NoBackwardError(self._silence(repr(name)))
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
                raise NonFiniteError(measured.nonfinite)
        return [measured.flow for measured in found]

    def __repr__(self) -> str:
        return (
            super().__repr__() if self._passes else f"Watch of {type(self._model).__name__}: no error has come back yet"
        )

    def _passed(self) -> dict[str, None]:
        return dict.fromkeys(measured.flow.name for measured in self._passes.values())

    def _silence(self, what: str) -> str:
        if not self._seen:
            return (
                f"{what}: no forward pass with gradients ran inside the watch; "
                "call the model and loss.backward() in the with block"
            )
        if not self._passes:
            return f"{what}: no backward pass ran inside the watch; call loss.backward() in the with block"
        return f"{what}: a backward pass ran, but no error came back to it: the loss does not depend on it"

    def _begin(self, module: nn.Module, args: Any) -> None:
        if module is self._model and _graph_task() < 0 and torch.is_grad_enabled():
            self._epoch += 1
            # What an aborted backward pass left behind.
            self._runs.clear()

    def _mine(self, name: str, module: nn.Module) -> bool:
        """Whether a call of `module` is one of the model's own: a copy that is made within the block takes the hooks
        along. nn.DataParallel runs replicas."""
        return (module is self._modules[name] or getattr(module, "_is_replica", False)) and self._awake()

    def _awake(self) -> bool:
        """Whether a call is to be recorded."""
        if self._every > 1 and not self._epoch:
            raise RuntimeError(
                f"every: counts calls of the watched {type(self._model).__name__}, but only its parts are called; "
                "watch the module that is called, or leave every=1"
            )
        return self.on and torch.is_grad_enabled()

    def _before_module(self, name: str) -> Any:
        def hook(module: nn.RNNBase, args: Any, kwargs: Any) -> None:
            if not self._mine(name, module):
                return
            if isinstance(module, EngineSequence) and not self._partial:
                module._recording = RecordedCall(module)
            draws = module.training and module.dropout > 0 and module.num_layers > 1
            if draws and next(module.parameters()).device.type != "cpu":
                raise RuntimeError(
                    f"watch: dropout between the layers of {name or 'the model'!r} is drawn inside cuDNN, where it "
                    "can't be drawn again; set its dropout to 0, use one module per layer, or watch on the CPU"
                )
            self._rng[name] = torch.get_rng_state() if draws else None

        return hook

    def _after_module(self, name: str) -> Any:
        def hook(module: nn.RNNBase, args: Any, kwargs: Any, output: Any) -> None:
            # A watch with `partial` replays; what another within it records is not its own.
            call = None if self._partial else module.__dict__.pop("_recording", None)
            if output is None or not self._mine(name, module):
                return
            x = args[0] if args else kwargs["input"]
            hx = args[1] if len(args) > 1 else kwargs.get("hx")
            stepwise = _steps(module, x) == 1
            sequence = self._continued(name, hx, as_states(output[1]), stepwise)
            if module.bidirectional or self._partial:
                sequence = None
            self._hear_weights(module)
            rng = self._rng.pop(name, None)
            if call is not None and call.complete(x):
                if not isinstance(sequence, RecordedSequence):
                    sequence = self._new(name, hx, RecordedSequence(name, self._catch))
                sequence.add(call)
                return
            if not isinstance(sequence, ModuleSequence):
                sequence = self._new(name, hx, ModuleSequence(name, module, self._catch, self._partial))
            sequence.add(x, hx, kwargs.get("lengths"), output, rng)

        return hook

    def _after_cell(self, name: str) -> Any:
        def hook(module: nn.RNNCellBase, args: Any, kwargs: Any, output: Any) -> None:
            if not self._mine(name, module):
                return
            x = args[0] if args else kwargs["input"]
            hx = args[1] if len(args) > 1 else kwargs.get("hx")
            title = name or "cell"
            sequence = self._continued(title, hx, as_states(output), stepwise=True)
            if sequence is None:
                sequence = self._new(title, hx, CellSequence(title, module, self._catch, self._partial))
            assert isinstance(sequence, CellSequence)
            self._hear_weights(module)
            sequence.add(x, hx, output)

        return hook

    def _continued(self, name: str, hx: Any, output: tuple[Tensor, ...], stepwise: bool) -> Sequence | None:
        """The sequence that this call goes on with: the one whose last state it starts from, attached to the graph or
        not."""
        given = as_states(hx)
        last = self._last_state.get(name, ())
        self._last_state[name] = tuple(state.detach() for state in output)
        sequence = self._current.get(name)
        if sequence is None or not given or sequence.era != (self._cut, _graph_task()):
            return None
        attached = any(g.requires_grad for g in given)
        if any(g.data_ptr() == s.data_ptr() for g, s in zip(given, last, strict=True)):
            if not attached:
                sequence.detached.append(sequence.steps)
            return sequence
        # A state that was changed between two steps (attention, dropout) still goes on, unless it is the learnt
        # initial state again.
        fresh = given[0].data_ptr() == sequence.start
        return sequence if stepwise and attached and not fresh and sequence.epoch == self._epoch else None

    def _new(self, name: str, hx: Any, sequence: S) -> S:
        self._count += 1
        sequence.number, sequence.era, sequence.epoch = self._count, (self._cut, _graph_task()), self._epoch
        sequence.start = None if hx is None else as_states(hx)[0].data_ptr()
        self._current[name] = sequence
        self._sequences.add(sequence)
        self._seen[name] = None
        return sequence

    def mark(self, h: Tensor, name: str) -> None:
        """See `unvanish.mark`."""
        if name in self._modules or name in self._names:
            raise ValueError(f"name: {name!r} is that of a layer of the model; mark the state under another")
        if not self._awake():
            return
        sequence = self._current.get(name)
        if sequence is None or sequence.era != (self._cut, _graph_task()) or sequence.epoch != self._epoch:
            sequence = self._new(name, None, MarkSequence(name, self._catch))
        assert isinstance(sequence, MarkSequence)
        sequence.add(h)

    def _hear_weights(self, module: nn.RNNBase | nn.RNNCellBase) -> None:
        for key, weight in heard_weights(module).values():
            if weight.requires_grad and not (weight.is_leaf and key in self._weights):
                handle = weight.register_hook(partial(self._hear, key))
                if weight.is_leaf:
                    self._weights[key] = (weight, handle)

    def _hear(self, key: Hashable, grad: Tensor) -> None:
        gradients = self._run().gradients
        gradients[key] = gradients[key] + grad if key in gradients else grad

    def _run(self) -> _Backward:
        task = _graph_task()
        if task not in self._runs:
            self._runs[task] = _Backward()
            Variable._execution_engine.queue_callback(lambda: self._finish(task))
        return self._runs[task]

    def _catch(self, sequence: Sequence, key: Hashable, error: Any) -> None:
        errors = self._run().errors.setdefault(sequence, {})
        errors[key] = errors[key] + error if key in errors else error

    @torch.no_grad()
    def _finish(self, task: int) -> None:
        """A backward pass has ended: measure every sequence it reached, before an optimizer moves the weights."""
        run = self._runs.pop(task)
        self._cut += 1
        ours: dict[Hashable, Tensor] = {}
        measured: list[tuple[Sequence, list[Measured]]] = []
        for sequence, errors in run.errors.items():
            with full_precision():
                found = sequence.arrive(errors)
            for part in found:
                for key, gradient in part.gradients.items():
                    ours[key] = ours[key] + gradient if key in ours else gradient
            measured.append((sequence, found))
        if not measured:
            return
        # Errors arrive at the last call first; records stand in the order of the calls.
        for sequence, found in sorted(measured, key=lambda m: m[0].number):
            for index, part in enumerate(found):
                residual = _residual({key: ours[key] for key in part.gradients}, run.gradients)
                record = replace(part.flow, residual=residual, step=self._epoch)
                self._store(sequence, index, replace(part, gradients={}, flow=record))
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


def _record_names(path: str, module: nn.RNNBase | nn.RNNCellBase) -> list[str]:
    if isinstance(module, nn.RNNCellBase):
        return [path or "cell"]
    ends = ("", ".reverse") if module.bidirectional else ("",)
    return [f"{path}.l{k}{end}".removeprefix(".") for k in range(module.num_layers) for end in ends]


def _steps(module: nn.RNNBase, x: Tensor | PackedSequence) -> int:
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes)
    return x.shape[1 if module.batch_first and x.dim() == 3 else 0]


def _graph_task() -> int:
    """The number of the running backward pass, −1 outside."""
    return torch._C._current_graph_task_id()


def _residual(ours: dict[Hashable, Tensor], autograd: dict[Hashable, Tensor]) -> float:
    pairs = [(mine, autograd[key]) for key, mine in ours.items() if key in autograd]
    if not pairs:
        return math.nan
    # Where nothing else uses a weight, autograd hands on the very tensor that the engine made.
    if all(mine is theirs and math.isfinite(float(mine.sum())) for mine, theirs in pairs):
        return 0.0
    apart, size = (
        math.hypot(*(float(torch.linalg.vector_norm(v, dtype=torch.float64)) for v in vs))
        for vs in ([mine - theirs for mine, theirs in pairs], [theirs for _, theirs in pairs])
    )
    return apart / size if size > 0 else (0.0 if apart == 0 else math.inf)
