"""Numbers from a device to Python, which waits for everything that the device has been given to do."""

from collections.abc import Sequence

import torch
from torch import Tensor


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Scalars on any devices as numbers, with one wait for each device and dtype."""
    # Tensors of subclasses, such as DTensor, can't be stacked and listed.
    alone = [v.is_cpu or type(v) is not Tensor for v in scalars]
    found = [float(v) if single else 0.0 for v, single in zip(scalars, alone, strict=True)]
    elsewhere: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, v in enumerate(scalars):
        if not alone[i]:
            # Not all cast to float64, which some devices lack.
            elsewhere.setdefault((v.device, v.dtype), []).append(i)
    for places in elsewhere.values():
        for i, value in zip(places, torch.stack([scalars[i] for i in places]).tolist(), strict=True):
            found[i] = value
    return found
