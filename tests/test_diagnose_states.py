"""diagnose of states that are no torch layer's: named by their module, or marked."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import unvanish as uv
from unvanish.diagnosis import Diagnosis

T, H = 30, 8


class Step(nn.Module):
    """A cell of another library: (x_t, h) → (output, h), h = decay · h + W x_t."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.w, self.decay = nn.Linear(3, H), decay

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.decay * h + self.w(x)
        return h.relu(), h


class Loop(nn.Module):
    def __init__(self, decay: float, mark: bool = False, cut: bool = False) -> None:
        super().__init__()
        self.cell, self.head, self.mark, self.cut = Step(decay), nn.Linear(H, 2), mark, cut

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), H)
        for t in range(x.shape[1]):
            _, h = self.cell(x[:, t], h)
            if self.cut:
                h = h.detach()
            if self.mark:
                h = uv.mark(h, "mine")
        return self.head(h)


def diagnose(model: nn.Module, **options: Any) -> Diagnosis:
    torch.manual_seed(0)
    x = torch.randn(40, T, 3)
    return uv.diagnose(model, x, (x[:, -1, 0] > 0).long(), loss=cross_entropy, budget=0, **options)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(("decay", "verdict"), [(0.99, "healthy"), (0.5, "vanishes"), (1.5, "explodes")])
def test_rate_and_reach_are_those_of_the_step(decay: float, verdict: str, marked: bool) -> None:
    found = diagnose(Loop(decay, marked), states={} if marked else {"cell": 1})
    (layer,) = found.layers.values()
    assert layer.name == ("mine" if marked else "cell")
    assert layer.verdict == verdict
    assert layer.rate == pytest.approx(math.log(decay), rel=1e-4)
    assert layer.lag == T - 1
    assert layer.reach == min(T - 1, math.floor(math.log(0.01) / math.log(decay)) if decay < 1 else T - 1)
    assert ("explodes" in {f.code for f in found.findings}) is (verdict == "explodes")
    assert "no recurrent" not in str(found)


def test_a_state_beside_a_layer_of_torch() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.loop = nn.GRU(3, 3, batch_first=True), Loop(0.9)

        def forward(self, x: Tensor) -> Tensor:
            return self.loop(self.rnn(x)[0])

    assert set(diagnose(Both(), states={"loop.cell": 1}).layers) == {"rnn.l0", "loop.cell"}


def test_what_can_not_be_measured_is_noted() -> None:
    notes = "\n".join(diagnose(Loop(0.9, mark=True, cut=True)).notes)
    assert "mine: not measured" in notes
    assert "requires no gradient" in notes
    with pytest.raises(ValueError, match="states"):
        diagnose(Loop(0.9), states={"nothing": 1})


def test_a_gradient_that_is_not_finite_is_noted() -> None:
    class Rooted(Loop):
        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), H)
            for t in range(x.shape[1]):
                h = uv.mark((self.cell(x[:, t], h)[1] * 0).sqrt(), "mine")
            return self.head(h)

    found = diagnose(Rooted(0.9))
    assert "mine: not measured: the gradient that comes back to it is NaN" in "\n".join(found.notes)
    assert found.findings[0].code == "nan"


def test_the_model_stays_as_it_was() -> None:
    model = Loop(0.9, mark=True)
    before = {name: v.clone() for name, v in model.state_dict().items()}
    diagnose(model, states={"cell": 1})
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.cell._forward_hooks
