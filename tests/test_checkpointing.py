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


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    torch.manual_seed(0)
    layer = uv.nn.GRU(2, 3, dtype=torch.float64)
    x, h0 = torch.randn(5, 2, 2, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    layer.weight_ih_l0.requires_grad_(False)

    def gradients() -> list[torch.Tensor]:
        layer.zero_grad()
        h = h0.clone().requires_grad_()
        _, final = layer(x, h)
        final.square().sum().backward(retain_graph=True)
        final.sum().backward()
        assert layer.weight_ih_l0.grad is None
        assert h.grad is not None
        return [h.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    expected = gradients()
    layer.checkpoint_every = 2
    torch.testing.assert_close(gradients(), expected)
    layer.requires_grad_(False)
    assert not layer(x)[0].requires_grad


@pytest.mark.parametrize("rung", list(uv.engine.RUNGS))
def test_a_backward_under_autocast_recomputes_in_the_same_dtype(rung: str) -> None:
    layer = uv.nn.LSTM(2, 3)
    layer.checkpoint_every = 2
    x = torch.randn(5, 2, 2)
    found = []
    with uv.engine.force(rung):
        for wrapped in (False, True):
            layer.zero_grad()
            y, _ = layer(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=wrapped):
                y.backward(torch.ones_like(y))
            found.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_state_that_was_carried_over_counts_once_where_a_graph_is_made() -> None:
    torch.manual_seed(0)
    layer = uv.nn.LSTM(2, 3, dtype=torch.float64)
    layer.checkpoint_every = 2
    x, heard = torch.randn(6, 2, 2, dtype=torch.float64), []
    layer.weight_hh_l0.register_hook(heard.append)
    found = []
    for create_graph in (False, True):
        _, state = layer(x[:3])
        y, _ = layer(x[3:], state)
        found.append(torch.autograd.grad(y.square().sum(), [*layer.parameters()], create_graph=create_graph))
    torch.testing.assert_close(found[1], found[0])
    assert len(heard) == 2


def test_second_derivatives_go_through_the_pieces() -> None:
    torch.manual_seed(0)
    layer = uv.nn.LSTM(2, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    layer.checkpoint_every = 2
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,))
