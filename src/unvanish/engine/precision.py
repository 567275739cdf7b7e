"""Products at the precision of their dtype: without autocast, and without the rounding to TF32 or bfloat16 that torch
can be set to use inside a float32 product."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch

from unvanish.torch_internals import another_default_device, writable_backends

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
            # Most parts follow the whole. A part that is written to no longer follows it, so only deviating ones are.
            if part.fp32_precision != "ieee":
                stack.callback(setattr, part, "fp32_precision", part.fp32_precision)
                part.fp32_precision = "ieee"


def rounds_to_tf32(cudnn: bool) -> bool:
    """Whether float32 products on CUDA are rounded to TF32: those of cuDNN's recurrent layers, else those of cuBLAS."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "fp32_precision"):  # torch before 2.9
        return (backends.cudnn if cudnn else backends.cuda.matmul).allow_tf32
    # The older getter raises an error where the newer settings were used.
    return (backends.cudnn.rnn if cudnn else backends.cuda.matmul).fp32_precision == "tf32"


def _restore(whole: Any, value: str) -> None:
    """Restore the setting; if its value equals that of the setting above, let it follow that one again."""
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
def cpu_by_default() -> Iterator[None]:
    """Tensors that name no device are the CPU's, whatever the user's default device is."""
    with torch.device("cpu") if another_default_device() else nullcontext():
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute products at full precision within the block, with tensors of our own on the CPU where no device is named.

    Autocast is set per thread. The precision of products is set per process: it is changed when the first thread
    enters and restored when the last one has left, so that products in other threads are exact meanwhile, too (and
    torch's older getter `cudnn.allow_tf32` raises an error, as it does whenever the newer settings differ).
    """
    global _depth
    with without_autocast(), cpu_by_default():
        with _lock:
            if _depth == 0:
                with writable_backends():
                    _exact_products(_undo)
            _depth += 1
        try:
            yield
        finally:
            with _lock:
                _depth -= 1
                if _depth == 0:
                    with writable_backends():
                        _undo.close()
