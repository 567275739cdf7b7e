"""Our own layers record as they run; what they record equals the replay of torch's."""

import copy
import gc
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import unvanish as uv
from tests.strategies import ModuleCase, module_cases
from tests.test_watch import project_out
from unvanish.engine import native
from unvanish.flow import recorded_sequence
from unvanish.flow.record import NoBackwardError, NonFiniteError

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=f"native rung: {native.MISSING}")


def assert_same(found: uv.flow.Flow, right: uv.flow.Flow, tolerance: float = 1e-9) -> None:
    assert list(found.layers) == list(right.layers)
    for name, layer in right.layers.items():
        fields = found[name].tensors()
        assert fields.keys() == layer.tensors().keys()
        for field, value in layer.tensors().items():
            torch.testing.assert_close(fields[field], value, rtol=tolerance, atol=tolerance, equal_nan=True)
        # The tensor that autograd uses is the engine's own: there is nothing to hold it against.
        assert math.isnan(found[name].residual)
        assert found[name].valid
        assert found[name].detached == layer.detached


@given(case=module_cases(dropout=0.4), seed=st.integers(0, 99), every=st.none() | st.integers(1, 4))
def test_equal_to_the_replay(case: ModuleCase, seed: int, every: int | None) -> None:
    flows = []
    ours = uv.accelerate(copy.deepcopy(case.module))
    ours.checkpoint_every = every
    for module in (case.module, ours):
        torch.manual_seed(seed)
        with uv.watch(module) as flow:
            project_out(module(case.x, case.hx), seed).backward()
        flows.append(flow)
    assert_same(flows[1], flows[0])
    assert ours.__dict__.keys() - {"checkpoint_every"} == case.module.__dict__.keys()


@given(case=module_cases(), seed=st.integers(0, 99))
def test_recorded_and_not_replayed_and_bitwise_the_same(case: ModuleCase, seed: int) -> None:
    module = uv.accelerate(case.module)
    project_out(module(case.x, case.hx), seed).backward()
    plain = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    with uv.watch(module) as flow:
        project_out(module(case.x, case.hx), seed).backward()
        assert all(isinstance(s, recorded_sequence.RecordedSequence) for s in flow._sequences)
    assert all(torch.equal(p, q.grad) for p, q in zip(plain, module.parameters(), strict=True) if q.grad is not None)


def both(run: Any, seed: int = 0, every: int | None = None, **options: Any) -> None:
    """`run(module, flow)` on torch's layer and on ours gives the same records."""
    torch.manual_seed(seed)
    stock = nn.LSTM(3, 5, num_layers=2, dtype=torch.float64, **options)
    flows, ours = [], uv.accelerate(copy.deepcopy(stock))
    ours.checkpoint_every = every
    for module in (stock, ours):
        torch.manual_seed(seed)
        with uv.watch(module) as flow:
            run(module)
        flows.append(flow)
    assert_same(flows[1], flows[0])


@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("frozen", ["", "weight_ih_l0"])
def test_several_backwards_add_up(every: int | None, frozen: str) -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64)

    def run(module: nn.Module) -> None:
        for name, weight in module.named_parameters():
            weight.requires_grad_(name != frozen)
        y, (h, _) = module(x)
        y[2].square().sum().backward(retain_graph=True)
        h[0].sum().backward(retain_graph=True)
        y[5].sum().backward()

    both(run, every=every)


@pytest.mark.parametrize("every", [None, 4])
def test_a_backward_that_makes_a_graph_is_recorded_too(every: int | None) -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64)

    def run(module: nn.Module) -> None:
        torch.autograd.grad(module(x)[0].square().sum(), [*module.parameters()], create_graph=True)

    both(run, every=every)


def test_a_layer_that_no_error_reaches_has_zero_flow() -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64)

    def run(module: nn.Module) -> None:
        module(x)[1][0][0].sum().backward()

    both(run)


def test_calls_that_follow_one_another_are_one_pass() -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64)

    def run(module: nn.Module) -> None:
        state, outputs = None, []
        for t in range(6):
            y, state = module(x[t : t + 1], state)
            if t == 3:
                state = tuple(s.detach() for s in state)
            outputs.append(y)
        torch.cat(outputs).square().sum().backward()

    both(run)


