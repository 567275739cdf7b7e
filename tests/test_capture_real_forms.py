"""Forms of recurrent models that packages build, reduced to a few lines each."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unvanish as uv
from unvanish.flow.record import NoBackwardError

X = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LENGTHS = [2, 6, 4]


def unrolled(cell: nn.LSTMCell, lengths: list[int], steps: int) -> tuple[Tensor, list[list[Tensor]]]:
    """Encoder and decoder, one sample after another; the states of each, with their gradient."""
    out, kept = [], []
    for b, n in enumerate(lengths):
        hs, state = list[Tensor](), None
        for x in [*X[:n, b], *X[:steps, b].flip(0)]:
            state = cell(x, state)
            state[0].retain_grad()
            hs.append(state[0])
        kept.append(hs)
        out += hs[n:]
    return torch.stack(out).square().sum(), kept


@pytest.mark.parametrize("family", [nn, uv.nn])
@pytest.mark.parametrize("resets", [False, True])
def test_a_decoder_goes_on_from_samples_of_different_lengths(family: Any, resets: bool) -> None:
    torch.manual_seed(0)
    lstm, cell = family.LSTM(4, 5).double(), nn.LSTMCell(4, 5).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    with uv.watch(lstm) as flow:
        _, state = lstm(pack_padded_sequence(X, torch.tensor(LENGTHS), enforce_sorted=False))
        if resets:
            keep = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)[:, None]
            state = tuple(keep * s for s in state)
        lstm(X[:3].flip(0), state)[0].square().sum().backward()
    record = flow["l0"]
    assert record.valid
    assert record.lengths.tolist() == [n + 3 for n in LENGTHS]
    if resets:
        assert [list(piece) for piece in record.pieces(0)] == [[0, 1], [2, 3, 4]]
        assert not record.dh[:2, 0].any()
        return
    loss, states = unrolled(cell, LENGTHS, 3)
    loss.backward()
    for b, hs in enumerate(states):
        norms = torch.stack([h.grad.norm() for h in hs])  # type: ignore[union-attr]
        torch.testing.assert_close(record.dh[: len(hs), b], norms)
        assert not record.dh[len(hs) :, b].any()
    assert record.gates is not None
    assert not record.gates[: min(record.lengths)].isnan().any()
    assert record.to_dataframe()["dh"].gt(0).all()


@pytest.mark.parametrize("family", [nn, uv.nn])
def test_a_cut_after_samples_of_different_lengths_starts_a_pass(family: Any) -> None:
    lstm = family.LSTM(4, 5).double()
    with uv.watch(lstm) as flow:
        y, (h, c) = lstm(pack_padded_sequence(X, torch.tensor(LENGTHS), enforce_sorted=False))
        (y.data.sum() + lstm(X[:3], (h.detach(), c.detach()))[0].sum()).backward()
    assert [record.lengths.tolist() for record in flow.passes("l0")] == [LENGTHS, [3, 3, 3]]
    assert all(record.valid and not record.detached for record in flow.passes("l0"))


@pytest.mark.parametrize("family", [nn, uv.nn])
def test_a_decoder_that_drops_finished_samples_is_recorded_call_by_call(family: Any) -> None:
    gru = family.GRU(4, 5).double()
    with uv.watch(gru) as flow:
        y, h = gru(X)
        y, h = gru(X[:2, :2], h[:, :2])
        y.square().sum().backward()
    encoder, decoder = flow.passes("l0")
    assert (encoder.dh.shape, decoder.dh.shape) == ((6, 3), (2, 2))
    assert encoder.valid
    assert decoder.valid
    assert encoder.dh[:, :2].gt(0).all()
    assert not encoder.dh[:, 2].any()
    assert not flow.skipped


def test_a_cell_that_drops_finished_samples_is_recorded_piece_by_piece() -> None:
    cell, h, states = nn.GRUCell(4, 5).double(), torch.zeros(3, 5).double(), list[Tensor]()
    with uv.watch(cell) as flow:
        for x, b in zip(X, (3, 3, 2, 2, 1, 1), strict=True):
            h = cell(x[:b], h[:b])
            h.retain_grad()
            states.append(h)
        h.square().sum().backward()
    assert [record.dh.shape for record in flow.passes("cell")] == [(2, 3), (2, 2), (2, 1)]
    norms = [n for record in flow.passes("cell") for n in record.dh[:, 0].tolist()]
    torch.testing.assert_close(norms, [float(s.grad[0].norm()) for s in states])  # type: ignore[index]


class Own(nn.LSTM):
    """torch's parameters, and a loop of its own."""

    def forward(self, x: Tensor, hx: Any = None) -> Tensor:  # type: ignore[override]
        h = x.new_zeros(x.shape[1], self.hidden_size)
        for row in x:
            h = (row @ self.weight_ih_l0.T + h @ self.weight_hh_l0.T)[:, : self.hidden_size].tanh()
        return h


