"""The axis of time is read off dependence among neighbours, and not off the chance of a few numbers."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from unvanish.diagnosis.order import axis_of_time


def copy_task(seed: int, samples: int, length: int) -> tuple[Tensor, Tensor]:
    """Two symbols, blanks, then both again: most steps are the same in every sample."""
    words = torch.randint(4, (samples, 2), generator=torch.Generator().manual_seed(seed))
    ids = torch.full((samples, length), 4)
    ids[:, :2], ids[:, -2] = words, 5
    y = torch.full((samples, length), -100)
    y[:, -2:] = words
    return one_hot(ids, 6).float(), y


@pytest.mark.parametrize("length", [12, 42, 90])
@pytest.mark.parametrize("samples", [300, 2048])
def test_blank_steps_do_not_make_samples_look_like_neighbours_in_time(length: int, samples: int) -> None:
    for seed in range(8):
        x, y = copy_task(seed, samples, length)
        assert axis_of_time(x, [y]) in (None, 1), seed
        assert axis_of_time(x.transpose(0, 1), [y.T]) in (None, 0), seed


def test_a_slow_signal_tells_time_on_either_axis() -> None:
    x = torch.randn(64, 50, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
    assert axis_of_time(x, []) == 1
    assert axis_of_time(x.transpose(0, 1), []) == 0
    assert axis_of_time(torch.randn(64, 50, 3, generator=torch.Generator().manual_seed(1)), []) is None