def test_samples_of_different_length_without_packing() -> None:
    lstm = uv.nn.LSTM(3, 5, dtype=torch.float64)
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    lengths = [2, 6, 0]
    with uv.watch(lstm) as flow:
        lstm(x, lengths=lengths)[0].square().sum().backward()
    found = flow["l0"]
    assert found.lengths.tolist() == lengths
    for b, length in enumerate(lengths[:2]):
        with uv.watch(lstm) as alone:
            lstm(x[:length, b : b + 1])[0].square().sum().backward()
        torch.testing.assert_close(found.dh[:length, b], alone["l0"].dh[:, 0])
        assert found.dh[length:, b].count_nonzero() == 0


def test_only_the_trainable_layers_of_a_frozen_stack_are_replayed() -> None:
    lstm = uv.nn.LSTM(3, 5, num_layers=2)
    for name, weight in lstm.named_parameters():
        weight.requires_grad_(name.endswith("l1"))
    with uv.watch(lstm) as flow:
        lstm(torch.randn(6, 2, 3))[0].square().sum().backward()
    assert float(flow["l0"].dh.max()) > 0
    assert float(flow["l1"].dh.max()) > 0


@pytest.mark.parametrize("every", [None, 2])
def test_a_birth_is_traced_to_step_and_sample(every: int | None) -> None:
    lstm = uv.nn.LSTM(2, 3)
    lstm.checkpoint_every = every
    x = torch.randn(7, 4, 2)
    x[5, 2, 0] = torch.nan
    with uv.watch(lstm) as flow:
        lstm(x)[0].sum().backward()
    with pytest.raises(
        NonFiniteError, match=r"NaN first appears in the forward pass at step 5, sample 2, in the input x"
    ):
        flow.layers  # noqa: B018

    def explode(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[3, 1, 0] = torch.inf
        return gradient

    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(7, 3, 2), torch.tensor([4, 7, 6]), enforce_sorted=False)
    with uv.watch(lstm) as flow:
        y, _ = lstm(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(y)
        padded.register_hook(explode)
        padded.sum().backward()
    with pytest.raises(
        NonFiniteError,
        match=r"infinity first appears in the backward pass at step 3, sample 1, in the gradient arriving at h",
    ):
        flow.layers  # noqa: B018


def test_an_error_in_the_layer_leaves_no_recorder_behind() -> None:
    lstm = uv.nn.LSTM(2, 3)
    with pytest.raises(RuntimeError, match="input"), uv.watch(lstm):
        lstm(torch.zeros(4, 1, 9))
    assert lstm.__dict__.keys() == nn.LSTM(2, 3).__dict__.keys()


def test_a_backward_after_the_block_is_not_seen() -> None:
    lstm = uv.nn.LSTM(2, 3)
    with uv.watch(lstm) as flow:
        loss = lstm(torch.randn(4, 1, 2))[0].sum()
    loss.backward()
    with pytest.raises(NoBackwardError):
        flow["l0"]


def test_nothing_of_a_pass_outlives_it() -> None:
    lstm = uv.nn.LSTM(2, 3)

    def step() -> None:
        lstm(torch.randn(50, 4, 2))[0].square().mean().backward()

    counts = []
    with uv.watch(lstm, keep=1):
        for _ in range(6):
            step()
            gc.collect()
            counts.append(sum(1 for o in gc.get_objects() if type(o) is Tensor))
    assert counts[2] == counts[-1]


@pytest.mark.parametrize("several", [False, True])
def test_a_piece_is_let_go_without_the_garbage_collector(several: bool) -> None:
    lstm = uv.nn.LSTM(2, 3)
    lstm.checkpoint_every = 2
    gc.collect()
    gc.disable()
    try:
        with uv.watch(lstm):
            y, _ = lstm(torch.randn(5, 2, 2))
            for k in range(1 + several):
                y[k].sum().backward(retain_graph=k < several)
        del y
        assert not any(type(o).__name__ == "_Held" for o in gc.get_objects())
    finally:
        gc.enable()


@pytest.mark.parametrize("family", [nn.LSTM, uv.nn.LSTM])
def test_a_pass_is_let_go_without_the_garbage_collector(family: type[nn.LSTM]) -> None:
    lstm = family(2, 3)
    gc.collect()
    gc.disable()
    try:
        with uv.watch(lstm) as flow:
            lstm(torch.randn(5, 2, 2))[0].square().mean().backward()
            assert not flow._sequences
    finally:
        gc.enable()
