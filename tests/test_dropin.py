"""Ours do what torch's classes do: when tensors change between forward and backward, with what stands in for tensors,
and in the tools that read a model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils._pytree import tree_leaves

import unvanish as uv
from tests.dropin_subjects import CELLS, LAYERS, every_layer, every_module, given, pair
from tests.low_precision import runs_under_autocast
from unvanish import torch_internals
from unvanish.engine.cost import faster_in_torch
from unvanish.nn import torch_forward

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def gradients(layer: nn.Module, x: Tensor, change: Callable[[Any], None]) -> list[Tensor]:
    """Of the sum of the output, which `change` is called with before the backward."""
    y = layer(x)[0]
    total = y.sum()
    change(y)
    return list(torch.autograd.grad(total, list(layer.parameters())))


@every_layer
@both_dtypes
@pytest.mark.parametrize("H", [8, 64])
@pytest.mark.parametrize("watched", [False, True])
def test_the_output_may_be_changed_before_the_backward(kind: str, dtype: torch.dtype, H: int, watched: bool) -> None:
    theirs, ours = pair(kind, 3, H, dtype=dtype)
    x = given(kind, dtype)
    expected = gradients(theirs, x, lambda y: None)
    ways: list[Callable[[Any], None]] = [lambda y: y.data.zero_(), lambda y: y.detach().mul_(2), lambda y: y.add_(1)]
    for change in ways:
        if watched:
            with uv.watch(nn.Sequential(ours)):
                found = gradients(ours, x, change)
        else:
            found = gradients(ours, x, change)
        torch.testing.assert_close(found, expected)


@every_layer
@both_dtypes
def test_a_bias_may_be_changed_before_the_backward(kind: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(kind, 3, 8, dtype=dtype)
    x = given(kind, dtype)
    expected = gradients(theirs, x, lambda y: None)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        bias = getattr(ours, name)
        before = bias.detach().clone()
        for change in (lambda y, b=bias: b.data.add_(1), lambda y, b=bias: b.detach().add_(1)):
            torch.testing.assert_close(gradients(ours, x, change), expected)
            bias.data.copy_(before)
        y = ours(x)[0]
        bias.detach().add_(1)
        with pytest.raises(RuntimeError, match="inplace operation: a bias of a recurrent layer"):
            torch.autograd.grad(y.sum(), list(ours.parameters()), create_graph=True)
        bias.data.copy_(before)


@every_layer
@pytest.mark.parametrize("H", [8, 64])
def test_changes_in_place_under_compile(kind: str, H: int, compiler: Any) -> None:
    theirs, ours = pair(kind, 3, H)
    x = given(kind)

    def inside(layer: nn.Module) -> Tensor:
        def total(x: Tensor) -> Tensor:
            y = layer(x)[0]
            return y.mul_(2).relu_().sum()

        return compiler(total)(x)

    expected = torch.autograd.grad(theirs(x)[0].mul(2).relu().sum(), list(theirs.parameters()))
    torch.testing.assert_close(torch.autograd.grad(inside(ours), list(ours.parameters())), expected)
    compiled = compiler(ours)
    expected = torch.autograd.grad(theirs(x)[0].sum(), list(theirs.parameters()))
    for change in (lambda y: y.data.zero_(), lambda y: y.add_(1), lambda y: ours.bias_hh_l0.data.add_(0)):
        y = compiled(x)[0]
        total = y.sum()
        change(y)
        torch.testing.assert_close(torch.autograd.grad(total, list(ours.parameters())), expected)


@every_layer
@pytest.mark.parametrize("batch_first", [True, False])
def test_per_sample_gradients(kind: str, batch_first: bool) -> None:
    found = []
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(4, 4, 3)
    for module in pair(kind, 3, 8, dtype=torch.float64, batch_first=batch_first):
        run = call_for_per_sample_grads(module, batch_size=4, loss_reduction="sum", batch_first=batch_first)
        tree_leaves(run(x))[0].sum().backward()
        found.append([p.grad_sample for p in module.parameters()])  # type: ignore[attr-defined]
        # The expanded weights stay behind in the layer's list until its next call.
        found.append(tree_leaves(module(x)))
    torch.testing.assert_close(found[2:], found[:2])


SEEN: list[str] = []


class Seeing(Tensor):
    """Notes what torch does with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        SEEN.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@every_module
