"""Clipping: the threshold is what was observed; inside the recurrence no δ is longer than the limit."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unvanish import cures
from unvanish import nn as unn


def update(clipper, w, norm):
    w.grad = torch.zeros_like(w)
    w.grad[0] = norm
    seen = clipper.clip_()
    return seen, float(w.grad.norm())


@given(norms=st.lists(st.floats(1e-6, 1e6), min_size=6, max_size=40), q=st.floats(0.1, 1.0), scale=st.floats(0.5, 3))
def test_threshold_is_the_quantile_of_the_norms_before(norms, q, scale):
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    clipper = cures.GradientClipper([w], q, scale, warmup=5, history=10)
    for k, norm in enumerate(norms):
        seen, after = update(clipper, w, norm)
        assert math.isclose(seen, norm, rel_tol=1e-12)
        before = torch.tensor(norms[max(0, k - 10) : k], dtype=torch.float64)
        bound = math.inf if k < 5 else scale * float(before.quantile(q))
        assert math.isclose(after, min(norm, bound), rel_tol=1e-9)


def test_clips_all_parameters_by_one_factor_and_keeps_the_direction():
    model = nn.Linear(3, 2)
    clipper = cures.GradientClipper(model.parameters(), maximum=0.5, history=1, warmup=1)
    model(torch.randn(4, 3)).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    norm = clipper.clip_()
    for p, g in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, g * min(1, 0.5 / norm))
    assert clipper.clipped == (norm > 0.5)


def test_norms_of_float32_neither_overflow_nor_underflow():
    w = nn.Parameter(torch.zeros(2))
    clipper = cures.GradientClipper([w], warmup=1)
    assert math.isclose(update(clipper, w, 1e25)[0], 1e25, rel_tol=1e-6)
    assert math.isclose(update(clipper, w, 1e-30)[0], 1e-30, rel_tol=1e-6)


def test_a_resumed_clipper_goes_on_as_if_it_had_never_stopped():
    w = nn.Parameter(torch.zeros(2))
    a = cures.GradientClipper([w], warmup=2)
    for norm in (1.0, 3.0, 2.0, 50.0):
        update(a, w, norm)
    b = cures.GradientClipper([w], warmup=2)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert (a.threshold, a.clipped) == (b.threshold, b.clipped)


def test_clipper_errors():
    w = nn.Parameter(torch.zeros(2))
    clipper = cures.GradientClipper([w])
    with pytest.raises(ValueError, match="none has a gradient"):
        clipper.clip_()
    w.grad = torch.tensor([math.nan, 1.0])
    with pytest.raises(ArithmeticError, match=r"NaN or infinity in parameters \[0\]"):
        clipper.clip_()
    assert len(clipper.norms) == 0
    with pytest.raises(ValueError, match=r"^parameters"):
        cures.GradientClipper([])
    with pytest.raises(ValueError, match=r"^quantile"):
        cures.GradientClipper([w], quantile=1.5)
    with pytest.raises(ValueError, match=r"^history, warmup"):
        cures.GradientClipper([w], warmup=5, history=2)


def unrolled_errors(cell, x, limit):
    """δ of a loop of torch's cell, clipped by hand: back from the last step, one step's graph at a time."""
    states, h = [], torch.zeros(x.shape[1], cell.hidden_size, dtype=x.dtype)
    for step in x:
        states.append(h)
        h = cell(step, h).detach()
    d, found = torch.ones_like(h), []
    for step, h0 in zip(reversed(x), reversed(states), strict=True):
        found.append(d)
        h0 = h0.clone().requires_grad_()
        (back,) = torch.autograd.grad(cell(step, h0), h0, d)
        d = back * (limit / back.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    return found[::-1], d


@pytest.mark.parametrize("kind", ["cell", "layer"])
def test_clipped_recurrence_is_the_loop_clipped_by_hand(kind):
    torch.manual_seed(0)
    cell = cures.orthogonal_(nn.RNNCell(2, 4), 3.0).double()
    x = torch.randn(12, 3, 2, dtype=torch.float64)
    errors, expected = unrolled_errors(cell, x, 0.7)
    norms = torch.stack(errors[:-1]).norm(dim=-1)
    assert bool((norms < 0.69).any())
    assert bool((norms > 0.7 - 1e-12).any())
    h0 = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    if kind == "cell":
        clipped = cures.clip_recurrence_(copy.deepcopy(cell), 0.7)
        h = h0
        for step in x:
            h = clipped(step, h)
    else:
        rnn = nn.RNN(2, 4).double()
        rnn.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
        assert cures.clip_recurrence_(rnn, 0.7) is rnn
        h = rnn(x, h0.unsqueeze(0))[1][0]
    (found,) = torch.autograd.grad(h.sum(), h0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert bool((found.norm(dim=-1) <= 0.7 + 1e-12).all())


def test_error_that_leaves_the_recurrence_is_not_clipped():
    cell = cures.clip_recurrence_(nn.RNNCell(2, 4), 1e-3)
    h = cell(torch.randn(3, 2))
    h.retain_grad()
    cell(torch.randn(3, 2), h)
    (h.sum() + 0 * cell(torch.randn(3, 2), h).sum()).backward()
    assert float(h.grad.norm()) > 1


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_forward_is_unchanged_and_the_bound_can_be_taken_off(kind):
    module = kind(2, 4)
    before, x = copy.deepcopy(module), torch.randn(3, 2)
    weights = dict(module.named_parameters())
    cures.clip_recurrence_(module, 1e-3)
    cures.clip_recurrence_(module, 1e-2)
    module = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    torch.testing.assert_close(module(x), before(x))
    cures.clip_recurrence_(module, None)
    assert not module._forward_pre_hooks
    assert dict(module.named_parameters()).keys() == weights.keys()
    if isinstance(module, nn.RNNBase):
        assert type(unn.restore(module)) is kind


@pytest.mark.parametrize("kind", [nn.RNN, nn.RNNCell])
def test_a_constrained_layer_is_clipped_too(kind):
    module = cures.clip_recurrence_(cures.constrain_(kind(2, 4), scale=9.0), 0.1)
    h = torch.zeros(3, 4, requires_grad=True)
    last = module(torch.zeros(1, 3, 2), h.unsqueeze(0))[1] if kind is nn.RNN else module(torch.zeros(3, 2), h)
    last.sum().backward()
    torch.testing.assert_close(h.grad.norm(dim=-1), torch.full((3,), 0.1))


def test_clip_recurrence_errors():
    with pytest.raises(ValueError, match="contains none"):
        cures.clip_recurrence_(nn.Linear(2, 2), 1.0)
    with pytest.raises(ValueError, match=r"^limit"):
        cures.clip_recurrence_(nn.RNN(2, 2), 0.0)
