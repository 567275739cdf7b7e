"""Models swapped to our layers and back: `accelerate` and `restore`."""

import copy
import io
import pickle
import warnings
from abc import ABC
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import unvanish as uv


class Tagged(nn.LSTM):
    """A subclass that leaves forward to torch."""

    def __init__(self, *args: Any, tag: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tag = tag

    def describe(self) -> str:
        return f"tagged {self.tag}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tag={self.tag}"


class Twice(Tagged):
    """Two classes below torch's."""


class Abstract(nn.GRU, ABC):
    """With a metaclass."""


class Started(nn.RNN):
    """Created with arguments of its own: pickle asks for them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Started":
        made = super().__new__(cls)
        made.__dict__["made_by_new"] = True
        return made


class OwnForward(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


class OwnOrder(nn.LSTM):
    def permute_hidden(self, hx: Any, permutation: Any) -> Any:
        return super().permute_hidden(hx, permutation)


class OwnStates(nn.GRU):
    def states(self) -> str:
        return "mine"


class Registered(nn.GRU):
    seen: ClassVar[list[type]] = []

    def __init_subclass__(cls) -> None:
        Registered.seen.append(cls)


class OwnReduce(nn.GRU):
    def __reduce__(self) -> Any:
        return OwnReduce, (self.input_size, self.hidden_size)


class Base(nn.RNNBase):
    def forward(self, x: Tensor) -> Tensor:
        return x


SUBCLASSES: dict[str, Callable[[], nn.RNNBase]] = {
    "one": lambda: Tagged(3, 4, num_layers=2, batch_first=True, tag="a"),
    "two": lambda: Twice(3, 4, proj_size=2, tag="b"),
    "metaclass": lambda: Abstract(3, 4, bidirectional=True),
    "new": lambda: Started(3, 4, nonlinearity="relu"),
}


@pytest.mark.parametrize("build", SUBCLASSES.values(), ids=SUBCLASSES)
def test_a_subclass_without_a_forward_of_its_own_runs_on_the_engine(build: Callable[[], nn.RNNBase]) -> None:
    torch.manual_seed(0)
    theirs = build().double()
    kind, x = type(theirs), torch.randn(5, 2, 3, dtype=torch.float64)
    ours = uv.accelerate(copy.deepcopy(theirs))
    assert isinstance(ours, kind)
    assert isinstance(ours, uv.nn.RNN | uv.nn.LSTM | uv.nn.GRU)
    assert repr(ours) == repr(theirs)
    assert uv.accelerate(ours) is ours
    assert type(uv.accelerate(build())) is type(ours), "the class is derived once"
    found = []
    for layer in (theirs, ours):
        y = layer(x)[0]
        y.square().sum().backward()
        found.append([y, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert "l0" in ours.states(x)
    restored = uv.restore(ours)
    assert type(restored) is kind


@pytest.mark.parametrize("build", SUBCLASSES.values(), ids=SUBCLASSES)
@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "save"])
def test_an_accelerated_subclass_is_copied_and_pickled(way: str, build: Callable[[], nn.RNNBase]) -> None:
    layer = uv.accelerate(build())
    layer.clip = 2.0
    if way == "pickle":
        again = pickle.loads(pickle.dumps(layer))
    elif way == "save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = getattr(copy, way)(layer)
    assert type(again) is type(layer)
    assert again.clip == 2.0
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(again(x)[0], layer(x)[0])
    assert getattr(again, "made_by_new", False) == hasattr(layer, "made_by_new")


def test_a_parametrized_subclass() -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer, x = Tagged(3, 4), torch.randn(5, 2, 3)
    parametrize.register_parametrization(layer, "weight_hh_l0", Double())
    expected = layer(x)[0]
    uv.accelerate(layer)
    assert isinstance(layer, uv.nn.LSTM)
    assert isinstance(layer, Tagged)
    torch.testing.assert_close(layer(x)[0], expected)
    uv.restore(layer)
    assert not isinstance(layer, uv.nn.LSTM)
    torch.testing.assert_close(layer(x)[0], expected)


def replaced() -> nn.Module:
    layer = nn.LSTM(2, 3)
    layer.forward = layer.forward  # type: ignore[method-assign]
    return layer


def attributed() -> nn.Module:
    layer = nn.LSTM(2, 3)
    layer.clip = 5  # type: ignore[assignment]
    return layer


def quantized() -> nn.Module:
    return torch.ao.nn.quantized.dynamic.LSTM(2, 3)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward": (lambda: OwnForward(2, 3), r"rest \(OwnForward\): has a forward of its own"),
    "instance": (replaced, r"rest \(LSTM\): its forward was replaced on the instance"),
    "order": (lambda: OwnOrder(2, 3), r"rest \(OwnOrder\): has a permute_hidden of its own"),
    "names": (lambda: OwnStates(2, 3), r"rest \(OwnStates\): defines states, which"),
    "attribute": (attributed, r"rest \(LSTM\): has an attribute clip, which"),
    "registered": (lambda: Registered(2, 3), r"rest \(Registered\): defines __init_subclass__"),
    "reduce": (lambda: OwnReduce(2, 3), r"rest \(OwnReduce\): defines __reduce__"),
    "base": (lambda: Base("LSTM", 2, 3), r"rest \(Base\): derives from nn.RNNBase, but not from"),
    "scripted": (lambda: torch.jit.script(nn.GRU(2, 3)), r"rest \(GRU\): is scripted"),
    "quantized": (quantized, r"rest \(LSTM\): is quantized"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("build", "says"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_accelerated_is_left_and_named(build: Callable[[], nn.Module], says: str) -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(2, 3), "rest": build()})
    kind = type(model["rest"])
    with pytest.raises(ValueError, match=f"model: cannot accelerate {says}"):
        uv.accelerate(model, strict=True)
    assert type(model["lstm"]) is nn.LSTM, "strict changes nothing"
    with pytest.warns(UserWarning, match=f"accelerate left these layers as they are: {says}") as told:
        assert uv.accelerate(model) is model
    assert len([w for w in told if "accelerate" in str(w.message)]) == 1
    assert told[0].filename == __file__
    assert isinstance(model["lstm"], uv.nn.LSTM)
    assert type(model["rest"]) is kind
    assert Registered.seen == []


def test_the_clip_needs_every_layer() -> None:
    model = nn.ModuleList([nn.LSTM(2, 3), OwnForward(2, 3)])
    with pytest.raises(ValueError, match=r"1 \(OwnForward\): has a forward of its own"):
        uv.cures.clip_recurrence_(model, 1.0)
    assert type(model[0]) is nn.LSTM
    assert uv.cures.clip_recurrence_(Tagged(2, 3), 1.0).clip == 1.0


def test_accelerate_needs_a_recurrent_layer() -> None:
    with pytest.raises(ValueError, match="has none"):
        uv.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has only cells, which take one step at a time"):
        uv.accelerate(nn.Sequential(nn.LSTMCell(2, 2)))
    for call in (uv.accelerate, uv.restore):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
            call(3)  # type: ignore[type-var]


def test_layers_derived_from_ours_stay_as_they_are() -> None:
    class Own(uv.nn.LSTM):
        pass

    model = nn.Sequential(Own(2, 3), nn.GRU(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for swap, other in ((uv.accelerate, uv.nn.GRU), (uv.restore, nn.GRU)):
            assert [type(layer) for layer in swap(model)] == [Own, other]
    assert uv.cures.clip_recurrence_(model, 1.0)[0].clip == 1.0
