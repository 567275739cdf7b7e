"""What a watch could not record is named, with the reason; a NaN is traced to the call and the layer it was born in."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unvanish as uv
from unvanish.flow.record import NoBackwardError, NonFiniteError

X = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn, self.out = layer, nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0]).sum()


def test_tracing_within_a_watch_is_left_alone() -> None:
    model = Head(nn.LSTM(4, 5))
    with uv.watch(model) as flow:
        traced = torch.jit.trace(model, X)
        model(X).backward()
    torch.testing.assert_close(traced(X), model(X))
    assert "torch.jit.trace" in flow.skipped["rnn"]
    assert flow["rnn.l0"].valid


@pytest.mark.parametrize("way", ["wrapper", "in place", "layer", "function"])
def test_what_ran_compiled_is_named(way: str) -> None:
    model = Head(nn.GRU(4, 5))
    call: Any = model
    if way == "wrapper":
        call = torch.compile(model, backend="eager")
    elif way == "function":
        call = torch.compile(lambda x: model(x), backend="eager")
    else:
        (model if way == "in place" else model.rnn).compile(backend="eager")
    with uv.watch(model) as flow:
        assert not flow.skipped
        call(X).backward()
    assert "torch.compile" in flow.skipped["rnn"]
    with pytest.raises(NoBackwardError, match="a gradient came back to its weights"):
        flow["rnn.l0"]


class Integrate(nn.Module):
    """A neuron that keeps its state in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("potential", torch.zeros(3, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.potential = 0.9 * self.potential + x
        return self.potential.sigmoid()


class Attention(nn.Module):
    """Keeps what it has computed, for a look at it, and carries nothing over."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.weights = nn.Linear(5, 5), torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.weights = self.w(x).softmax(-1)
        return x * self.weights + 1.0


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.neuron, self.block, self.rnn = nn.Linear(4, 5), Integrate(), Attention(), nn.RNN(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        ys = [self.neuron(self.project(row)) for row in x]
        z = torch.stack(ys)
        for _ in range(4):
            z = self.block(z.tanh())
        return z.sum() + self.rnn(x)[0].sum()


def test_a_module_that_keeps_its_state_is_named_and_one_that_keeps_its_output_is_not() -> None:
    model = Both()
    with uv.watch(model) as flow:
        model(X).backward()
    assert list(flow.skipped) == ["neuron"]
    assert "returned or stores" in flow.skipped["neuron"]
    model = Both()
    with uv.watch(model, states={"neuron": lambda module, args, out: module.potential}) as flow:
        model(X).backward()
    assert not flow.skipped
    assert flow["neuron"].dh.shape == (6, 3)
    assert flow["neuron"].dh.all()


class Spikes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x)


def test_a_named_state_that_no_gradient_reaches_is_told() -> None:
    model, readout = Spikes(), nn.Linear(5, 1)
    both = nn.ModuleList([model, readout])
    with uv.watch(both, states={"0": lambda module, args, out: out}) as flow:
        spikes = torch.stack([(model(x) > 0).float() for x in X])
        assert not flow.skipped
        readout(spikes).sum().backward()
    assert "marked 6 times, and no gradient reached it" in flow.skipped["0"]
    assert "marked 6 times" in repr(flow)
    with pytest.raises(NoBackwardError, match="marked 6 times"):
        flow["0"]


@pytest.mark.parametrize("family", [nn, uv.nn])
@pytest.mark.parametrize("detach", [False, True])
def test_a_nan_is_born_at_the_step_of_the_whole_sequence(family: Any, detach: bool) -> None:
    gru, x = family.GRU(4, 5), X.clone()
    x[2, 1, 0] = torch.nan
    with uv.watch(gru) as flow:
        _, h = gru(X)
        y, h = gru(x, h.detach() if detach else h)
        (y.sum() + gru(X, h)[0].sum()).backward()
    with pytest.raises(
        NonFiniteError, match="NaN first appears in the forward pass at step 8, sample 1, in the input x"
    ):
        flow["l0"]
    with uv.watch(gru) as flow:
        _, h = gru(X)
        y, h = gru(X, h.detach() if detach else h)
        ((0 * y[3, 2]).sqrt().sum() + gru(X, h)[0].sum()).backward()
    with pytest.raises(
        NonFiniteError,
        match="NaN first appears in the backward pass at step 9, sample 2, in the gradient arriving at h",
    ):
        flow["l0"]


@pytest.mark.parametrize("family", [nn, uv.nn])
def test_a_nan_after_samples_of_different_lengths_is_born_at_the_samples_own_step(family: Any) -> None:
    gru, x = family.GRU(4, 5), X.clone()
    x[2, 0, 0] = torch.nan
    with uv.watch(gru) as flow:
        _, h = gru(pack_padded_sequence(X, torch.tensor([2, 6, 4]), enforce_sorted=False))
        gru(x, h)[0].sum().backward()
    with pytest.raises(
        NonFiniteError, match="NaN first appears in the forward pass at step 4, sample 0, in the input x"
    ):
        flow["l0"]


@pytest.mark.parametrize("family", [nn, uv.nn])
def test_a_layer_that_a_nan_comes_back_to_names_the_layer_that_made_it(family: Any) -> None:
    first, second = family.RNN(4, 5), family.RNN(5, 5)
    model = nn.ModuleDict({"first": first, "second": second})
    with torch.no_grad():
        second.bias_hh_l0[0] = torch.inf
        second.weight_ih_l0[0] = -torch.inf
    with uv.watch(model) as flow:
        y = first(X)[0]
        second(y.square())[0].sum().backward()
    for name in model:
        with pytest.raises(NonFiniteError, match=r"^second\.l0: weight w_ih holds infinity before the pass"):
            flow[f"{name}.l0"]


def test_no_figure_and_no_cure_is_built_on_an_invalid_record_without_a_word() -> None:
    lstm = nn.LSTM(4, 5)
    with uv.watch(lstm) as flow:
        (lstm(X)[0].sum() + (lstm.weight_hh_l0 @ torch.ones(5)).sum()).backward()
    assert not flow["l0"].valid
    legend = flow["l0"].plot().get_legend_handles_labels()[1]
    texts = [*legend, *(t.get_text() for t in flow["l0"].plot().texts)]
    assert any("l0 (not valid)" in text for text in texts)
    with pytest.raises(ValueError, match="the record 'l0' is not valid: its own ∂E/∂W differs"):
        uv.cures.rescue_(lstm, flow, lag=20)


@pytest.mark.parametrize("autocast", [False, True])
def test_another_use_of_a_weight_is_told_under_autocast_too(autocast: bool) -> None:
    torch.manual_seed(0)
    layer, x, other = nn.GRU(3, 8), torch.randn(12, 4, 3), torch.randn(24, 8)
    with uv.watch(layer) as flow:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)[0]
        (y.float().square().sum() + 30 * (layer.weight_hh_l0 * other).sum()).backward()
    assert "a weight takes part elsewhere in the loss too" in (flow["l0"].problem or "")
