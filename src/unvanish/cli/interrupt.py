"""Ctrl-C as Python knows it: typer would turn it into a return value, and its message would be lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperGroup


class _Held(BaseException):
    """A KeyboardInterrupt on its way through typer."""


class Commands(TyperGroup):
    """A group of commands out of which KeyboardInterrupt comes as it was raised."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Held(stop) from stop

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().main(*args, **kwargs)
        except _Held as held:
            raise held.args[0] from None
        if result == 130:  # interrupted before the command began
            raise KeyboardInterrupt
        return result


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, which by default ends a process on the spot, is a KeyboardInterrupt: what is half written goes."""
    before = signal.getsignal(signal.SIGTERM)
    # Whoever calls this with a handler of their own, or from another thread, keeps what they have.
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
