"""A replaced RNN keeps its options, and callers who knew only h keep working, without losing c."""

import copy
import pickle

import pytest
import torch
from torch import nn

import unvanish as uv
from unvanish import cures
from unvanish import nn as unn


class Caller(nn.Module):
    """Unpacks, indexes and feeds on h as users of nn.RNN do."""

    def __init__(self, **options):
        super().__init__()
        self.rnn = nn.RNN(3, 4, num_layers=2, **options)
        self.head = nn.Linear(4, 1)

    def forward(self, x, h=None):
        y, h = self.rnn(x, h)
        return self.head(y), self.head(h[-1]), h


@pytest.mark.parametrize("by", ["lstm", "gru"])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True, "dtype": torch.float64}, {"bias": False, "dropout": 0.3}, {"bidirectional": True}],
)
def test_options_are_kept(by, options):
    model = nn.Sequential(nn.RNN(3, 4, num_layers=2, **options)).eval()
    old = model[0]
    assert cures.replace_(model, by) is model
    new = model[0]
    assert isinstance(new.inner if by == "lstm" else new, nn.LSTM if by == "lstm" else nn.GRU)
    for name in (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "training",
    ):
        assert getattr(new, name) == getattr(old, name)
    assert new.weight_ih_l0.dtype == old.weight_ih_l0.dtype
    x = torch.randn(2, 5, 3, dtype=old.weight_ih_l0.dtype)
    for a, b in zip(new(x), old(x), strict=True):
        assert a.shape == b.shape


@pytest.mark.parametrize("by", ["lstm", "gru"])
def test_callers_keep_working_and_the_gradient_flows(by):
    model = cures.replace_(Caller(), by)
    y, last, h = model(torch.randn(6, 2, 3))
    assert y.shape == (6, 2, 1)
    assert last.shape == (2, 1)
    assert type(last) is torch.Tensor
    (y.sum() + last.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert h.shape == (2, 2, 4)


def test_chunks_are_the_whole_sequence():
    torch.manual_seed(0)
    model = cures.replace_(Caller(), "lstm")
    lstm = nn.LSTM(3, 4, num_layers=2)
    lstm.load_state_dict(model.rnn.inner.state_dict())
    x = torch.randn(9, 2, 3)
    whole, (_, c) = lstm(x)
    _, _, h = model(x[:4])
    _, _, h = model(x[4:6], h.detach())
    y, h = model.rnn(x[6:], h)
    torch.testing.assert_close(y, whole[6:])
    torch.testing.assert_close(h.others[0], c)


def test_loop_of_a_cell_is_the_lstm_cells():
    torch.manual_seed(1)
    model = cures.replace_(nn.ModuleDict({"cell": nn.RNNCell(3, 4)}), "lstm")
    plain = nn.LSTMCell(3, 4)
    plain.load_state_dict(model["cell"].inner.state_dict())
    x, h, pair = torch.randn(7, 2, 3), torch.zeros(2, 4), (torch.zeros(2, 4), torch.zeros(2, 4))
    for step in x:
        h, pair = model["cell"](step, h), plain(step, pair)
    torch.testing.assert_close(h.as_subclass(torch.Tensor), pair[0])
    torch.testing.assert_close(h.others[0], pair[1])
    assert isinstance(cures.replace_(nn.RNNCell(3, 4), "gru"), nn.GRUCell)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.detach(),
        lambda s: s.clone(),
        lambda s: s.data,
        lambda s: s.to(torch.float64),
        lambda s: s[:, [1, 0]],
        lambda s: s.index_select(1, torch.tensor([1])),
        lambda s: s * torch.tensor([[1.0], [0.0]]),
        lambda s: torch.where(torch.tensor([[True], [False]]), s, 0.0),
        lambda s: torch.cat([s, s], 1),
        lambda s: s.mul_(0.5),
    ],
)
def test_what_is_done_to_h_is_done_to_c(change):
    rnn = cures.replace_(nn.RNN(3, 4), "lstm")
    with torch.no_grad():
        _, h = rnn(torch.randn(5, 2, 3))
    c = h.others[0].clone()
    changed = change(h)
    torch.testing.assert_close(changed.others[0], change(c))


def test_an_initial_state_of_ones_own_starts_with_c_zero():
    rnn = cures.replace_(nn.RNN(3, 4), "lstm")
    x, h0 = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    torch.testing.assert_close(rnn(x, h0)[0], rnn(x, (h0, torch.zeros_like(h0)))[0])


