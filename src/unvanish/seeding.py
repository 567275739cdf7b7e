"""Random numbers of our own, after which the user's go on as if none had been drawn."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore torch's generators after the block: the CPU's and those of all GPUs."""
    # All, whichever the block uses: `torch.manual_seed` reseeds every one.
    started = torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count())) if started else []):
            yield
    finally:
        if not started:
            # A seed that is set before CUDA starts waits for it: the last one has to be the user's.
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers from this seed within the block."""
    with generators_kept():
        torch.manual_seed(seed)
        yield