@pytest.mark.parametrize("where", ["x", "hx", "weight"])
@pytest.mark.parametrize("train", [True, False])
def test_a_tensor_with_functions_of_its_own_sees_torchs(kind: str, where: str, train: bool) -> None:
    names = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}
    name = names[kind.removesuffix("Cell")] + ("_cell" if kind in CELLS else "")
    found = []
    for module in pair(kind, 3, 8):
        x, h = given(kind), torch.zeros((2, 8) if kind in CELLS else (1, 2, 8))
        if where == "x":
            x = x.as_subclass(Seeing)
        if where == "hx":
            h = h.as_subclass(Seeing)
        if where == "weight":
            own = "weight_hh" + "_l0" * (kind in LAYERS)
            setattr(module, own, nn.Parameter(getattr(module, own).detach().as_subclass(Seeing)))
        SEEN.clear()
        with torch.set_grad_enabled(train):
            found.append(tree_leaves(module(x, (h, h.clone()) if "LSTM" in kind else h)))
        assert name in SEEN
    assert all(type(v) is Seeing for v in found[1])
    torch.testing.assert_close(found[1], found[0])


@every_layer
def test_a_mode_over_functions_sees_torchs_and_a_default_device_is_none(kind: str) -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            SEEN.append(func.__name__)
            return func(*args, **(kwargs or {}))

    ours, name = pair(kind, 3, 8)[1], {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}[kind]
    SEEN.clear()
    with Mode():
        ours(given(kind))
    assert name in SEEN
    with torch.device("cpu"):
        assert torch_forward.reason(ours, given(kind), None) is None


WRONG: dict[str, Callable[[nn.Module], Any]] = {
    "list": lambda m: m([1, 2]),
    "none": lambda m: m(None),
    "axes": lambda m: m(torch.zeros(3)),
    "integers": lambda m: m(torch.zeros(5, 2, 3, dtype=torch.long)),
    "double": lambda m: m(torch.zeros(5, 2, 3, dtype=torch.float64)),
    "features": lambda m: m(torch.zeros(5, 2, 4)),
    "no steps": lambda m: m(torch.zeros(0, 2, 3)),
    "text": lambda m: m(torch.zeros(5, 2, 3), "a"),
    "number": lambda m: m(torch.zeros(5, 2, 3), 3),
    "one of a pair": lambda m: m(torch.zeros(5, 2, 3), (torch.zeros(1, 2, 8),)),
    "no state": lambda m: m(torch.zeros(5, 2, 3), (None, None)),
}


@every_layer
@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_calls_end_in_torchs_words(kind: str, call: Callable[[nn.Module], Any]) -> None:
    said = []
    for module in pair(kind, 3, 8):
        with pytest.raises(Exception) as error:  # noqa: PT011 (whatever torch raises)
            call(module)
        said.append((type(error.value), str(error.value)))
    assert said[1] == said[0]


@every_layer
def test_states_that_do_not_fit_end_in_torchs_words(kind: str) -> None:
    x = torch.zeros(5, 2, 3)
    for shape in ((1, 3, 8), (1, 2, 7), (2, 2, 8), (2, 8), (1, 1, 2, 8)):
        h = torch.zeros(shape)
        said = []
        for module in pair(kind, 3, 8):
            with pytest.raises(RuntimeError) as error:
                module(x, (h, h) if kind == "LSTM" else h)
            said.append(str(error.value))
        assert said[1] == said[0]


@every_layer
def test_low_precision_runs_torchs_layer_or_is_as_accurate(kind: str) -> None:
    theirs, ours = pair(kind, 3, 8)
    x = given(kind)
    exact = copy.deepcopy(theirs).double()(x.double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        found, like = ours(x)[0], theirs(x)[0].dtype if runs_under_autocast(kind) else torch.bfloat16
    assert found.dtype == like
    assert (found.double() - exact).abs().max() < 0.02


@pytest.mark.by_cost
@every_layer
@pytest.mark.parametrize("train", [True, False])
def test_a_short_call_runs_torchs_layer_where_that_is_faster_and_is_watched_all_the_same(
    kind: str, train: bool
) -> None:
    theirs, ours = pair(kind, 3, 8)
    short, long = given(kind, T=1), given(kind, T=60)
    with torch.set_grad_enabled(train):
        says = uv.nn.explain(ours, short)
        assert uv.nn.explain(ours, long).rung == "native"
    why = "cell is faster for a single step" if kind == "LSTM" and train else "layer is faster for so short a call"
    assert str(says) == f"native: not used, torch's {why}\ntorch: runs"
    assert uv.nn.explain(ours, short, lengths=[1, 1]).rung == "native"
    assert torch.equal(ours(short)[0], theirs(short)[0]) or kind == "LSTM"
    if not train:
        return
    records = []
    for layer in (theirs, ours):
        with uv.watch(layer) as flow:
            layer(short)[0].sum().backward()
        records.append(next(iter(flow.values())).dh)
    torch.testing.assert_close(records[1], records[0])
    ours.clip = 1e-3
    assert uv.nn.explain(ours, short).rung == "native"
    with uv.engine.force("reference"):
        ours.clip = None
        assert uv.nn.explain(ours, short).rung == "reference"


@pytest.mark.by_cost
def test_the_rule_of_cost() -> None:
    one = faster_in_torch("GRU", 1, 32, 10**5, torch.float32, True)
    assert one == "torch's layer is faster for so short a call"
    assert faster_in_torch("GRU", 100, 32, 10**5, torch.float32, True) is None
    assert faster_in_torch("LSTM", 1, 1, 10**5, torch.float32, True) == "torch's cell is faster for a single step"
    assert faster_in_torch("LSTM", 2, 1, 10**5, torch.float32, True) is None
    assert faster_in_torch("GRU", 1, 1, 10**5, torch.float64, False, packed=True) is None
    assert faster_in_torch("LSTM", 1, 1, 10**5, torch.float32, True, packed=True) is None


@pytest.mark.by_cost
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["RNN_TANH", "RNN_RELU", "LSTM", "GRU"])
def test_where_the_processor_multiplies_in_low_precision_large_products_are_torchs(
    monkeypatch: pytest.MonkeyPatch, mode: str, training: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch_internals, "multiplies", lambda dtype: True)
    assert faster_in_torch(mode, 500, 2, 10**4, dtype, training) is None
    large = faster_in_torch(mode, 500, 64, 10**6, dtype, training)
    assert large == f"torch multiplies faster, in {str(dtype).removeprefix('torch.')}"
    assert faster_in_torch(mode, 1, 1, 10**3, torch.float32, False) == "torch's layer is faster for so short a call"
    if mode != "LSTM":
        assert faster_in_torch(mode, 1, 1, 10**3, dtype, training) == "torch's layer is faster for so short a call"


