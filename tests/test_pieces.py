"""A long sequence run piece by piece: `checkpoint_every`."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unvanish as uv
from tests.strategies import ModuleCase, module_cases
from tests.test_nn import outcome


@given(case=module_cases(), every=st.integers(1, 8), seed=st.integers(0, 99))
def test_checkpointing_changes_no_number(case: ModuleCase, every: int, seed: int) -> None:
    module = uv.accelerate(case.module)
    expected = outcome(module, case, seed)
    module.checkpoint_every = every
    torch.testing.assert_close(outcome(module, case, seed), expected, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="uses checkpoint_every"):
        uv.restore(module)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "a"])
def test_checkpoint_every_is_a_number_of_steps(every: Any) -> None:
    lstm = uv.nn.LSTM(3, 4)
    lstm.checkpoint_every = every
    with pytest.raises(ValueError, match="checkpoint_every: expected None or a whole number of steps, at least 1, got"):
        lstm(torch.zeros(5, 2, 3))


def test_second_derivatives_go_through_the_pieces() -> None:
    torch.manual_seed(0)
    layer = uv.nn.LSTM(2, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    layer.checkpoint_every = 2
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))
