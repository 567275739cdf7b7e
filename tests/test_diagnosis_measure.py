"""What the measurement of a layer rests on, and what the exact tests run on."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unvanish as uv
from unvanish.diagnosis.exact.testbench import Bench
from unvanish.diagnosis.layer_inputs import capture
from unvanish.diagnosis.measure import measure
from unvanish.diagnosis.subject import Subject, out_of_eval_mode
from unvanish.nn.modules import layer_directions


class _Own(nn.GRU):
    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(2 * x, hx)


class _Classifier(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][-1])


def _subject(layer: nn.RNNBase) -> Subject:
    x, y = torch.randn(9, 12, 3), torch.randint(2, (12,))
    return Subject(_Classifier(layer), (x,), y, nn.functional.cross_entropy)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_sensitivity_is_that_of_the_last_source(kind: type[nn.RNNBase], bidirectional: bool) -> None:
    torch.manual_seed(0)
    subject = _subject(kind(3, 5, num_layers=2, bidirectional=bidirectional))
    (given,), _ = capture(subject.model, subject.loss, seed=0)
    for place, found in zip(layer_directions(given.layer), measure(given, None, 16, 0, 3e-3), strict=True):
        error, weights = torch.zeros_like(given.error), [w for w in place.weights[:2] if w is not None]
        error[-1] = given.error[-1]
        gradient = uv.flow.source_gradients(given.layer, given.x, error=error, at=place.name)
        h = given.layer(given.x)[0][-1]
        expected = float(gradient.norms[0]) * math.hypot(*(float(w.norm()) for w in weights))
        expected /= float((error[-1].norm(dim=-1) * h.norm(dim=-1)).sum())
        assert found.evidence["sensitivity"] == pytest.approx(expected, rel=1e-10)
        assert not any(w.requires_grad for w in weights)


def test_a_gradient_beyond_float64_is_told_as_its_end() -> None:
    torch.manual_seed(0)
    layer = nn.RNN(3, 4, nonlinearity="relu", bias=False)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(20 * torch.eye(4))
        layer.weight_ih_l0.abs_()
    x = torch.zeros(260, 12, 3, dtype=torch.float64)
    x[0] = 1e-300
    model = _Classifier(layer).double()
    (given,), _ = capture(model, lambda m: m.layer(x)[0][-1].sum(), seed=0)
    (found,) = measure(given, None, 16, 0, 3e-3)
    # 20²⁶⁰ = 10³³⁸ is no float64; the state, which began at 10⁻³⁰⁰, is one.
    assert 1e200 < found.evidence["sensitivity"] < math.inf


def test_the_training_pass_is_bitwise_the_users() -> None:
    torch.manual_seed(0)
    model, x = _Classifier(nn.LSTM(3, 20)), torch.randn(60, 4, 3)
    target = model(x).detach()
    # A square root at exactly 0 has no finite slope; anything but torch's own kernels lands beside it.
    subject = Subject(model, (x,), target, lambda z, y: (z - y).square().mean().sqrt())
    done = Bench(subject).training
    assert torch.equal(done.answers[0], target)
    assert uv.diagnose(model, x, target, loss=subject.loss_function, budget=0).findings[0].code == "nan"


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("training", [True, False])
def test_no_layer_goes_back_in_eval_mode_as_cudnn_can_not(
    kind: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    gone_back: list[bool] = []

    def run(self: nn.RNNBase, *given: Any, **options: Any) -> Any:
        y, final = forward(self, *given, **options)
        if y.requires_grad:
            y.register_hook(lambda _: gone_back.append(self.training))
        return y, final

    ours = getattr(uv.nn, kind)
    forward = ours.forward
    monkeypatch.setattr(ours, "forward", run)
    layer = ours(3, 5, num_layers=2, dropout=0.5)
    layer.h_detach = 0.5
    found = uv.diagnose(
        _Classifier(layer).train(training), torch.randn(9, 12, 3), torch.randint(2, (12,)),
        loss=nn.functional.cross_entropy, budget=0,
    )  # fmt: skip
    assert not any("not tested" in note or "not measured" in note for note in found.notes)
    # Three passes are the user's own, in the user's mode: the training pass, and two in a row that carry a state.
    assert gone_back.count(False) <= (0 if training else 3)
    assert True in gone_back


def test_what_goes_back_instead_of_a_layer_in_eval_mode_is_the_same_function() -> None:
    torch.manual_seed(0)
    layer, x = uv.nn.LSTM(3, 5, num_layers=2, dropout=0.5).eval(), torch.randn(9, 4, 3)
    layer.h_detach = 0.5
    twin = out_of_eval_mode(copy.deepcopy(layer))
    expected, found = (
        (y := m(x)[0], *torch.autograd.grad(y.square().sum(), list(m.parameters()))) for m in (layer, twin)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert twin.training
    assert out_of_eval_mode(layer.train()).dropout == 0.5, "in training nothing is changed"


@pytest.mark.parametrize(("layer", "ours"), [(nn.LSTM(3, 4), True), (nn.GRU(3, 4), True), (_Own(3, 4), False)])
def test_exact_tests_run_on_our_engine_where_it_is_the_same_layer(layer: nn.RNNBase, ours: bool) -> None:
    subject = _subject(layer)
    bench = Bench(subject)
    assert isinstance(bench.model.layer, uv.nn.LSTM | uv.nn.GRU) is ours
    assert type(subject.model.layer) is type(layer)
    (answers,), args = bench.run(), bench.given[0]
    with torch.no_grad():
        torch.testing.assert_close(answers, subject.model.double().eval()(*args), rtol=1e-12, atol=1e-14)