@pytest.mark.by_cost
def test_an_lstm_without_a_kernel_of_torchs_has_a_rule_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_internals, "multiplies", lambda dtype: True)
    for dtype, training, projected in (
        (torch.float16, True, False),
        (torch.float32, False, True),
        (torch.float64, False, False),
    ):
        call = (20, 1, 10**4, dtype, training)
        assert faster_in_torch("LSTM", *call, projected=projected) is None
        assert faster_in_torch("LSTM", 1, *call[1:], projected=projected) is not None
    assert faster_in_torch("LSTM", 1, 1, 10**4, torch.float64, True) == "torch's cell is faster for a single step"
    # torch's kernel is faster for 20 steps, its loop is not; nor is its cell, which has no projection.
    assert faster_in_torch("LSTM", 20, 1, 10**5, torch.float32, False) is not None
    assert uv.nn.explain(uv.nn.LSTM(8, 64), torch.zeros(20, 1, 8)).rung == "native"
    for layer in (uv.nn.LSTM(8, 64, proj_size=32), uv.nn.LSTM(8, 64, proj_size=32).half(), uv.nn.LSTM(8, 64).double()):
        with torch.no_grad():
            assert uv.nn.explain(layer, torch.zeros(20, 1, 8, dtype=layer.weight_ih_l0.dtype)).rung == "native"
            short = uv.nn.explain(layer, torch.zeros(1, 1, 8, dtype=layer.weight_ih_l0.dtype))
            assert short.declined == {"native": "torch's layer is faster for so short a call"}
    one = uv.nn.explain(uv.nn.LSTM(8, 64, proj_size=32), torch.zeros(1, 1, 8))
    assert one.declined == {"native": "torch's layer is faster for so short a call"}


@pytest.mark.by_cost
@pytest.mark.parametrize("training", [True, False])
@every_layer
def test_packed_samples_are_torchs_only_where_it_multiplies_faster(
    monkeypatch: pytest.MonkeyPatch, kind: str, training: bool
) -> None:
    monkeypatch.setattr(torch_internals, "multiplies", lambda dtype: True)
    with torch.set_grad_enabled(training):
        for n, H, says in ((2, 8, None), (64, 512, "torch multiplies faster, in bfloat16")):
            layer = getattr(uv.nn, kind)(4, H)
            x = nn.utils.rnn.pack_padded_sequence(torch.zeros(60, n, 4), [60, *[40] * (n - 1)])
            assert uv.nn.explain(layer, x).rung == "native"
            with torch.autocast("cpu", torch.bfloat16):
                assert uv.nn.explain(layer, x).declined.get("native") == says


@pytest.mark.parametrize("instructions", [True, False])
def test_avx512_alone_does_not_multiply_in_bfloat16(monkeypatch: pytest.MonkeyPatch, instructions: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    assert torch_internals.multiplies.__wrapped__(torch.bfloat16) == instructions
    assert not torch_internals.multiplies(torch.float64)


@pytest.mark.by_cost
def test_torchs_lstm_takes_longer_for_a_step_in_low_precision_on_several_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_internals, "multiplies", lambda dtype: True)
    found = []
    for threads in (1, 2, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found.append(faster_in_torch("LSTM", 200, 16, 24_576, torch.bfloat16, True))
    assert found[0] is not None
    assert found[1] is found[2] is None
