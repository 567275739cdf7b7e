"""Models swapped to our layers and back: `accelerate` and `restore`."""

from typing import Any

import pytest
from torch import nn

import unvanish as uv


def test_accelerate_refuses_what_it_would_break() -> None:
    class Own(nn.LSTM):
        def forward(self, *args: Any) -> Any:
            return None

    with pytest.raises(ValueError, match="a subclass whose own forward would be lost"):
        uv.accelerate(nn.Sequential(Own(2, 3)))
    with pytest.raises(ValueError, match="has none"):
        uv.accelerate(nn.Linear(2, 2))
    for call in (uv.accelerate, uv.restore):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
            call(3)  # type: ignore[type-var]


def test_layers_derived_from_ours_stay_as_they_are() -> None:
    class Own(uv.nn.LSTM):
        pass

    model = nn.Sequential(Own(2, 3), nn.GRU(3, 2))
    for swap, other in ((uv.accelerate, uv.nn.GRU), (uv.restore, nn.GRU)):
        assert [type(layer) for layer in swap(model)] == [Own, other]
    assert uv.cures.clip_recurrence_(model, 1.0)[0].clip == 1.0
