"""A call so short that torch's layer is faster goes straight to torch's kernel: same numbers, errors and weights."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

import unvanish as uv
from unvanish.engine import cost
from unvanish.nn import torch_forward

pytestmark = pytest.mark.by_cost


def pair(kind: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(3, 4, **options)
    ours = getattr(uv.nn, kind)(3, 4, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


def both(theirs: nn.Module, ours: nn.Module, *args: Any, seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    results = []
    for module in (theirs, ours):
        torch.manual_seed(seed)
        results.append(flat(module(*args)))
    return results[0], results[1]


@given(
    st.sampled_from(["RNN", "GRU", "LSTM"]),
    st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 2), "bidirectional": st.booleans(), "bias": st.booleans(),
            "batch_first": st.booleans(), "dropout": st.sampled_from([0.0, 0.5]),
            "dtype": st.sampled_from([torch.float32, torch.float64]),
        }
    ),
    st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2),
)  # fmt: skip
def test_equals_torch_with_every_option(
    kind: str, options: dict[str, Any], with_state: bool, projected: bool, training: bool, B: int
) -> None:
    if kind == "LSTM" and projected:
        options["proj_size"] = 2
    if options["num_layers"] == 1:
        options["dropout"] = 0.0
    theirs, ours = pair(kind, **options)
    theirs.train(training), ours.train(training)
    x = torch.randn(B, 1, 3) if options["batch_first"] else torch.randn(1, B, 3)
    args: list[Any] = [x.to(options["dtype"])]
    if with_state:
        places = options["num_layers"] * (1 + options["bidirectional"])
        h, c = (torch.randn(places, B, n, dtype=options["dtype"]) for n in (2 if "proj_size" in options else 4, 4))
        args.append((h, c) if kind == "LSTM" else h)
    with torch.no_grad():
        expected, found = both(theirs, ours, *args)
    assert [v.shape for v in found] == [v.shape for v in expected]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_gradients_are_torchs(kind: str) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(1, 2, 3)
    for module in (theirs, ours):
        module(x)[0].square().sum().backward()
    for mine, like in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, like.grad)


@given(
    st.fixed_dictionaries(
        {
            "num_layers": st.integers(1, 2), "bidirectional": st.booleans(), "bias": st.booleans(),
            "batch_first": st.booleans(), "dropout": st.sampled_from([0.0, 0.5]),
        }
    ),
    st.integers(1, 3), st.integers(0, 2), st.booleans(),
)  # fmt: skip
def test_a_short_lstm_trains(options: dict[str, Any], T: int, B: int, with_state: bool) -> None:
    """Through torch's cell over one step, on the engine over more; float64."""
    if options["num_layers"] == 1:
        options["dropout"] = 0.0
    theirs, ours = pair("LSTM", dtype=torch.float64, **options)
    x = torch.randn(B, T, 3) if options["batch_first"] else torch.randn(T, B, 3)
    places = options["num_layers"] * (1 + options["bidirectional"])
    given = [v.double() for v in (x, torch.randn(places, B, 4), torch.randn(places, B, 4))][: 3 if with_state else 1]
    results = []
    for module in (theirs, ours):
        torch.manual_seed(1)
        leaves = [v.clone().requires_grad_() for v in given]
        y, final = module(leaves[0], *([tuple(leaves[1:])] if with_state else []))
        (y.sin().sum() + sum(s.cos().sum() for s in final)).backward()
        results.append([y, *final, *(v.grad for v in (*leaves, *module.parameters()))])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_lstm_of_one_step_has_second_derivatives_and_an_output_that_may_be_changed() -> None:
    _, ours = pair("LSTM")
    x = torch.randn(1, 2, 3, requires_grad=True)
    assert "torch's cell" in str(uv.nn.explain(ours, x))
    (slope,) = torch.autograd.grad(ours(x)[0].sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert ours.weight_hh_l0.grad is not None
    y, (h, c) = ours(x)
    before = h.detach().clone()
    y.mul_(2.0)
    assert torch.equal(h, before)
    (y.sum() + c.sum()).backward()


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("T", [1, 2, 60])
@pytest.mark.parametrize("train", [True, False])
def test_final_states_can_be_detached_in_place(kind: str, T: int, train: bool) -> None:
    """As loops over windows of a sequence do."""
    with torch.set_grad_enabled(train):
        for module in pair(kind):
            _, final = module(torch.randn(T, 2, 3))
            for s in final if kind == "LSTM" else (final,):
                s.detach_()


def test_explain_knows_which_lstms_of_one_step_run_by_torchs_cell() -> None:
    _, ours = pair("LSTM")
    state = [torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)]
    assert uv.nn.explain(ours, torch.zeros(1, 2, 3), tuple(state)).rung == "torch"
    assert uv.nn.explain(ours, torch.zeros(1, 2, 3), state).rung == "native"
    assert uv.nn.explain(ours, torch.zeros(1, 3)).rung == "native"


