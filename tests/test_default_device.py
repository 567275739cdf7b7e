"""With another default device than the CPU, as `torch.set_default_device("cuda")` sets it: what is measured of a model
stays where the model is. The default here is the meta device, on which no number can be read."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unvanish as uv
from tests.test_other_device import MEASUREMENTS
from unvanish.cells import ZOO
from unvanish.flow import kernel_rows

T, B, LENGTHS = 7, 3, [7, 5, 4]
LAYERS: dict[str, Callable[[], Any]] = {
    "lstm": lambda: nn.LSTM(3, 4),
    "stack": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(3, 4),
    "ours": lambda: uv.nn.LSTM(3, 4),
    "peephole": lambda: uv.nn.Recurrent(ZOO["peephole"](), 3, 4),
}
every_layer = pytest.mark.parametrize("name", list(LAYERS))


def same_elsewhere(measured: Callable[[], Any]) -> None:
    """`measured()` is the same with another default device."""
    expected = _tensors(measured())
    with torch.device("meta"):
        found = _tensors(measured())
    assert expected
    for name, v in expected.items():
        assert found[name].device.type == "cpu", name
        torch.testing.assert_close(found[name], v, rtol=0, atol=0, equal_nan=True, msg=name)


def _tensors(record: Any) -> dict[str, Tensor]:
    if isinstance(record, Tensor):
        return {"": record}
    parts = record if isinstance(record, dict) else {} if record is None else vars(record)
    return {k: v for k, v in parts.items() if isinstance(v, Tensor)}


def made(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return LAYERS[name](), torch.randn(T, B, 3)


@every_layer
@pytest.mark.parametrize("packed", [False, True])
def test_a_watched_step(name: str, packed: bool) -> None:
    layer, x = made(name)
    given = pack_padded_sequence(x, torch.tensor(LENGTHS)) if packed else x

    def step() -> Any:
        with uv.watch(layer) as flow:
            y = layer(given)[0]
            (y.data if packed else y).square().sum().backward()
        assert flow["l0"].valid
        assert len(flow["l0"].to_dataframe()) == (sum(LENGTHS) if packed else T * B)
        return flow["l0"]

    same_elsewhere(step)


@every_layer
@pytest.mark.parametrize("what", list(MEASUREMENTS))
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_measurements(name: str, what: str, lengths: Any) -> None:
    layer, x = made(name)
    same_elsewhere(lambda: MEASUREMENTS[what](layer, x, lengths=lengths))


@every_layer
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_a_map_of_many_sources(name: str, lengths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_rows, "FEW", 0)
    monkeypatch.setattr(kernel_rows, "MANY", 1)
    layer, x = made(name)
    same_elsewhere(lambda: uv.flow.adjoint_map(layer, x, lengths=lengths))


@pytest.mark.parametrize("name", ["lstm", "gru", "ours", "peephole"])
def test_survival(name: str) -> None:
    layer, x = made(name)
    same_elsewhere(lambda: torch.tensor(uv.flow.survival(layer, x, lag=3, paths="exact"), device="cpu"))


@pytest.mark.parametrize("name", ["lstm", "gru", "ours"])
def test_a_rescue(name: str) -> None:
    layer, x = made(name)

    def rescued() -> Any:
        twin = copy.deepcopy(layer)
        uv.cures.rescue_(twin, x, lag=3)
        return dict(twin.state_dict())

    same_elsewhere(rescued)


def test_cells_in_a_loop() -> None:
    torch.manual_seed(0)
    cell, x = nn.LSTMCell(3, 4), torch.randn(T, B, 3)

    def step() -> Any:
        hx = None
        with uv.watch(cell) as flow:
            for row in x:
                hx = cell(row, hx or (row.new_zeros(B, 4), row.new_zeros(B, 4)))
            hx[0].sum().backward()  # type: ignore[index]
        return flow["cell"]

    same_elsewhere(step)


def test_an_audit_and_arrays() -> None:
    layer, x = made("gru")
    with torch.device("meta"):
        assert uv.audit(layer, x, loss=lambda out: out[0][-1].square().sum()).ok
    weights = {k: v.numpy() for k, v in layer.state_dict().items()}
    error = np.ones((T, B, 4))
    same_elsewhere(lambda: uv.flow.from_arrays("gru", weights, x.numpy(), error))
