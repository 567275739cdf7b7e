"""The auxiliary loss asks the state at its anchors, and makes it hold what was read."""

import pytest
import torch
from torch import nn

from unvanish import cures


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [None, [12, 5, 3, 9]])
def test_error_arrives_at_the_anchors_alone_and_every_one_may_be_drawn(lengths):
    torch.manual_seed(0)
    aux, x = cures.Reconstruction(6, 2, length=4, anchors=2), noise(12, 4, 2)
    states, hit = noise(12, 4, 6, seed=1).requires_grad_(), torch.zeros(12, 4)
    for seed in range(150):
        loss = aux(states, x, lengths, torch.Generator().manual_seed(seed))
        (d,) = torch.autograd.grad(loss, states)
        here = d.any(-1)
        assert int(here.sum()) <= 8
        hit += here
    ends = [12] * 4 if lengths is None else lengths
    expected = torch.tensor([[3 <= t < end for end in ends] for t in range(12)])
    assert torch.equal(hit > 0, expected)


def test_value_is_the_decoders_error_on_the_steps_before_the_anchor():
    torch.manual_seed(0)
    aux, x, states = cures.Reconstruction(6, 2, length=3), noise(3, 1, 2), noise(3, 1, 6, seed=1)
    given = torch.cat([torch.zeros(1, 1, 2), x[:-1]])
    hidden, _ = aux.decoder(given, aux.start(states[-1:]))
    torch.testing.assert_close(aux(states, x), (aux.out(hidden) - x).square().mean())
    tokens = cures.Reconstruction(6, 5, length=3, tokens=True)
    ids = torch.tensor([[4], [0], [2]])
    one_hot = nn.functional.one_hot(ids, 5).float()
    hidden, _ = tokens.decoder(torch.cat([torch.zeros(1, 1, 5), one_hot[:-1]]), tokens.start(states[-1:]))
    expected = -tokens.out(hidden).log_softmax(-1)[torch.arange(3), 0, ids[:, 0]].mean()
    torch.testing.assert_close(tokens(states, ids), expected)


def test_batch_first_is_the_same_loss():
    torch.manual_seed(0)
    aux, x, states = cures.Reconstruction(6, 2, length=3, anchors=3), noise(8, 4, 2), noise(8, 4, 6, seed=1)
    seed = torch.Generator
    expected = aux(states, x, None, seed().manual_seed(1))
    aux.batch_first = True
    torch.testing.assert_close(aux(states.transpose(0, 1), x.transpose(0, 1), None, seed().manual_seed(1)), expected)


def test_training_on_it_makes_the_state_hold_its_inputs():
    torch.manual_seed(0)
    rnn, aux = nn.GRU(1, 32), cures.Reconstruction(32, 1, length=3, anchors=4)
    optimizer = torch.optim.Adam([*rnn.parameters(), *aux.parameters()], lr=1e-2)
    losses = []
    for seed in range(250):
        x = noise(10, 16, 1, seed=seed)
        loss = aux(rnn(x)[0], x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) / 20 < 0.4 < 0.8 < losses[0]


def test_reconstruction_errors():
    with pytest.raises(ValueError, match="length: expected a whole"):
        cures.Reconstruction(4, 2, 0)
    aux = cures.Reconstruction(4, 2, 5)
    with pytest.raises(ValueError, match="x: expected"):
        aux(noise(6, 2, 4), noise(5, 2, 2))
    with pytest.raises(ValueError, match="longest sample"):
        aux(noise(4, 2, 4), noise(4, 2, 2))
