"""`uv.audit`: the backend's gradients of every recurrent layer against a float64 reference."""

import contextlib
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import unvanish as uv
from tests.audit_subjects import Last, Loop, X, Y, flat, lstm, mse, wrong
from tests.low_precision import skip_where_torch_raises
from unvanish.cells import ZOO

from .strategies import ModuleCase, module_cases


@pytest.mark.parametrize("ours", [False, True])
@given(case=module_cases(dtype=torch.float32, dropout=0.4))
@settings(deadline=None, max_examples=60)
def test_right_layers_agree(ours: bool, case: ModuleCase) -> None:
    """All forms of input, directions, projections, and dropout drawn again."""
    module = uv.accelerate(case.module) if ours else case.module
    before = {k: v.clone() for k, v in module.state_dict().items()}
    rng = torch.get_rng_state()
    hx = () if case.hx is None else (case.hx,)
    found = uv.audit(module, case.x, *hx, None, loss=lambda out, _: flat(out))
    assert found.ok, found
    assert 0 <= found.worst < 1e-4
    (layer,) = found.layers.values()
    n = len(module._flat_weights)
    assert len(layer.errors) == n + 1 + (0 if case.hx is None else 1 + (module.mode == "LSTM"))
    assert found.skipped == {}
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert not module._forward_hooks
    assert type(module) is type(case.module)


@given(case=module_cases())
@settings(deadline=None, max_examples=20)
def test_float64_is_held_to_float64(case: ModuleCase) -> None:
    found = uv.audit(case.module, case.x, loss=flat)
    assert found.ok, found
    assert found.worst < 1e-11
    assert next(iter(found.layers.values())).dtype == "float64"


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_autocast_and_half_precision(kind: Any, ours: bool) -> None:
    if not ours:
        skip_where_torch_raises(kind.__name__)
    torch.manual_seed(0)
    model = Last(kind(5, 8, batch_first=True))
    if ours:
        uv.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = uv.audit(model, X, Y, loss=mse)
    for found in (rounded, uv.audit(model.bfloat16(), X.bfloat16(), Y.bfloat16(), loss=mse)):
        assert found.ok, found
        assert found.layers["rnn"].dtype == "bfloat16"
        assert found.layers["rnn"].explained < 0.2


class WrongCell(nn.LSTMCell):
    """Only what it hands to the step before is wrong."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input, None if hx is None else (wrong(hx[0]), hx[1]))


@pytest.mark.parametrize("library", [nn, uv.nn])
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(kind: str, library: Any) -> None:
    torch.manual_seed(0)
    found = uv.audit(Loop(getattr(library, kind)(5, 8)), X, Y, loss=mse)
    assert found.ok, found
    assert found.layers["cell"].calls == 12
    assert "h0" in found.layers["cell"].errors
    # A change in place must not reach what was kept.
    assert uv.audit(Loop(getattr(library, kind)(5, 8), lambda h: h.mul_(0.9)), X, Y, loss=mse).ok


def test_a_wrong_cell_is_caught_by_the_state_it_reads() -> None:
    torch.manual_seed(0)
    found = uv.audit(Loop(WrongCell(5, 8)), X, Y, loss=mse)
    errors = found.layers["cell"].errors
    assert errors["h0"] == pytest.approx(0.05, rel=1e-3)
    assert max(e for q, e in errors.items() if q != "h0") < 1e-5
    assert found.says.startswith("cell: ∂E/∂h0 is off by 5e-02, float32 explains")


def test_a_sigmoid_rnn_and_a_clipped_one() -> None:
    torch.manual_seed(0)
    assert uv.audit(Last(uv.nn.RNN(5, 8, nonlinearity="sigmoid", batch_first=True)), X, Y, loss=mse).ok
    layer = uv.nn.GRU(5, 8, batch_first=True)
    layer.clip = 1e-4
    layer.checkpoint_every = 5
    assert uv.audit(Last(layer), torch.randn(4, 40, 5), Y, loss=mse).ok


class WrongOutput(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        y, s = super().forward(input, hx)
        return wrong(y), s


class WrongInput(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(wrong(input), hx)


class WrongWeight(nn.LSTM):
    """A kernel of a third party, which reads the weights itself."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        zeros = input.new_zeros(1, input.shape[0], self.hidden_size)
        weights = [self.weight_ih_l0, wrong(self.weight_hh_l0), self.bias_ih_l0, self.bias_hh_l0]
        y, h, c = torch._VF.lstm(input, (zeros, zeros), weights, True, 1, 0.0, True, False, True)  # type: ignore[attr-defined]
        return y, (h, c)


