"""Where a recurrent layer reports its inputs and outputs: at the call of its kernel, inside `forward`.

`unvanish.nn`'s layers always report here. torch's do while there is an observer: then the *class attribute* `forward`
of nn.RNN, LSTM, GRU and their cells is a wrapper, so that a subclass's `super().forward(...)`, a direct call of
`layer.forward(x)`, and changes made by hooks before or after are all observed as the kernel sees them. Instances are
never modified: models pickle, copy and script as they do unobserved.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from types import CellType, FunctionType
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import rnn as torchs

from unvanish import engine
from unvanish.nn.modules import LayerDirection, TimeMajor

Recorders = Callable[[TimeMajor, LayerDirection, int], engine.Recorder]
"""(input, layer and direction, first step) → its recorder"""


class Observer(Protocol):
    """Is notified of every call of a recurrent layer. It must not raise, nor change any argument."""

    def before(self, module: nn.Module, x: Any, hx: Any, lengths: Any) -> Any:
        """Called before a call; the returned token is passed to the other methods; None: ignore this call."""

    def recorders(self, token: Any) -> Recorders | None:
        """The recorders that measure inside the engine, for a layer of `unvanish.nn`; None: no measurement."""

    def state(self, token: Any, hx: Any) -> Any:
        """The initial state to run with: hx, or its replacement on a copy that is only measured."""

    def after(self, token: Any, output: Any) -> Any:
        """Called after a call has returned. A returned value replaces the output; None: the output stays."""


TORCHS = (torchs.RNN, torchs.LSTM, torchs.GRU, torchs.RNNCell, torchs.LSTMCell, torchs.GRUCell)

# A plain tuple, replaced as a whole: read without the lock by every thread.
_observers: tuple[Observer, ...] = ()
_originals: dict[type[nn.Module], Any] = {}
_wrappers: dict[type[nn.Module], Any] = {}
_lock = RLock()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Notify `observer` of all calls, in every thread, within the block."""
    begin(observer)
    try:
        yield
    finally:
        end(observer)


def begin(observer: Observer) -> None:
    """Notify `observer` of all calls from now on."""
    global _observers
    with _lock:
        if not _observers:
            for kind in TORCHS:
                _originals[kind] = original = vars(kind)["forward"]
                made = _wrappers.get(kind)
                if made is None or made.__wrapped__ is not original:
                    made = _wrappers[kind] = _wrapper(original)
                kind.forward = made
        _observers = (*_observers, observer)


def end(observer: Observer) -> None:
    """No longer."""
    global _observers
    with _lock:
        _observers = tuple(other for other in _observers if other is not observer)
        if not _observers:
            for kind, original in _originals.items():
                kind.forward = original
            _originals.clear()


def observed(module: nn.Module, x: Any, hx: Any, lengths: Any, run: Callable[[Any, Recorders | None], Any]) -> Any:
    """`run(hx, recorders)`, notifying all observers."""
    observers = _observers
    if not observers or torch.compiler.is_compiling():
        return run(hx, None)
    tokens = [(observer, observer.before(module, x, hx, lengths)) for observer in observers]
    chosen: Recorders | None = None
    for observer, token in tokens:
        if token is not None:
            # The innermost observer's recorders are used; the others compute for themselves.
            chosen = observer.recorders(token) or chosen
            hx = observer.state(token, hx)
    output = run(hx, chosen)
    for observer, token in tokens:
        if token is not None:
            shown = observer.after(token, output)
            output = output if shown is None else shown
    return output


def _of_torch(original: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
    # Invalid arguments raise torch's own error, unobserved.
    x = args[0] if args else kwargs.get("input")
    hx = args[1] if len(args) > 1 else kwargs.get("hx")

    def run(state: Any, recorders: Recorders | None) -> Any:
        if state is hx:
            return original(module, *args, **kwargs)
        return original(module, x, state)

    return observed(module, x, hx, None, run)


def _wrapper(original: Any) -> Any:
    """The wrapper, as a function of the original's module: torch.jit.script compiles what it finds through
    `__wrapped__` and the globals."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return of_torch(original, self, args, kwargs)

    of_torch = _of_torch
    cells = {"original": original, "of_torch": of_torch}
    made = FunctionType(
        forward.__code__,
        original.__globals__,
        original.__name__,
        original.__defaults__,
        tuple(CellType(cells[name]) for name in forward.__code__.co_freevars),
    )
    made.__qualname__, made.__module__, made.__doc__ = original.__qualname__, original.__module__, original.__doc__
    made.__annotations__ = original.__annotations__
    made.__wrapped__ = original  # type: ignore[attr-defined]
    return made