class Loop(nn.Module):
    """Layers of cells, whose states are stacked and taken apart again at every step."""

    def __init__(self, cell: nn.Module, direct: bool = False) -> None:
        super().__init__()
        self.cell, self.direct = cell, direct

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(1, x.shape[1], 5)
        for row in x:
            h = self.cell.forward(row, state[0]) if self.direct else self.cell(row, state[0])
            state = torch.stack([h])
        return state[0]


class Minimal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(9, 5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return 0.5 * h + self.w(torch.cat([x, h], 1)).tanh()


def test_a_subclass_with_a_loop_of_its_own_is_named() -> None:
    model = nn.ModuleDict({"own": Own(4, 5), "rnn": nn.RNN(4, 5)}).double()
    with uv.watch(model) as flow:
        (model["own"](X).sum() + model["rnn"](X)[0].sum()).backward()
    assert list(flow) == ["rnn.l0"]
    assert list(flow.skipped) == ["own"]
    assert "computes the recurrence by itself" in flow.skipped["own"]
    alone = Own(4, 5).double()
    with uv.watch(alone) as flow:
        alone(X).sum().backward()
    assert list(flow.skipped) == [""]
    for layer in (nn.LSTM(4, 5), uv.nn.GRU(4, 5)):
        with uv.watch(layer) as flow:
            layer(X.float())[0].sum().backward()
        assert not flow.skipped


def test_a_loop_whose_states_are_stacked_is_named_and_recorded_by_name() -> None:
    net = Loop(Minimal()).double()
    with uv.watch(nn.ModuleDict({"net": net, "rnn": nn.RNN(4, 5)})) as flow:
        net(X).sum().backward()
    assert list(flow.skipped) == ["net.cell"]
    assert "name it in states=" in flow.skipped["net.cell"]
    with uv.watch(net, states={"cell": lambda module, args, out: out}) as flow:
        net(X).sum().backward()
    assert flow["cell"].dh.shape == (6, 3)
    assert not flow.skipped


def test_a_named_state_whose_forward_is_called_directly_is_told() -> None:
    net = Loop(Minimal(), direct=True).double()
    with uv.watch(net, states={"cell": lambda module, args, out: out}) as flow:
        assert not flow.skipped
        net(X).sum().backward()
    assert "called directly" in flow.skipped["cell"]
    with pytest.raises(NoBackwardError, match="called directly"):
        flow["cell"]


def test_states_of_a_watched_cell_that_is_stepped_make_one_pass() -> None:
    cell = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()
    states: dict[str, Any] = {"1": lambda module, args, out: out}
    with uv.watch(cell, states=states) as flow:
        for steps in (6, 4):
            h = torch.ones(3, 5, dtype=torch.float64)
            for _ in range(steps):
                h = uv.mark(cell(h), "mine")
            h.sum().backward()
    for name in ("1", "mine"):
        assert [len(record.dh) for record in flow.passes(name)] == [6, 4]
    with uv.watch(cell) as flow:
        sum(uv.mark(cell(torch.ones(3, 5, dtype=torch.float64)), "mine").sum() for _ in range(2)).backward()
    assert [len(record.dh) for record in flow.passes("mine")] == [1, 1]


def test_watches_within_one_another_each_see_where_a_state_goes_on() -> None:
    gru, h = nn.GRUCell(4, 5).double(), torch.zeros(3, 5).double()
    with uv.watch(gru) as outer, uv.watch(gru) as inner:
        for x in X:
            h = 0.5 * gru(x, h)
        h.sum().backward()
    assert outer["cell"].dh.shape == inner["cell"].dh.shape == (6, 3)
