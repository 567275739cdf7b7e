"""What is being done, on stderr, once a diagnosis takes longer than two seconds on a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 2.0
"""seconds"""


@contextmanager
def shown(progress: Callable[[str], None] | None) -> Iterator[Callable[[str], None]]:
    """The user's own function, or a status line that appears after `PATIENCE`."""
    if progress is not None:
        yield progress
        return
    started, status = time.monotonic(), None
    terminal = sys.stderr is not None and sys.stderr.isatty()

    def say(sentence: str) -> None:
        nonlocal status
        if not terminal or time.monotonic() - started < PATIENCE:
            return
        if status is None:
            status = _status(sentence)
            status.start()
        status.update(f"diagnose: {sentence}")

    try:
        yield say
    finally:
        if status is not None:
            status.stop()


def _status(sentence: str) -> Any:
    from rich.console import Console

    return Console(stderr=True, markup=False).status(sentence)
