"""Which samples each update sees: a function of (seed, update) alone, so that a resumed or distributed training sees
the same."""

from collections.abc import Iterator

import numpy as np


def batches(
    size: int, batch: int, updates: range, *, seed: int, shuffle: bool, rank: int = 0, world: int = 1
) -> Iterator[list[int]]:
    """The indices of each update: `batch` after `batch` out of an endless stream of passes over the data, each in an
    order of its own; of these every `world`-th, from `rank` on.

    Args:
        size: samples.
        batch: per update, over all processes.
        updates: which updates.
        seed: of the order.
        shuffle: whether a pass has an order of its own.
        rank: of this process.
        world: processes.
    """
    now, order = -1, np.arange(0)
    for update in updates:
        found = []
        for place in range(update * batch + rank, (update + 1) * batch, world):
            turn, index = divmod(place, size)
            if not shuffle:
                found.append(index)
                continue
            if turn != now:
                now, order = turn, np.random.default_rng([seed, turn]).permutation(size)
            found.append(int(order[index]))
        yield found
