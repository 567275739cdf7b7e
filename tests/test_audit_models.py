"""An audit of whole models: layers with a forward of their own, shared weights, parametrizations, compiled models."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import unvanish as uv
from tests.audit_subjects import Last, Loop, X, Y, lstm, mse, wrong


class Scaled(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(2 * input, hx)


class OnlyOutput(nn.LSTM):
    def forward(self, input: Any) -> Any:  # type: ignore[override]
        return super().forward(input)[0]


class Three(nn.LSTM):
    def forward(self, input: Any) -> Any:  # type: ignore[override]
        y, s = super().forward(input)
        return y, s, y.mean()


class Named(nn.LSTM):
    def forward(self, frames: Any, mask: Any = None) -> Any:  # type: ignore[override]
        return super().forward(frames if mask is None else frames * mask)


class BothWays(nn.LSTM):
    """Two calls with the same weights."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        y, s = super().forward(input, hx)
        return super().forward(input.flip(1), s)[0] + y, s


class Registers(nn.LSTM):
    made: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Registers.made.append(cls)


@pytest.mark.parametrize("kind", [Scaled, OnlyOutput, Three, Named, BothWays, Registers])
def test_a_forward_of_its_own(kind: Any) -> None:
    """What torch's forward was given inside it is compared."""
    torch.manual_seed(0)
    found = uv.audit(Last(lstm(kind)), X, Y, loss=mse)
    assert found.ok, found
    assert found.layers["rnn"].output is not None
    assert Registers.made == []


def test_a_forward_that_computes_something_else() -> None:
    class Own(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return input @ self.weight_ih_l0[:8].T, (hx, hx)

    class OwnPair(Own):
        def forward(self, input: Any, hx: Any = None) -> Any:
            y = super().forward(input)[0]
            return y, (y[:, -1][None], y[:, -1][None])

    for kind, says in ((Own, "returns something else than"), (OwnPair, "computes something else than the layer it")):
        found = uv.audit(Last(lstm(kind)), X, Y, loss=mse)
        assert says in found.skipped["rnn"]
        assert found.says == "No recurrent layer could be audited."
        assert not found.ok
        assert math.isnan(found.worst)


def test_equations_that_are_not_known() -> None:
    class Cell(nn.RNNCellBase):
        def __init__(self) -> None:
            super().__init__(5, 8, bias=True, num_chunks=2)

        def forward(self, x: Tensor, h: Any = None) -> Tensor:
            return (x @ self.weight_ih[:8].T).tanh()

    class Layer(nn.RNNBase):
        def __init__(self, mode: str) -> None:
            super().__init__("LSTM", 5, 8, batch_first=True)
            self.mode = mode

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight_ih_l0[:8].T).tanh()

    class More(nn.LSTM):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.extra = nn.Parameter(torch.zeros(8))
            self._flat_weights_names.append("extra")
            self._init_flat_weights()

        def forward(self, input: Any, hx: Any = None) -> Any:
            return (input @ self.weight_ih_l0[:8].T).tanh(), hx

    assert "equations of Cell are not known" in uv.audit(Loop(Cell()), X, Y, loss=mse).skipped["cell"]
    assert "equations of Layer are not known" in uv.audit(Last(Layer("MINE")), X, Y, loss=mse).skipped["rnn"]
    assert "computes something else" in uv.audit(Last(Layer("LSTM")), X, Y, loss=mse).skipped["rnn"]
    assert "it has 5 weights, where a LSTM" in uv.audit(Last(lstm(More)), X, Y, loss=mse).skipped["rnn"]


def test_a_wrong_output_is_told_from_a_wrong_gradient() -> None:
    torch.manual_seed(0)
    layer = lstm()
    found = uv.audit(Last(layer), X, Y, loss=mse)
    from dataclasses import replace

    wrong_output = replace(found.layers["rnn"], output=0.1)
    assert "the output is off by 1e-01, float32 explains" in wrong_output.says


