"""A cell in a loop is diagnosed as the layer of the same weights; what can't be followed is said."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import unvanish as uv
from unvanish import cures

T, B, H = 40, 6, 12
OF = {"RNN": nn.RNNCell, "GRU": nn.GRUCell, "LSTM": nn.LSTMCell}


class Loop(nn.Module):
    """Steps a cell, or runs a layer of the same weights; every step is read, the last one by far the most."""

    def __init__(self, kind: str, looped: bool, every: int | None = None, keeps: float = 1.0, start: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.every, self.keeps, self.start = nn.Linear(H, 1), every, keeps, start
        layer = getattr(nn, kind)(3, H, batch_first=True)
        self.rnn: Any = OF[kind](3, H) if looped else layer
        if looped:
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(self.rnn, name, nn.Parameter(getattr(layer, f"{name}_l0").detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        first: Any = x.new_full((x.shape[0], H), 0.3)
        lstm = isinstance(self.rnn, nn.LSTM | nn.LSTMCell)
        state = ((first, first) if lstm else first) if self.start else None
        if isinstance(self.rnn, nn.RNNBase):
            if state is not None:
                state = tuple(s[None] for s in state) if isinstance(state, tuple) else state[None]
            return self._answer(list(self.rnn(x, state)[0].unbind(1)))
        seen = []
        for t in range(x.shape[1]):
            if self.every and t % self.every == 0 and state is not None:
                state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
            if self.keeps != 1 and state is not None:
                state = tuple(self.keeps * s for s in state) if isinstance(state, tuple) else self.keeps * state
            state = self.rnn(x[:, t], state)
            seen.append(state[0] if isinstance(state, tuple) else state)
        return self._answer(seen)

    def _answer(self, seen: list[Tensor]) -> Tensor:
        return self.head(seen[-1]) + 1e-3 * self.head(torch.stack(seen).mean(0))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, 3, generator=generator), torch.randn(B, 1, generator=generator)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("kind", list(OF))
def test_a_loop_is_diagnosed_as_the_layer(kind: str, start: bool) -> None:
    x, y = data()
    layer, loop = (Loop(kind, looped, start=start).double() for looped in (False, True))
    expected = uv.diagnose(layer, x.double(), y.double(), budget=0, loss=mse_loss, lag=10)["rnn.l0"]
    found = uv.diagnose(loop, x.double(), y.double(), budget=0, loss=mse_loss, lag=10)
    assert list(found) == ["rnn"]
    assert found.notes == ()
    own = found["rnn"]
    assert (own.cell, own.verdict, own.reach, own.lag) == (
        expected.cell, expected.verdict, expected.reach, expected.lag
    )  # fmt: skip
    assert own.curve == pytest.approx(expected.curve, rel=1e-9)
    for name, value in expected.evidence.items():
        assert own.evidence[name] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("kind", list(OF))
def test_its_first_prescription_heals_and_can_be_taken_back(kind: str) -> None:
    x, y = data()
    model = Loop(kind, looped=True)
    found = uv.diagnose(model, x, y, budget=0, loss=mse_loss)
    assert found["rnn"].verdict == "vanishes"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = found.prescriptions[0]
    assert first.heals
    assert found.verify(first.apply(model)).cured
    first.undo(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_detached_state_is_a_cut() -> None:
    x, y = data()
    model = Loop("LSTM", looped=True, every=10)
    cures.chrono_(model.rnn, T)
    found = uv.diagnose(model, x, y, budget=0, loss=mse_loss)["rnn"]
    assert found.verdict == "vanishes"
    assert found.cause.startswith("detached: the state is detached 3 times")


def test_what_can_not_be_followed_is_said() -> None:
    x, y = data()
    alone = uv.diagnose(Loop("GRU", looped=True, keeps=0.9), x, y, budget=0, loss=mse_loss)
    assert not alone.layers
    assert "rnn: not measured: it is never given exactly the state that it" in alone.notes[0]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = cures.chrono_(nn.LSTM(3, 3, batch_first=True), T)
            self.decoder = Loop("GRU", looped=True, keeps=0.9)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x)[0])

    model = Both()
    found = uv.diagnose(model, x, y, budget=0, loss=mse_loss)
    assert list(found) == ["encoder.l0"]
    assert found.notes[0].startswith("decoder.rnn: not measured")
    assert found.notes[0] in repr(found)
    model.decoder.keeps = 1.0
    both = uv.diagnose(model, x, y, budget=0, loss=mse_loss)
    assert list(both) == ["encoder.l0", "decoder.rnn"]
    assert both.notes == ()
