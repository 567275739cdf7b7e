"""Products at the precision of their dtype: without autocast, and without the rounding to TF32 or bfloat16 that torch
may be told to do inside a float32 product."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch

_lock = Lock()
_depth = 0
_before: list[Any] = []


def _settings() -> list[tuple[Any, str, Any]]:
    """(where, name, value for IEEE precision) of every setting that rounds a product. torch before 2.9 has one for all
    of cuDNN."""
    backends = torch.backends
    if hasattr(backends.cudnn, "rnn") and hasattr(backends.cudnn.rnn, "fp32_precision"):
        places = (backends.cuda.matmul, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.rnn)  # type: ignore[attr-defined]
        return [(place, "fp32_precision", "ieee") for place in places]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]


@contextmanager
def without_autocast() -> Iterator[None]:
    """In the dtype of what goes in."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """What is measured is not rounded on the way.

    Autocast is a thread's own. The settings of products are the whole process's: they are changed when the first of
    all threads enters and restored when the last has left, so that products of other threads are exact meanwhile, too.
    """
    global _depth
    with without_autocast():
        with _lock:
            _depth += 1
            if _depth == 1:
                settings = _settings()
                _before[:] = [getattr(place, name) for place, name, _ in settings]
                for place, name, exact in settings:
                    setattr(place, name, exact)
        try:
            yield
        finally:
            with _lock:
                _depth -= 1
                if _depth == 0:
                    for (place, name, _), value in zip(_settings(), _before, strict=True):
                        setattr(place, name, value)