class Several(nn.Module):
    """Two calls, the weight in the loss too, user hooks, a call of forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused, self.frozen = lstm(), lstm(), lstm(), lstm()
        self.frozen.requires_grad_(False)
        self.a.register_forward_pre_hook(lambda m, args: (args[0] + 1, *args[1:]))
        self.a.register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))

    def forward(self, x: Tensor) -> Tensor:
        s = self.a(x)[1]
        y2, _ = self.a(x.flip(1), s)
        with torch.no_grad():
            self.unused(x)
        return (self.b.forward(y2[..., :5])[0] + self.frozen(x)[0])[:, -1:, 0] + self.a.weight_hh_l0.square().sum()


def test_calls_and_other_uses_of_a_weight_are_kept_apart() -> None:
    torch.manual_seed(0)
    found = uv.audit(Several(), X, Y, loss=mse)
    assert found.ok, found
    assert found.layers["a"].calls == 2
    assert list(found.layers["frozen"].errors) == ["x"]
    assert list(found.skipped) == ["unused"]
    assert "without gradients" in found.skipped["unused"]


def test_parametrized_weights_and_what_can_not_be_copied() -> None:
    torch.manual_seed(0)
    model = Last(lstm())
    parametrizations.spectral_norm(model.rnn, "weight_hh_l0")
    model(X)  # leaves non-leaf tensors behind, which deepcopy refuses
    model.kept = [model(X)]  # type: ignore[assignment]
    found = uv.audit(model, X, Y, loss=mse)
    assert found.ok, found
    assert "W_hh" in found.layers["rnn"].errors
    cell = nn.GRUCell(5, 8)
    parametrizations.orthogonal(cell, "weight_hh")
    found = uv.audit(Loop(cell), X, Y, loss=mse)
    assert found.ok, found
    assert "W_hh" not in found.layers["cell"].errors
    assert "parametrized" in found.skipped["cell.weight_hh"]


@pytest.mark.filterwarnings("ignore")
def test_old_weight_norm_checkpoints_and_scripted_parts() -> None:
    torch.manual_seed(0)
    model = Last(nn.utils.weight_norm(lstm(), "weight_hh_l0"))
    model(X)
    assert uv.audit(model, X, Y, loss=mse).ok

    class Checkpointed(Last):
        reentrant = False

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            y: Any = checkpoint(self.rnn, x, use_reentrant=self.reentrant)
            return self.head(y[0][:, -1])

    model = Checkpointed(lstm())
    assert uv.audit(model, X, Y, loss=mse).ok
    model.reentrant = True
    assert "reentrant checkpoint" in uv.audit(model, X, Y, loss=mse).skipped["rnn"]
    scripted = Last(torch.jit.script(Last(lstm(), 8).eval()))
    scripted.head = nn.Linear(1, 1)
    scripted.forward = lambda x: scripted.head(scripted.rnn(x))  # type: ignore[method-assign]
    assert uv.audit(scripted, X, Y, loss=mse).skipped == {"rnn.rnn": "it is scripted"}


def wrong_backend(gm: Any, inputs: Any) -> Any:
    def run(*args: Any) -> Any:
        return gm(*(wrong(v) if isinstance(v, Tensor) and v.requires_grad else v for v in args))

    return run


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model(ours: bool, fullgraph: bool) -> None:
    torch.manual_seed(0)
    model = Last(lstm(dropout=0.2, num_layers=2) if not ours else uv.nn.LSTM(5, 8, batch_first=True))
    with torch._dynamo.config.patch(allow_rnn=True):
        right = uv.audit(torch.compile(model, backend="eager", fullgraph=fullgraph), X, Y, loss=mse)  # type: ignore[arg-type]
        off = uv.audit(torch.compile(model, backend=wrong_backend, fullgraph=fullgraph), X, Y, loss=mse)  # type: ignore[arg-type]
    assert right.ok, right
    assert not off.ok, off
    assert off.worst == pytest.approx(0.05, rel=1e-3)
    assert list(off.layers) == ["rnn"]
    assert off.layers["rnn"].output is None
    assert "–" in repr(off)
    assert "compiled graph" in off.skipped["rnn.x"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_whose_loss_also_has_the_weight() -> None:
    class Penalised(Last):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.rnn.weight_hh_l0.square().sum()  # type: ignore[union-attr]

    torch.manual_seed(0)
    with torch._dynamo.config.patch(allow_rnn=True):
        found = uv.audit(torch.compile(Penalised(lstm()), backend="eager"), X, Y, loss=mse)  # type: ignore[arg-type]
    assert found.ok, found
    assert list(found.layers["rnn"].errors) == ["W_ih", "W_hh", "b_ih", "b_hh"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_that_can_not_be_compared() -> None:
    def other(gm: Any, inputs: Any) -> Any:
        return lambda *args: tuple(2 * v for v in gm(*args))

    model = Last(lstm())
    with torch._dynamo.config.patch(allow_rnn=True):
        found = uv.audit(torch.compile(model, backend=other), X, Y + 1, loss=mse)  # type: ignore[arg-type]
    assert "the compiled model's loss is" in found.skipped["rnn"]
    model.rnn.compile(backend="eager")
    assert "module.compile()" in uv.audit(model, X, Y, loss=mse).skipped["rnn"]
    assert model.rnn._compiled_call_impl is not None
    torch._dynamo.reset()
