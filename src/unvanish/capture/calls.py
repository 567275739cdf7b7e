"""The calls of a model's recurrent modules, as their kernels saw them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish.capture.parts import Parts, unseen
from unvanish.engine.precision import cpu_by_default
from unvanish.nn import observing
from unvanish.nn.modules import RecurrentModule, as_states, draws_cuts, draws_dropout


class Call:
    """One call of a recurrent module: the arguments of its kernel and, once it has returned, its results."""

    def __init__(self, name: str, module: RecurrentModule, x: Any, hx: Any, lengths: Any) -> None:
        self.name, self.module, self.x, self.hx, self.lengths = name, module, x, hx, lengths
        self.output: Any = None
        self.rng: Tensor | None = None
        """the generator's state before the call, where dropout between layers was drawn on the CPU"""
        self.recorders: observing.Recorders | None = None

    @property
    def states(self) -> tuple[Tensor, ...]:
        """The states that the call returned."""
        return as_states(self.output if isinstance(self.module, nn.RNNCellBase) else self.output[1])

    @property
    def h_comes_from_returned_c(self) -> bool:
        """Whether h_t of a cell was made from the very c_t that it returned, so that ∂E/∂c_t includes the path through
        h_t.

        It was not where a fused kernel returns both (torch's cells on CUDA), nor for a single sample: its states are
        views.
        """
        states = self.states
        return len(states) == 1 or (states[0].dim() > 1 and states[0].grad_fn is not states[1].grad_fn)

    @property
    def y(self) -> Tensor:
        """The output as one tensor; the data of a packed output."""
        out = self.output if isinstance(self.module, nn.RNNCellBase) else self.output[0]
        out = out[0] if isinstance(out, tuple) and not isinstance(out, PackedSequence) else out
        return out.data if isinstance(out, PackedSequence) else out

    @property
    def stepwise(self) -> bool:
        """Whether the call read a single step."""
        return steps_of(self.module, self.x) == 1


def steps_of(module: RecurrentModule, x: Any) -> int:
    """The number of steps of an input."""
    if isinstance(module, nn.RNNCellBase):
        return 1
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes)
    return x.shape[1 if module.batch_first and x.dim() == 3 else 0]


class Capture:
    """Notifies its observers of every call of a model's recurrent modules, in every thread, while it is open.

    An error in here or in an observer is stored in `problems` and never raised in the user's pass.

    Args:
        model: the model whose modules are observed.
        after: called when a call has returned; a returned value replaces the output, None: the output stays.
        before: called when a call begins; it may set `call.recorders`, or, on a copy that is only measured, another
            `call.hx` to run with; returns whether to call `after`.
        without_gradients: also observe calls under torch.no_grad().
    """

    def __init__(
        self,
        model: nn.Module,
        after: Callable[[Call], Any],
        before: Callable[[Call], bool] = lambda call: True,
        without_gradients: bool = False,
    ) -> None:
        self.parts = Parts(model)
        self.problems: dict[str, str] = {}
        """module name → why its calls could not be recorded"""
        self._observer = _Observer(self, before, after, without_gradients)

    def __enter__(self) -> "Capture":
        observing.begin(self._observer)
        return self

    def __exit__(self, *raised: object) -> None:
        observing.end(self._observer)

    def guarded(self, name: str, do: Callable[[], Any]) -> Any:
        """do(), or None if it raises; the error is then stored as the problem of `name`."""
        try:
            with cpu_by_default():
                return do()
        except Exception as error:
            self.problems[name] = f"could not be recorded: {type(error).__name__}: {error}"
            return None


class _Observer:
    """The observer registered with the modules: passes on only calls of the model's own modules, and guards them."""

    def __init__(
        self, capture: Capture, before: Callable[[Call], bool], after: Callable[[Call], Any], always: bool
    ) -> None:
        self._capture, self._before, self._after, self._always = capture, before, after, always

    def before(self, module: nn.Module, x: Any, hx: Any, lengths: Any) -> Call | None:
        name = self._capture.parts.name_of(module)
        if name is None or not (self._always or torch.is_grad_enabled()):
            return None
        return self._capture.guarded(name, lambda: self._begun(name, module, x, hx, lengths))

    def _begun(self, name: str, module: Any, x: Any, hx: Any, lengths: Any) -> Call | None:
        data = x.data if isinstance(x, PackedSequence) else x
        tensors = [v for v in (data, *as_states(hx)) if isinstance(v, Tensor)]
        why = unseen([*tensors, *(p for p in module._parameters.values() if p is not None)])
        if why is not None:
            self._capture.problems[name] = why
            return None
        call = Call(name, module, x, hx, lengths)
        if draws_dropout(module) and data.device.type != "cpu":
            self._capture.problems[name] = (
                "dropout between its layers is drawn inside cuDNN, where it can't be drawn again; set its dropout to "
                "0, use one module per layer, or run on the CPU"
            )
            return None
        if draws_dropout(module) or draws_cuts(module):
            call.rng = torch.get_rng_state()
        return call if self._before(call) else None

    def recorders(self, token: Call) -> observing.Recorders | None:
        return token.recorders

    def state(self, token: Call, hx: Any) -> Any:
        return token.hx

    def after(self, token: Call, output: Any) -> Any:
        token.output = output
        return self._capture.guarded(token.name, lambda: self._after(token))
