"""A status line on stderr, shown once a diagnosis takes longer than two seconds on a terminal."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 2.0
"""seconds"""


@contextmanager
def shown(progress: Callable[[str], None] | None) -> Iterator[Callable[[str], None]]:
    """The user's own function, or a status line that appears after `PATIENCE`."""
    if progress is not None:
        yield progress
        return
    started, length = time.monotonic(), 0
    terminal = sys.stderr is not None and sys.stderr.isatty()

    def write(line: str) -> None:
        nonlocal length
        sys.stderr.write("\r" + line.ljust(length) + "\r")
        sys.stderr.flush()
        length = len(line)

    def say(sentence: str) -> None:
        if terminal and time.monotonic() - started >= PATIENCE:
            write(f"diagnose: {sentence}"[: shutil.get_terminal_size().columns - 1])

    try:
        yield say
    finally:
        if length:
            write("")