def test_state_dict_copy_and_pickle():
    model = cures.replace_(Caller(), "lstm")
    x = torch.randn(5, 2, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x)[0], model(x)[0])
    other = cures.replace_(Caller(), "lstm")
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x)[0], model(x)[0])


def test_a_shared_layer_is_replaced_everywhere_by_one():
    rnn = nn.RNN(4, 4)
    model = cures.replace_(nn.ModuleDict({"a": rnn, "b": nn.Sequential(rnn), "gru": nn.GRU(4, 4)}), "lstm")
    assert model["a"] is model["b"][0]
    assert isinstance(model["gru"], nn.GRU)


@pytest.mark.parametrize("by", ["lstm", "gru"])
def test_other_cures_and_measures_find_the_new_layer(by):
    torch.manual_seed(2)
    model = cures.chrono_(cures.replace_(Caller(), by), 20)
    unn.accelerate(model)
    x = torch.randn(6, 2, 3)
    with uv.watch(model) as flow, cures.Omega(model) as omega:
        _, _, h = model(x)
        model(x, h)[0].sum().backward()
    omega.penalty().backward()
    assert all(layer.problem is None for layer in flow.values())


def test_replace_errors():
    with pytest.raises(ValueError, match=r"^by"):
        cures.replace_(nn.RNN(2, 3), "hopfield")
    with pytest.raises(ValueError, match="has none"):
        cures.replace_(nn.LSTM(2, 3), "gru")
    with pytest.raises(TypeError, match=r"^by"):
        cures.replace_(nn.RNN(2, 3), nn.GRU)
    with pytest.raises(ValueError, match="restore"):
        cures.replace_(unn.RNN(2, 3), "gru")
    hooked = nn.RNN(2, 3)
    hooked.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="hooks"):
        cures.replace_(hooked, "gru")


@pytest.mark.parametrize("name", list(uv.cells.ZOO))
def test_every_cell_of_the_zoo_takes_an_rnns_place(name):
    torch.manual_seed(3)
    model, x = cures.replace_(Caller(), name), torch.randn(7, 2, 3)
    y, last, _ = model(x)
    assert (y.shape, last.shape) == ((7, 2, 1), (2, 1))
    first, state = model.rnn(x[:4])
    second, end = model.rnn(x[4:], state.detach())
    whole, last = model.rnn(x)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(end.as_subclass(torch.Tensor), last.as_subclass(torch.Tensor))
    cell = cures.replace_(nn.RNNCell(3, 4), name)
    h = cell(x[0])
    for step in x[1:]:
        h = cell(step, h)
    assert h.shape == (2, 4)
    h.sum().backward()


def test_a_single_step_is_a_step_of_the_layer():
    torch.manual_seed(0)
    cell, layer = cures.replace_(nn.RNNCell(3, 4), "peephole"), unn.Recurrent(uv.cells.ZOO["peephole"](), 3, 4)
    layer.load_state_dict(cell.inner.layer.state_dict())
    x, h = torch.randn(6, 2, 3), None
    for step in x:
        h = cell(step, h)
    torch.testing.assert_close(h.as_subclass(torch.Tensor), layer(x)[0][-1])
    torch.testing.assert_close(h.others[0], layer(x)[1][1][0])
    alone = cell(x[0, 0])
    assert alone.shape == (4,)


def test_a_state_that_does_not_start_at_zero_starts_as_the_cell_says():
    rnn = cures.replace_(nn.RNN(3, 4), "slstm")
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(rnn(x, torch.zeros(1, 2, 4))[0], rnn(x)[0])


@pytest.mark.parametrize("by", ["lstm", "mgu"])
def test_a_recurrent_of_a_plain_cell_is_replaced_with_its_options(by):
    plain = unn.Recurrent(uv.cells.TanhRNN(), 3, 4, num_layers=2, bidirectional=True, batch_first=True)
    plain.clip = 0.5
    new = cures.replace_(plain, by)
    layer = new.inner if by == "lstm" else new
    assert (layer.num_layers, layer.bidirectional, layer.batch_first, layer.clip) == (2, True, True, 0.5)
    y, _ = new(torch.randn(2, 5, 3), lengths=[5, 3])
    assert not y[1, 3:].any()


def test_a_cell_of_ones_own():
    new = cures.replace_(nn.ModuleList([nn.RNN(3, 4)]), uv.cells.ZOO["leaky"](alpha=0.03))
    assert new[0].cell.alpha == 0.03
