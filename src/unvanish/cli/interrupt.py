"""Ctrl-C as Python knows it: typer would turn it into a return value, and its message would be lost."""

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
