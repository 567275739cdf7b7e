"""Exact tests of very long sequences: fewer samples, several steps exchanged in a pass, and the same verdicts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, mse_loss
from torch.nn.utils.rnn import pack_padded_sequence

import unvanish as uv
from tests.test_diagnosis_subject import subject
from unvanish.diagnosis import exact
from unvanish.diagnosis.exact import scale, testbench
from unvanish.diagnosis.exact.testbench import Bench
from unvanish.diagnosis.subject import Subject
from unvanish.diagnosis.trace import Trace
from unvanish.nn import torch_forward

T = 200


@pytest.fixture
def very_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of 200 steps count as very long."""
    monkeypatch.setattr(testbench, "VERY_LONG", T // 2)


def codes(model: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> tuple[set[str], tuple[str, ...]]:
    """(codes of the findings, notes)"""
    found, notes = exact.run(Subject(model, inputs, y, mse_loss))
    return {f.code for f in found}, notes


@pytest.mark.parametrize("batch_first", [False, True])
def test_few_samples_of_a_very_long_sequence_move_as_they_do_among_all(
    batch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 40, 3), torch.randn(20, 40, 2)
    if not batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)

    def reached() -> tuple[Bench, Tensor]:
        torch.manual_seed(1)
        bench = Bench(subject(x, y, batch_first=batch_first))
        assert bench.reach is not None
        return bench, bench.reach[1]

    monkeypatch.setattr(testbench, "FEW", testbench.SAMPLES)
    all_of_them, every = reached()
    monkeypatch.setattr(testbench, "VERY_LONG", 30)
    bench, few = reached()
    assert bench.count == 12
    # Samples 1 and 2 get their steps from the same donors in both.
    both = sorted({*bench.probed} & {*all_of_them.probed})
    torch.testing.assert_close(few[1:3, both], every[1:3, both])
    assert (few[:3, bench.probed] > 0).all()
    assert (few[3:] == 0).all()


class AtItsOwnEnd(nn.Module):
    def __init__(self, lengths: Tensor) -> None:
        super().__init__()
        self.rnn, self.head, self.lengths = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 1), lengths

    def forward(self, x: Tensor) -> Tensor:
        last = (x != 0).any(-1).sum(1) - 1
        return self.head(self.rnn(x)[0][torch.arange(len(x)), last])


@pytest.mark.usefixtures("very_long")
def test_samples_that_end_early_are_not_read_as_dropped_steps() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([140, 150, 145, 200, 200, 190, 120, 200])
    x = torch.randn(8, T, 3) * (torch.arange(T)[None, :, None] < lengths[:, None, None])
    assert "readout" not in codes(AtItsOwnEnd(lengths), (x,), torch.randn(8, 1))[0]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(x[:, -20:])[0][:, -1]))


@pytest.mark.usefixtures("very_long")
def test_steps_of_samples_that_depend_on_each_other_are_exchanged_one_in_a_pass() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, T, 3), torch.randn(8, 1)
    assert Bench(Subject(Normed(), (x,), y, mse_loss)).exchanged == 6
    assert "state_cut" not in codes(Normed(), (x,), y)[0]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.rnn(pack_padded_sequence(x, lengths.cpu(), batch_first=True))[1][-1])


@pytest.mark.usefixtures("very_long")
def test_sorted_lengths_stay_sorted() -> None:
    torch.manual_seed(0)
    x, lengths = torch.randn(8, T, 3), torch.tensor([200, 200, 190, 180, 170, 150, 140, 120])
    bench = Bench(Subject(Packed(), (x, lengths), torch.randn(8, 1), mse_loss))
    assert bench.exchanged == 3
    assert bench.reach is not None


@pytest.mark.usefixtures("very_long")
def test_a_state_that_is_cut_is_found_in_a_very_long_sequence() -> None:
    class Cut(Packed):
        def forward(self, x: Tensor) -> Tensor:
            _, h = self.rnn(x[:, :190])
            return self.head(self.rnn(x[:, 190:], h.detach())[1][-1])

    torch.manual_seed(0)
    assert "state_cut" in codes(Cut(), (torch.randn(8, T, 3),), torch.randn(8, 1))[0]


@pytest.mark.usefixtures("very_long")
def test_neither_classes_nor_packed_rows_are_steps() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.rnn, self.head = nn.Embedding(300, 4), nn.GRU(4, 8), nn.Linear(8, 300)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.embedding(x).transpose(0, 1))[0]).permute(1, 2, 0)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 8), nn.Linear(8, 1)

        def forward(self, packed: Any) -> Tensor:
            return self.head(self.rnn(packed)[1][-1])

    ids = torch.randint(300, (64, 9))
    assert Bench(Subject(Words(), (ids,), ids, cross_entropy)).count == 12
    packed = pack_padded_sequence(torch.randn(20, 64, 3), torch.full((64,), 20))
    assert Bench(Subject(Reader(), (packed,), torch.randn(64, 1), mse_loss)).count == 12


def test_a_share_of_many_steps_is_drawn_from_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "DRAWN", 64)
    torch.manual_seed(0)
    x, y = torch.randn(64, 8, 3), torch.randn(64, 8, 2)
    x[:, 0] *= 1000
    assert scale.input_scale(Bench(subject(x, y))) == []
    assert scale.input_scale(Bench(subject(1000 * x, y)))[0].code == "input_scale"


def test_dropout_of_evaluation_alone_is_found() -> None:
    class Backwards(Packed):
        def forward(self, x: Tensor) -> Tensor:
            h = self.rnn(x)[1][-1]
            return self.head(h if self.training else dropout(h, 0.5))

    assert "regularised_away" in codes(Backwards(), (torch.randn(8, 5, 3),), torch.randn(8, 1))[0]


def test_a_traced_layer_of_ours_stays_on_the_engine_and_its_error_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = uv.nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(RuntimeError):
                self.rnn(x[..., :2])
            return torch.relu(self.rnn(x)[0])

    def refuse(*_: Any) -> Any:
        raise AssertionError("torch's own kernel ran")

    monkeypatch.setitem(torch_forward._KERNELS, "LSTM", refuse)
    model = Tries()
    with Trace(model) as trace:
        model(torch.randn(20, 2, 3))
    assert [c.name for c in trace.functions] == ["relu"]
    assert trace.functions[0].path == ""
    assert [c.path for c in trace.modules] == ["", "rnn", "rnn"]
