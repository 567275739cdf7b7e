"""Watching a whole training: one step in N, on disk, in bounded memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unvanish as uv
from unvanish.flow.record import NoBackwardError


class Model(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][-1])


def train(model: nn.Module, steps: int, backwards: int = 1) -> None:
    for step in range(steps):
        loss = model(torch.full((4, 2, 2), float(step))).square().mean()
        for i in range(backwards):
            loss.backward(retain_graph=i < backwards - 1)


@pytest.mark.parametrize("family", [nn.LSTM, uv.nn.LSTM])
def test_one_step_in_three(family: type[nn.LSTM]) -> None:
    model = Model(family(2, 3))
    with uv.watch(model, every=3, keep=10) as flow:
        train(model, 8)
        with torch.no_grad():
            model(torch.zeros(4, 2, 2))
    assert [record.step for record in flow.passes("layer.l0")] == [1, 4, 7]


def test_the_other_steps_leave_nothing_behind() -> None:
    model = Model(nn.LSTM(2, 3))
    with uv.watch(model, every=5, keep=10) as flow:
        train(model, 1)
        recorded = len(flow._sequences)
        y = [model(torch.zeros(4, 2, 2)) for _ in range(3)]
        assert len(flow._sequences) <= recorded
        assert not flow.on
        del y
    assert len(flow.passes("layer.l0")) == 1


def test_the_model_may_be_a_layer() -> None:
    lstm = nn.LSTM(2, 3)
    with uv.watch(lstm, every=2) as flow:
        for _ in range(4):
            lstm(torch.zeros(4, 2, 2))[0].sum().backward()
    assert [record.step for record in flow.passes("l0")] == [1, 3]


def test_every_needs_the_model_itself_to_be_called() -> None:
    model = Model(nn.LSTM(2, 3))
    with uv.watch(model, every=2) as flow:
        model.layer(torch.zeros(4, 2, 2))[0].sum().backward()
    assert "only its parts are called" in flow.skipped["layer"]


def test_a_stream_is_read_back_in_order(tmp_path: Path) -> None:
    model = Model(nn.LSTM(2, 3))
    with uv.watch(model, every=2, stream=tmp_path / "run", keep=1) as flow:
        train(model, 5, backwards=2)
    found = list(uv.flow.read_stream(tmp_path / "run"))
    assert [record["layer.l0"].step for record in found] == [1, 1, 3, 3, 5, 5]
    assert torch.equal(found[-1]["layer.l0"].dh, flow["layer.l0"].dh)
    assert torch.allclose(2 * found[-2]["layer.l0"].dh, found[-1]["layer.l0"].dh)
    with pytest.raises(FileExistsError, match="not empty"):
        uv.watch(model, stream=tmp_path / "run")


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has none"):
        uv.flow.read_stream(tmp_path)


def test_nothing_recorded_is_an_error() -> None:
    model = Model(nn.LSTM(2, 3))
    with uv.watch(model, every=4) as flow:
        model(torch.zeros(4, 2, 2))
    with pytest.raises(NoBackwardError):
        flow["layer.l0"]


def test_a_watched_loop_does_not_grow() -> None:
    import gc

    lstm, x = nn.LSTM(2, 3), torch.randn(4, 2, 2)
    counts = []
    with uv.watch(lstm) as flow:
        for step in range(60):
            lstm(x)[0].sum().backward()
            if step % 20 == 19:
                gc.collect()
                counts.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]
    assert len(flow.passes("l0")) == 8
