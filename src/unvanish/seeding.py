"""Random numbers of our own, after which the user's go on as if none had been drawn."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore torch's generators after the block: the CPU's and those of all GPUs."""
    # All, whichever the block uses: `torch.manual_seed` reseeds every one.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(gpus)):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers from this seed within the block."""
    with generators_kept():
        torch.manual_seed(seed)
        yield
