"""A widened layer computes at first what it did, behind the same interface, and then learns with all of its units."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import unvanish as uv
from unvanish.cells import ZOO
from unvanish.cures import widen_
from unvanish.cures.widen import Widened

MATRICES_MIXED = {"antisymmetric"}
"""cells whose effective W_hh mixes rows and columns of the learnt one, so that new units act on old ones at once"""
LAYERS = {
    "rnn": lambda **o: nn.RNN(3, 2, **o),
    "relu": lambda **o: nn.RNN(3, 2, nonlinearity="relu", **o),
    "gru": lambda **o: nn.GRU(3, 2, **o),
    "lstm": lambda **o: nn.LSTM(3, 2, **o),
    "our gru": lambda **o: uv.nn.GRU(3, 2, **o),
    "our lstm": lambda **o: uv.nn.LSTM(3, 2, **o),
    **{name: lambda name=name, **o: uv.nn.Recurrent(ZOO[name](), 3, 2, **o) for name in ZOO},
}
FORMS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dtype": torch.float64},
    {"bias": False, "num_layers": 2},
]


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, torch.Tensor):
        return [value.as_subclass(torch.Tensor)]
    assert isinstance(value, tuple | list)
    return [t for v in value for t in tensors(v)]


def close(a: object, b: object) -> bool:
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return all(x.shape == y.shape and torch.allclose(x, y, atol=1e-6) for x, y in pairs)


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("kind", [k for k in LAYERS if k not in MATRICES_MIXED])
def test_it_computes_at_first_what_it_did(kind: str, form: int) -> None:
    torch.manual_seed(form)
    layer: Any = LAYERS[kind](**FORMS[form])
    x = torch.randn(4, 6, 3, dtype=FORMS[form].get("dtype", torch.float32))
    before = {n: p.clone() for n, p in layer.named_parameters()}
    wide: Any = widen_(layer, 7)
    assert isinstance(wide, Widened)
    assert (wide.hidden_size, wide.inner.hidden_size) == (2, 7)
    assert close(wide(x), layer(x))
    assert close(wide(x[0]), layer(x[0]))
    packed = pack_sequence([x[0], x[1, :4], x[2, :1]])
    assert close(wide(packed), layer(packed))
    _, state = layer(x)
    assert close(wide(x, state), layer(x, state))
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_sequence_in_two_pieces_is_the_whole_one_once_all_units_are_used(kind: str) -> None:
    torch.manual_seed(1)
    wide: Any = widen_(LAYERS[kind](num_layers=2), 5)
    with torch.no_grad():
        wide.projection.normal_()
    x = torch.randn(6, 4, 3)
    y, last = wide(x)
    first, state = wide(x[:3])
    kept = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
    second, end = wide(x[3:], kept)
    assert close((torch.cat([first, second]), end), (y, last))


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_a_loop_over_single_steps_hands_the_wide_state_on(cell: Any) -> None:
    torch.manual_seed(2)
    narrow: Any = cell(3, 2)
    wide: Any = widen_(narrow, 6)
    x = torch.randn(5, 4, 3)
    state: Any = None
    other: Any = None
    for step in x:
        state, other = wide(step, state), narrow(step, other)
    assert close(state, other)
    with torch.no_grad():
        wide.projection.normal_()
    state = None
    inner: Any = None
    for step in x:
        state, inner = wide(step, state), wide.inner(step, inner)
    h, full = (s[0] if isinstance(s, tuple) else s for s in (state, inner))
    assert torch.allclose(h, full @ wide.projection[0].T, atol=1e-6)


def test_training_reaches_every_weight_and_a_mask_keeps_the_wide_state() -> None:
    torch.manual_seed(3)
    wide: Any = widen_(nn.LSTMCell(3, 1), 4)
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    before = {n: p.detach().clone() for n, p in wide.named_parameters()}
    for _ in range(2):  # P starts at [I, 0], so that the new units' weights move from the second update on
        h, c = wide(torch.randn(5, 3))
        mask = torch.tensor([1.0, 1, 0, 1, 1])[:, None]
        h, _ = wide(torch.randn(5, 3), (h * mask, c * mask))
        optimizer.zero_grad()
        (h - 1).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in wide.named_parameters())


def test_places_that_are_shared_stay_shared_and_wide_layers_stay() -> None:
    layer, other = nn.GRU(3, 2), nn.GRU(3, 9)
    model: Any = nn.ModuleDict({"a": layer, "b": layer, "c": other})
    widen_(model, 8)
    assert model["a"] is model["b"]
    assert model["c"] is other
    uv.cures.orthogonal_(model)
    assert copy.deepcopy(model)["a"].inner.hidden_size == 8


@pytest.mark.parametrize(
    ("model", "size", "error"),
    [
        (nn.GRU(3, 8), 8, ValueError),
        (nn.GRU(3, 2), 0, ValueError),
        (nn.GRU(3, 2), 4.0, TypeError),
        (nn.GRU(3, 2), True, TypeError),
        (nn.Linear(3, 2), 8, ValueError),
        (nn.LSTM(3, 4, proj_size=2), 8, ValueError),
        (type("Own", (nn.GRU,), {})(3, 2), 8, ValueError),
        (type("Own", (nn.GRUCell,), {})(3, 2), 8, ValueError),
        (uv.cures.constrain_(nn.GRU(3, 2)), 8, ValueError),
    ],
)
def test_what_cannot_be_widened_is_refused(model: nn.Module, size: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        widen_(model, size)


def test_hooks_are_refused_because_they_would_be_lost() -> None:
    for layer in (nn.GRU(3, 2), nn.GRUCell(3, 2)):
        layer.register_forward_hook(lambda *a: None)
        with pytest.raises(ValueError, match="hooks"):
            widen_(layer, 8)
