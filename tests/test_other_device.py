"""What runs on a GPU, without one: no operation takes tensors of two devices, and few wait for the device.

Layers on the meta device, which torch keeps apart from the CPU as it does a GPU: there, operations on tensors of both
raise an error, and shapes are computed, but no numbers. A number that is asked for is 0 here, a count 1, a flag True.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.nn.utils.rnn import pack_padded_sequence

import unvanish as uv
from unvanish.cells import ZOO
from unvanish.engine import fused
from unvanish.flow.transfer import numbers

DEVICE, LENGTHS = "meta", (7, 5, 4)
LAYERS: dict[str, Callable[[], Any]] = {
    "lstm": lambda: nn.LSTM(3, 4, device=DEVICE),
    "stack": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, device=DEVICE),
    "projection": lambda: nn.LSTM(3, 4, proj_size=2, device=DEVICE),
    "gru": lambda: nn.GRU(3, 4, device=DEVICE),
    "rnn": lambda: nn.RNN(3, 4, device=DEVICE),
    "peephole": lambda: uv.nn.Recurrent(ZOO["peephole"](), 3, 4, device=DEVICE),
}
every_layer = pytest.mark.parametrize("name", list(LAYERS))


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where numbers were asked for; the fused rung takes the meta device for a GPU."""
    asked: list[str] = []

    def on_cpu(v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or v.dtype
        return torch.full(v.shape, 0 if dtype.is_floating_point else 1, dtype=dtype)

    def fetching(name: str) -> Callable[..., Any]:
        plain = getattr(Tensor, name)

        def fetch(v: Tensor, *rest: Any, **options: Any) -> Any:
            if not v.is_meta:
                return plain(v, *rest, **options)
            asked.append(name)
            return plain(on_cpu(v), *rest, **options)

        return fetch

    def to(v: Tensor, *rest: Any, **options: Any) -> Tensor:
        like = next((a for a in rest if isinstance(a, Tensor)), None)
        device = next((a for a in rest if isinstance(a, str | torch.device)), options.get("device"))
        device = like.device if like is not None else device
        if not v.is_meta or device is None or torch.device(device).type != "cpu":
            return plain_to(v, *rest, **options)
        asked.append("to")
        dtype = next((a for a in rest if isinstance(a, torch.dtype)), options.get("dtype"))
        return on_cpu(v, dtype if like is None else like.dtype)

    plain_to, plain_obstacle = Tensor.to, fused.obstacle

    def obstacle(cell: Any, x: Tensor, *rest: Any, **options: Any) -> str | None:
        # As for a tensor on CUDA: only the check of the device sees the other one.
        return plain_obstacle(cell, torch.empty(x.shape, dtype=x.dtype) if x.is_meta else x, *rest, **options)

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu"):
        monkeypatch.setattr(Tensor, name, fetching(name))
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(fused, "obstacle", obstacle)
    monkeypatch.setattr("unvanish.capture.parts.torch_internals.fake", lambda v: v.is_meta)
    with _config.patch(meta_nonzero_assume_all_nonzero=True):
        yield asked


def sequence(steps: int = LENGTHS[0]) -> Tensor:
    return torch.empty(steps, len(LENGTHS), 3, device=DEVICE)


def watched(name: str, steps: int = LENGTHS[0], packed: bool = False) -> uv.flow.Flow:
    layer, x = LAYERS[name](), sequence(steps)
    with uv.watch(layer, partial=True) as flow:
        y = layer(pack_padded_sequence(x, torch.tensor(LENGTHS)) if packed else x)[0]
        (y.data if packed else y).square().sum().backward()
    return flow


@pytest.mark.parametrize("name", ["lstm", "stack", "projection", "gru", "rnn"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_watched_step_keeps_to_its_device(name: str, packed: bool) -> None:
    record = watched(name, packed=packed)["l0"]
    assert record.problem is None
    assert record.dh.shape == (LENGTHS[0], len(LENGTHS))


@pytest.mark.parametrize(("name", "number"), [("lstm", 12), ("gru", 10), ("rnn", 9)])
def test_how_often_a_watched_step_waits_does_not_depend_on_its_length(name: str, number: int, waits: list[str]) -> None:
    watched(name)
    assert len(waits) == number, waits
    watched(name, steps=50)
    assert len(waits) == 2 * number


def test_numbers_of_tensor_subclasses_are_read_one_by_one(waits: list[str]) -> None:
    class Sharded(Tensor):
        """As DTensor, which has no tolist."""

        def tolist(self) -> Any:
            raise RuntimeError

    plain = torch.empty((), device=DEVICE)
    assert numbers([plain.as_subclass(Sharded), plain, plain]) == [0.0] * 3
    assert waits == ["__float__", "tolist"]


@pytest.mark.parametrize("what", ["map", "survival", "marks", "clipping"])
def test_waits_do_not_become_more_with_the_steps_or_parameters(what: str, waits: list[str]) -> None:
    def run(T: int) -> int:
        waits.clear()
        if what == "map":
            uv.flow.adjoint_map(
                nn.LSTM(3, 4, device=DEVICE), sequence(T), sources=[*range(T - 40, T)] if T > 40 else "all"
            )
        elif what == "survival":
            uv.flow.survival(nn.LSTM(3, 4, device=DEVICE), sequence(T), lag=T // 2, paths="exact")
        elif what == "marks":
            w = torch.empty(3, 3, device=DEVICE, requires_grad=True)
            with uv.watch(nn.Identity()):
                h = sequence(T)[0]
                for _ in range(T):
                    h = uv.mark(torch.tanh(h @ w), "h")
                h.sum().backward()
        else:
            layers = nn.Sequential(*(nn.Linear(2, 2, device=DEVICE) for _ in range(T)))
            for p in layers.parameters():
                p.grad = torch.empty_like(p)
            uv.cures.GradientClipper(layers.parameters()).clip_()
        return len(waits)

    few = run(40)
    assert run(80) <= few + 4, waits


@pytest.mark.parametrize("device", [DEVICE, "cpu"])
def test_a_run_that_fails_is_forgotten_at_once_in_whatever_thread(device: str) -> None:
    layer, failing = nn.LSTM(3, 4, device=device), [True, False]

    def fail(_: Tensor) -> None:
        if failing.pop(0):
            raise MemoryError("as when the device is full")

    layer.weight_ih_l0.register_hook(fail)
    watched = uv.watch(layer)
    with watched as flow:
        for _ in range(2):
            loss = layer(torch.ones(*sequence().shape, device=device))[0].square().sum()
            with contextlib.suppress(MemoryError), ThreadPoolExecutor(1) as thread:
                thread.submit(loss.backward).result()
            assert not watched._runs._begun  # type: ignore[attr-defined]
        assert flow["l0"].step == 2


MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "map": uv.flow.adjoint_map,
    "gates": uv.flow.gate_statistics,
    "exponents": lambda *given, **options: uv.flow.lyapunov(*given, n=2, **options),
    "terms": uv.flow.decompose,
    "singular values": lambda *given, **options: uv.flow.singular_values(*given, j=0, k=5, n=2, **options),
}


@every_layer
@pytest.mark.parametrize("what", list(MEASUREMENTS))
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_measurements_keep_to_their_device(name: str, what: str, lengths: Any) -> None:
    MEASUREMENTS[what](LAYERS[name](), sequence(), lengths=lengths)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_cures_keep_to_their_device(name: str) -> None:
    layer = LAYERS[name]()
    uv.cures.rescue_(layer, sequence(), lag=3)
    for cure in (uv.cures.chrono_, uv.cures.forget_bias_):
        cure(layer, 3)
    uv.cures.uniform_gate_(layer)
    uv.cures.orthogonal_(layer)
    omega = uv.cures.Omega(layer)
    with omega:
        layer(sequence())[0].sum().backward()
    omega.penalty().backward()


def test_two_devices_are_told_apart() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3, device=DEVICE) + torch.zeros(3)


def test_numbers_keep_their_order_whatever_device_and_dtype_they_are_in() -> None:
    class Elsewhere(Tensor):
        is_cpu = False  # type: ignore[assignment]

    def elsewhere(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(value, dtype=dtype).as_subclass(Elsewhere)

    given = [elsewhere(1.0), torch.tensor(2.0), elsewhere(3.0, torch.float64), elsewhere(4.0)]
    assert numbers(given) == [1.0, 2.0, 3.0, 4.0]
