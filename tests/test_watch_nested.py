"""Watches within each other, and models copied or replicated within one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import unvanish as uv
from unvanish.cells import ZOO
from unvanish.flow.record import NoBackwardError


@pytest.mark.parametrize("kind", [nn.LSTM, uv.nn.LSTM])
def test_watches_within_each_other_see_the_same(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": kind(3, 4), "b": kind(3, 4)})
    x = torch.randn(5, 2, 3)
    with uv.watch(model) as outer, uv.watch(model["a"]) as inner:
        model["a"](x)[0].sum().backward()
        with uv.watch(model["b"]) as other:
            model["b"](x)[0].sum().backward()
    assert outer != inner
    for seen, name in ((inner, "a"), (other, "b")):
        torch.testing.assert_close(seen["l0"].dh, outer[f"{name}.l0"].dh)
        torch.testing.assert_close(seen["l0"].dgates, outer[f"{name}.l0"].dgates)


@pytest.mark.parametrize("kind", [nn.LSTM, uv.nn.LSTM, nn.LSTMCell])
def test_a_copy_made_within_the_block_is_not_the_model(kind: Any) -> None:
    model, x = nn.Sequential(kind(3, 4)), torch.randn(2, 3)
    with uv.watch(model) as flow:
        copy.deepcopy(model)(x)[0].sum().backward()
        with pytest.raises(NoBackwardError):
            flow.layers  # noqa: B018
        model(x)[0].sum().backward()
    (name,) = flow
    assert len(flow.passes(name)) == 1
    assert flow[name].step == 1


@pytest.mark.parametrize("kind", [nn.LSTM, uv.nn.LSTM])
def test_each_watch_records_what_it_was_asked_for(kind: Any) -> None:
    lstm = kind(3, 4)
    with uv.watch(lstm, partial=True) as outer, uv.watch(lstm) as inner:
        lstm(torch.randn(5, 2, 3))[0].sum().backward()
    assert outer["l0"].partial is not None
    assert inner["l0"].partial is None


def replica(model: nn.Module) -> Any:
    """What nn.DataParallel runs on each GPU: parameters are plain tensors, made from the model's."""
    made = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for m, copied in made.items():
        for name, child in m._modules.items():
            copied._modules[name] = None if child is None else made[child]
        for name, p in m._parameters.items():
            setattr(copied, name, p.clone())
    return made[model]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.LSTM(3, 4, num_layers=2),
    "ours": lambda: uv.nn.LSTM(3, 4, num_layers=2),
    "any cell": lambda: uv.nn.Recurrent(ZOO["peephole"](), 3, 4),
    "torch's cell": lambda: nn.GRUCell(3, 4),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_replicas_are_recorded_as_the_model(name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(LAYERS[name]()), torch.randn(5, 2, 3)

    def run(called: Any) -> dict[str, uv.flow.LayerFlow]:
        with uv.watch(model) as flow:
            if name == "torch's cell":
                h = None
                for row in x:
                    h = called[0](row, h)
                h.square().sum().backward()
            else:
                called(x)[0].square().sum().backward()
        assert flow.skipped == {}
        return flow.layers

    right, found = run(model), run(replica(model))
    assert list(found) == list(right)
    for layer, record in found.items():
        assert record.valid
        torch.testing.assert_close(record.dh, right[layer].dh)
