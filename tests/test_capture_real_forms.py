"""Forms of recurrent models that packages build, reduced to a few lines each."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unvanish as uv

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