def test_a_watch_takes_no_second_derivatives_away() -> None:
    _, ours = pair("LSTM")
    x = torch.randn(1, 2, 3, requires_grad=True)
    with uv.watch(ours) as flow:
        (slope,) = torch.autograd.grad(ours(x)[0].sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert ours.weight_hh_l0.grad is not None
    assert set(flow) == {"l0"}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_the_weights_are_those_of_the_moment(kind: str) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(1, 2, 3)
    ours(x)
    swapped = {name: torch.randn_like(p) for name, p in theirs.named_parameters()}
    for mine, like in zip(*(flat(functional_call(m, swapped, (x,))) for m in (ours, theirs)), strict=True):
        assert torch.equal(mine, like)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(swapped["weight_hh_l0"])
    assert all(map(torch.equal, *both(theirs, ours, x)))
    for module in (theirs, ours):
        weight_norm(module, "weight_ih_l0")
        module.parametrizations.weight_ih_l0.original1.mul_(2)
    assert all(map(torch.equal, *both(theirs, ours, x)))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(torch.zeros(1, 2, 4)),
        lambda m: m(torch.zeros(1, 2, 3, dtype=torch.float64)),
        lambda m: m(torch.zeros(1, 2, 3), torch.zeros(1, 3, 4)),
        lambda m: m(torch.zeros(1, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 5))),
        lambda m: m(torch.zeros(1, 2, 3), (torch.zeros(1, 2, 4),)),
        lambda m: m(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4, dtype=torch.float64)),
    ],
)
@torch.no_grad()
def test_wrong_calls_end_in_torchs_words(kind: str, call: Any) -> None:
    said = []
    for module in pair(kind):
        with pytest.raises(Exception) as error:  # noqa: PT011 (whatever torch raises)
            call(module)
        said.append((type(error.value), str(error.value)))
    assert said[1] == said[0]


class Checked(nn.GRU):
    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        if bool((input > 1).any()):
            raise ValueError("an input above 1")
        super().check_input(input, batch_sizes)


@torch.no_grad()
def test_a_subclass_keeps_its_own_checks() -> None:
    layer = uv.nn.accelerate(Checked(3, 4))
    layer(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="an input above 1"):
        layer(torch.full((1, 2, 3), 2.0))


@pytest.mark.by_cost
def test_where_no_multiplication_is_of_low_precision_short_calls_are_torchs_but_no_lstm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost.torch_internals, "multiplies", lambda dtype: False)
    low = torch.bfloat16
    for training in (False, True):
        for mode in ("RNN_TANH", "GRU"):
            assert cost.faster_in_torch(mode, 1, 1, 1024, low, training) == cost.LAYER
            assert cost.faster_in_torch(mode, 500, 32, 1024, low, training) is None
        assert cost.faster_in_torch("LSTM", 1, 1, 1024, low, training) is None


@pytest.mark.parametrize(("kind", "T"), [("RNN", 8), ("LSTM", 4), ("GRU", 3)])
def test_what_another_call_left_in_the_list_of_weights_decides_nothing(kind: str, T: int) -> None:
    layer, x = getattr(uv.nn, kind)(3, 8), torch.randn(T, 8, 3)
    trained = torch_forward.reason(layer, x, None)
    functional_call(layer, {k: p.detach() for k, p in layer.named_parameters()}, (x,))
    assert not layer._flat_weights[0].requires_grad
    assert torch_forward.reason(layer, x, None) == trained
    with torch.no_grad():
        assert torch_forward.reason(layer, x, None) != trained