class WrongForward(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        y, s = super().forward(input, hx)
        return y * 1.01, s


class NoGradient(nn.LSTM):
    """Whose backward forgets the input."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(input.detach(), hx)


@pytest.mark.parametrize(
    ("kind", "off"),
    [(WrongOutput, {"W_ih", "W_hh", "b_ih", "b_hh", "x"}), (WrongInput, {"x"}), (WrongWeight, {"W_hh"})],
)
def test_a_wrong_backward_is_caught(kind: Any, off: set[str]) -> None:
    torch.manual_seed(0)
    found = uv.audit(Last(lstm(kind)), X, Y, loss=mse)
    layer = found.layers["rnn"]
    assert {q for q, e in layer.errors.items() if e > layer.explained} == off
    assert found.worst == pytest.approx(0.05, rel=1e-3)
    assert not found.ok
    assert layer.kind == kind.__name__
    assert "is off by 5e-02" in found.says
    assert "float32 explains" in found.says
    assert "so the backward pass is wrong" in found.says
    assert " off\n" in repr(found)
    frame = found.to_dataframe()
    steps = {"∂E/∂x, single steps"} if "x" in off else set()
    assert set(frame[~frame.ok].quantity) == {f"∂E/∂{q}" for q in off} | steps


def test_a_gradient_that_is_missing_is_an_error_of_one() -> None:
    torch.manual_seed(0)
    assert uv.audit(Last(lstm(NoGradient)), X, Y, loss=mse).layers["rnn"].errors["x"] == 1.0


class Truncated(nn.GRU):
    """Backpropagation through the last steps only."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        with torch.no_grad():
            first, h = super().forward(input[:, :-35], hx)
        last, h = super().forward(input[:, -35:], h)
        return torch.cat([first, last], 1), h


def test_a_gradient_that_is_cut_short_is_caught_where_it_has_vanished() -> None:
    torch.manual_seed(0)
    model, x = Last(Truncated(5, 8, batch_first=True)), torch.randn(4, 60, 5)
    found = uv.audit(model, x, Y, loss=mse)
    layer = found.layers["rnn"]
    assert layer.worst <= layer.explained, "the norms do not show it"
    assert layer.step is not None
    assert layer.step.worst == pytest.approx(1.0)
    assert not found.ok
    assert "at single steps" in found.says
    assert uv.audit(Last(nn.GRU(5, 8, batch_first=True)), x, Y, loss=mse).ok


def test_what_it_says_and_how_it_looks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(lstm(num_layers=2, bidirectional=True))
    found = uv.audit(model, X, loss=flat)
    assert found.says.startswith("The gradients of 1 recurrent layer agree with the float64 reference: the largest")
    assert "W_hh l1.reverse" in found.layers["0"].errors
    assert repr(found).splitlines()[0].split() == [
        "layer",
        "kind",
        "dtype",
        "worst",
        "gradient",
        "error",
        "output",
        "explained",
    ]
    frame = found.to_dataframe()
    assert list(frame.columns) == ["layer", "kind", "dtype", "quantity", "error", "explained", "ok"]
    assert len(frame) == 16 + 3
    assert frame.error.max() >= found.worst
    assert list(uv.audit(lstm(), X, loss=flat).layers) == ["LSTM"]


def test_not_finite() -> None:
    x = X.clone()
    x[0, 0, 0] = math.nan
    found = uv.audit(Last(lstm()), x, Y, loss=mse)
    assert math.isnan(found.worst)
    assert "the float64 reference is not finite" in found.says

    class Broken(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            v = input.clone()
            v.register_hook(lambda d: d * math.nan)
            return super().forward(v, hx)

    found = uv.audit(Last(lstm(Broken)), X, Y, loss=mse)
    assert found.worst == math.inf
    assert "∂E/∂x is off by inf" in found.says


def test_packed_inside_a_model_with_lengths_for_ours() -> None:
    class Packs(Last):
        def forward(self, x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, torch.tensor([3, 12, 1, 7]), batch_first=True, enforce_sorted=False)
            return self.head(self.rnn(packed)[1][0][-1])

    class Lengths(Last):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x, lengths=[3, 0, 1, 7])[1][0][-1])

    torch.manual_seed(0)
    assert uv.audit(Packs(lstm()), X, Y, loss=mse).ok
    found = uv.audit(Lengths(uv.accelerate(lstm())), X, Y, loss=mse)
    assert found.ok, found


@pytest.mark.parametrize("steps", [33, 100])
def test_long_sequences_of_different_length(steps: int) -> None:
    """The reference runs them in spans."""
    torch.manual_seed(0)
    layer = nn.GRU(5, 8, num_layers=2, bidirectional=True)
    lengths = torch.tensor([steps, 1, 32, 31, 64 % steps + 1])
    x = pack_padded_sequence(torch.randn(steps, 5, 5), lengths, enforce_sorted=False)
    for module in (layer, uv.accelerate(layer)):
        found = uv.audit(module, x, loss=flat)
        assert found.ok, found


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        uv.audit(3, X, loss=mse)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loss: expected a function .* got str"):
        uv.audit(Last(lstm()), X, loss="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch: expected"):
        uv.audit(Last(lstm()), loss=mse)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"got torch\.inference_mode; call it outside"):
        uv.audit(Last(lstm()), X, Y, loss=mse)
    with pytest.raises(ValueError, match="Linear has none"):
        uv.audit(nn.Linear(5, 1), X, loss=lambda y: y.sum())
    with pytest.raises(ValueError, match=r"loss: expected a scalar tensor, got \(4, 1\)"):
        uv.audit(Last(lstm()), X, loss=lambda y: y)
    with pytest.raises(ValueError, match="loss: expected one that depends"):
        uv.audit(Last(lstm()), X, loss=lambda y: y.detach().sum())


def test_pandas_is_asked_for_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = uv.audit(Last(lstm()), X, Y, loss=mse)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"pandas is not installed; run: pip install 'unvanish\[report\]'"):
        found.to_dataframe()


def test_a_batch_that_requires_gradients_gets_none() -> None:
    x = X.clone().requires_grad_()
    with contextlib.suppress(AttributeError):
        assert uv.audit(Last(lstm()), x, Y, loss=mse).ok
    assert x.grad is None


@pytest.mark.parametrize("name", ["peephole", "indrnn", "lem", "antisymmetric", "lif"])
def test_cells_of_the_zoo_are_audited(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = uv.nn.Recurrent(ZOO[name](), 5, 8, num_layers=2, bidirectional=True)
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0][-1])

    found = uv.audit(Model(), torch.randn(9, 4, 5), torch.randn(4, 2), loss=nn.functional.mse_loss)
    assert found.ok
    assert set(found.layers["layer"].errors) >= {"W_ih", "x"}
