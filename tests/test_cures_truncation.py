"""Truncated BPTT cuts what it says it cuts, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import unvanish as uv
from unvanish import cures


def layer(name):
    torch.manual_seed(0)
    made = getattr(nn, name)(2, 3) if hasattr(nn, name) else uv.nn.Recurrent(uv.cells.ZOO[name](), 2, 3)
    return made.double()


def outputs(walk, rnn):
    found = []
    for piece in walk:
        y, state = rnn(piece.x, piece.state)
        found.append(y)
        walk.hand_on(state)
    return torch.cat(found)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "mgu", "slstm"])
def test_values_are_those_of_the_whole_and_gradients_end_at_the_cuts(name):
    rnn, x = layer(name), torch.randn(7, 2, 2, dtype=torch.float64, requires_grad=True)
    walk = cures.TruncatedBPTT(x, steps=3)
    y = outputs(walk, rnn)
    torch.testing.assert_close(y, rnn(x)[0])
    reached = torch.zeros(7, 7, dtype=torch.bool)
    for t in range(7):
        (d,) = torch.autograd.grad(y[t].sum(), x, retain_graph=True)
        reached[t] = d.flatten(1).any(1)
    assert walk.cuts == [3, 6]
    for lag in range(7):
        pairs = [bool(reached[t, t - lag]) for t in range(lag, 7)]
        assert walk.kept(lag) == pytest.approx(sum(pairs) / len(pairs))
    assert walk.mean_steps == pytest.approx(float(reached.sum() - 7) / 7)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_whole_gradient_is_the_truncated_one_and_what_was_discarded(name):
    rnn, x = layer(name), torch.randn(8, 2, 2, dtype=torch.float64)
    (rnn(x)[0] ** 2).sum().backward()
    whole = [p.grad.clone() for p in rnn.parameters()]
    rnn.zero_grad()
    walk, ends = cures.TruncatedBPTT(x, steps=4), []
    for piece in walk:
        y, state = rnn(piece.x, piece.state)
        (y**2).sum().backward(retain_graph=True)
        ends.append(state if isinstance(state, tuple) else (state,))
        walk.hand_on(state)
    (errors,) = walk.discarded
    left_out = torch.autograd.grad(ends[0], list(rnn.parameters()), errors)
    for p, full, rest in zip(rnn.parameters(), whole, left_out, strict=True):
        torch.testing.assert_close(p.grad + rest, full, rtol=1e-10, atol=1e-12)


@given(T=st.integers(1, 40), steps=st.integers(1, 45))
def test_every_step_is_walked_once(T, steps):
    x = torch.arange(T, dtype=torch.float32).view(1, T, 1)
    walk = cures.TruncatedBPTT(x, steps, policy="reset", batch_first=True)
    seen = []
    for piece in walk:
        assert piece.state is None
        seen.append(piece.of(x))
        walk.hand_on(torch.zeros(1))
    assert torch.equal(torch.cat(seen, 1), x)
    assert len(walk) == len(seen) == -(-T // steps)
    assert walk.kept(0) == 1


def test_a_replaced_layers_other_states_are_handed_on_and_accounted_for():
    rnn, x = cures.replace_(nn.RNN(2, 3), "lstm").double(), torch.randn(6, 1, 2, dtype=torch.float64)
    walk = cures.TruncatedBPTT(x, 3)
    y = outputs(walk, rnn)
    y.sum().backward()
    torch.testing.assert_close(y, rnn(x)[0])
    assert len(walk.discarded[0]) == 2


def test_truncation_errors():
    with pytest.raises(TypeError, match="pad a packed"):
        cures.TruncatedBPTT([1.0], 2)
    with pytest.raises(ValueError, match="at least one step"):
        cures.TruncatedBPTT(torch.zeros(0, 1, 1), 2)
    with pytest.raises(ValueError, match="steps: expected"):
        cures.TruncatedBPTT(torch.zeros(3, 1, 1), 0)
    with pytest.raises(ValueError, match="policy"):
        cures.TruncatedBPTT(torch.zeros(3, 1, 1), 2, policy="keep")
    walk = cures.TruncatedBPTT(torch.zeros(3, 1, 1), 2)
    with pytest.raises(RuntimeError, match="hand_on"):
        list(walk)
    with pytest.raises(TypeError, match="state: expected"):
        walk.hand_on(None)
    with pytest.raises(ValueError, match="lag"):
        walk.kept(3)
    with pytest.raises(RuntimeError, match="reset"):
        cures.TruncatedBPTT(torch.zeros(3, 1, 1), 2, policy="reset").discarded  # noqa: B018
