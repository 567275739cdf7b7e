"""Products at the precision of their dtype: without autocast, and without the rounding to TF32 or bfloat16 that torch
may be told to do inside a float32 product."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch

_lock = Lock()
_depth = 0
_undo = ExitStack()


def _exact_products(stack: ExitStack) -> None:
    """Make float32 products exact until `stack` closes."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "fp32_precision"):  # torch before 2.9
        for place in (backends.cuda.matmul, backends.cudnn):
            stack.callback(setattr, place, "allow_tf32", place.allow_tf32)
            place.allow_tf32 = False
        return
    for whole, parts in (
        (backends.cudnn, (backends.cuda.matmul, backends.cudnn.rnn)),
        (backends.mkldnn, (backends.mkldnn.matmul, backends.mkldnn.rnn)),
    ):
        stack.callback(_restore, whole, whole.fp32_precision)
        whole.fp32_precision = "ieee"
        for part in parts:
            # Most parts follow the whole. One that was set by itself would follow nothing any more, once written to.
            if part.fp32_precision != "ieee":
                stack.callback(setattr, part, "fp32_precision", part.fp32_precision)
                part.fp32_precision = "ieee"


def _restore(whole: Any, value: str) -> None:
    """Set it back; where the value is that of the setting above, let it follow that one again."""
    whole.fp32_precision = "none"
    if whole.fp32_precision != value:
        whole.fp32_precision = value


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
    all threads enters and restored when the last has left, so that products of other threads are exact meanwhile, too
    (and torch's older getter `cudnn.allow_tf32` raises an error, as it does whenever the newer settings differ).
    """
    global _depth
    with without_autocast():
        with _lock:
            if _depth == 0:
                _exact_products(_undo)
            _depth += 1
        try:
            yield
        finally:
            with _lock:
                _depth -= 1
                if _depth == 0:
                    _undo.close()
