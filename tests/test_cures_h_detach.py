"""h-detach blocks the matrices' paths at the steps it drew, and touches nothing else."""

import copy

import pytest
import torch
from torch import nn

import unvanish as uv
from unvanish import cures, engine

CARRYING = [
    name for name, kind in uv.cells.ZOO.items() if (cell := kind()).carries and cell.sources and name not in ("lif",)
]
"""the spiking cell's surrogate makes a reference of its own; see test_conformance"""


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recurrent(name, **options):
    torch.manual_seed(1)
    return uv.nn.Recurrent(uv.cells.ZOO[name](), 2, 3, dtype=torch.float64, **options)


def unrolled(layer, x, cut):
    """A user's own loop: what the matrices read is detached at the cut steps."""
    w, cell = layer.direction_weights(0, False), layer.cell
    state, y = cell.start(x[0], (layer.hidden_size,) * len(cell.states)), []
    for t, p in enumerate(cell.project(x, w)):
        read = tuple(s.detach() for s in state) if cut[t] else state
        q = cell.recur(read, w)
        new = cell.evaluate(p, q, state, w.v)
        state = cell.evaluate(p, cell.completed(q, new, w), state, w.v) if cell.same_step else new
        y.append(state[0])
    return torch.stack(y), state


@pytest.mark.parametrize("rung", ["manual", "reference"])
@pytest.mark.parametrize("name", CARRYING)
def test_is_the_loop_that_detaches_what_the_matrices_read(name, rung):
    layer, x = recurrent(name), noise(9, 2, 2).requires_grad_()
    cut = torch.rand(9, generator=torch.Generator().manual_seed(4)) < 0.5
    assert 0 < int(cut.sum()) < 9
    w, inputs = layer.direction_weights(0, False), [x, *layer.parameters()]
    start = layer.cell.start(x[0], (3,) * len(layer.cell.states))
    found = engine.run(layer.cell, x, start, w, rung=rung, cut=cut)[0]
    expected = unrolled(layer, x, cut)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    d = noise(*found.shape, seed=1)
    grads = [torch.autograd.grad(y, inputs, d, allow_unused=True, materialize_grads=True) for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    uncut = torch.autograd.grad(layer(x)[0], inputs, d, allow_unused=True, materialize_grads=True)
    assert not torch.allclose(uncut[0], grads[0][0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_at_p_1_the_error_keeps_the_product_of_the_carries(kind):
    torch.manual_seed(0)
    layer, x = cures.h_detach_(kind(2, 4).double(), 1.0), noise(12, 1, 2)
    memory = "c" if kind is nn.LSTM else "h"
    states = {s: torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True) for s in layer_states(kind)}
    _, final = layer(x, tuple(states.values()) if kind is nn.LSTM else states["h"])
    end = final[1] if kind is nn.LSTM else final
    (found,) = torch.autograd.grad(end.sum(), states[memory])
    gate = layer.states(x)["l0"].gates["f" if kind is nn.LSTM else "z"]
    torch.testing.assert_close(found[0], gate.prod(0), rtol=1e-10, atol=0)


def layer_states(kind):
    return ("h", "c") if kind is nn.LSTM else ("h",)


def test_the_draw_is_torchs_and_can_be_replayed_in_every_layer_and_direction():
    torch.manual_seed(0)
    layer, x = cures.h_detach_(nn.LSTM(2, 3, 2, bidirectional=True).double(), 0.5), noise(20, 2, 2)

    def gradient(seed):
        torch.manual_seed(seed)
        return torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))

    torch.testing.assert_close(gradient(1), gradient(1), rtol=0, atol=0)
    assert not torch.equal(gradient(1)[0], gradient(2)[0])
    torch.manual_seed(1)
    cuts = [torch.rand(20) < 0.5 for _ in range(4)]
    plain = copy.deepcopy(layer)
    plain.h_detach = None
    y, layers = x, uv.nn.modules.layer_directions(plain)
    for first in (0, 2):
        here = [
            engine.run(d.cell, y, (y.new_zeros(2, 3),) * 2, d.weights, None, d.reverse, cut=cut)[0]
            for d, cut in zip(layers[first : first + 2], cuts[first : first + 2], strict=True)
        ]
        y = torch.cat(here, -1)
    expected = torch.autograd.grad(y.square().sum(), list(plain.parameters()))
    torch.testing.assert_close(gradient(1), expected, rtol=1e-10, atol=1e-12)


def test_a_hooked_cell_reads_h_without_its_graph():
    torch.manual_seed(0)
    cell, x = cures.h_detach_(nn.LSTMCell(2, 3).double(), 0.5), noise(10, 2, 2)
    torch.manual_seed(7)
    cuts = [bool(torch.rand(()) < 0.5) for _ in x]
    found = []
    for hooked in (True, False):
        torch.manual_seed(7)
        twin = cell if hooked else cures.h_detach_(copy.deepcopy(cell), None)
        h = c = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        for step, cut in zip(x, cuts, strict=True):
            h, c = twin(step, (h.detach() if cut and not hooked else h, c))
        found.append(torch.autograd.grad(h.sum(), list(twin.parameters())))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lstm", "mgu"])
def test_watch_and_audit_see_the_gradient_that_was_handed_back(name):
    layer = cures.h_detach_(recurrent(name, num_layers=2, dropout=0.2), 0.5)
    model, x = nn.Sequential(layer), noise(12, 3, 2)
    with uv.watch(model) as flow:
        model(x)[0].square().sum().backward()
    assert all(record.residual < 1e-9 for record in flow.values())
    if name == "lstm":
        report = uv.audit(nn.Sequential(cures.h_detach_(nn.LSTM(2, 3), 0.5)), x.float(), loss=lambda out: out[0].sum())
        assert report.worst < 1e-4


def test_only_in_training_and_can_be_taken_off():
    torch.manual_seed(0)
    lstm, x = nn.LSTM(2, 3).double(), noise(10, 2, 2)

    def gradient():
        return torch.autograd.grad(lstm(x)[0].sum(), lstm.weight_hh_l0)[0]

    exact = gradient()
    cures.h_detach_(lstm, 1.0)
    assert not torch.allclose(gradient(), exact)
    torch.testing.assert_close(lstm.eval() and gradient(), exact)
    cures.h_detach_(lstm.train(), None)
    torch.testing.assert_close(gradient(), exact)
    uv.restore(lstm)
    assert type(lstm) is nn.LSTM


def test_h_detach_errors():
    model = nn.ModuleList([nn.LSTM(2, 3), nn.RNN(2, 3)])
    with pytest.raises(TypeError, match=r"1_l0.*carries nothing.*TruncatedBPTT"):
        cures.h_detach_(model, 0.5)
    assert type(model[0]) is nn.LSTM
    with pytest.raises(TypeError, match="no recurrent matrix"):
        cures.h_detach_(recurrent("mingru"), 0.5)
    with pytest.raises(TypeError, match="carries nothing"):
        cures.h_detach_(nn.RNNCell(2, 3), 0.5)
    with pytest.raises(ValueError, match=r"^p: expected a probability"):
        cures.h_detach_(nn.LSTM(2, 3), 1.5)
