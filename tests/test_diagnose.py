"""What a diagnosis measures, of which layers, and what it refuses; nothing of the user's is touched."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import unvanish as uv
from unvanish import cures
from unvanish.diagnosis import Diagnosis, LayerDiagnosis
from unvanish.diagnosis.layer_inputs import capture

T, B, H = 60, 8, 24


class LastStep(nn.Module):
    """Answers from the last state."""

    def __init__(self, layer: nn.RNNBase, every: int | None = None) -> None:
        super().__init__()
        self.encoder, self.head, self.every = layer, nn.Linear(layer.hidden_size, 1), every

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        step = self.every or x.shape[1]
        for t in range(0, x.shape[1], step):
            y, state = self.encoder(x[:, t : t + step], state)
            state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        return self.head(y[:, -1])


def data(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(B, T, 3, generator=generator), torch.randn(B, 1, generator=generator)


def layer(kind: str, H: int = H, **options: Any) -> Any:
    torch.manual_seed(1)
    return getattr(nn, kind)(3, H, batch_first=True, **options)


def diagnose(model: nn.Module, x: Tensor | None = None, factor: float = 1.0, **options: Any) -> Diagnosis:
    given, y = data()
    return uv.diagnose(
        model, given if x is None else x, y, budget=0, loss=lambda a, b: factor * mse_loss(a, b), **options
    )


def relu(scale: float = 1.0) -> nn.RNN:
    return cures.identity_(layer("RNN", nonlinearity="relu"), scale)


def test_the_rate_is_the_rate() -> None:
    """A linear regime: tanh near 0, W_hh = s Q."""
    rnn = cures.orthogonal_(layer("RNN", bias=False), gain=0.9)
    x, y = data(scale=1e-6)
    found = uv.diagnose(LastStep(rnn), x, y, budget=0, loss=mse_loss)["encoder.l0"]
    assert found.rate == pytest.approx(math.log(0.9), rel=1e-6)
    assert found.half_life == pytest.approx(math.log(2) / -math.log(0.9), rel=1e-6)
    assert found.reach == int(math.log(0.01) / math.log(0.9))
    assert found.rate_interval == pytest.approx((found.rate, found.rate), abs=1e-6)
    assert found.curve[10] == pytest.approx(10 * math.log(0.9), rel=1e-6)


def test_the_verdict_turns_where_the_reach_ends() -> None:
    rnn = cures.orthogonal_(layer("RNN", bias=False), gain=0.9)
    x, y = data(scale=1e-6)
    reach = int(math.log(0.01) / math.log(0.9))
    verdicts = [
        uv.diagnose(LastStep(rnn), x, y, budget=0, loss=mse_loss, lag=lag)["encoder.l0"].verdict
        for lag in (reach, reach + 1)
    ]
    assert verdicts == ["healthy", "vanishes"]


def test_separate_sources_are_followed_where_the_error_enters_everywhere() -> None:
    class EveryStep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = cures.spectral_radius_(layer("RNN"), 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    found = uv.diagnose(EveryStep(), data()[0], torch.randn(B, T, H), budget=0, loss=mse_loss)["rnn.l0"]
    assert found.verdict == "vanishes"
    assert found.evidence["error_steps"] == 1.0


def test_the_lag_decides() -> None:
    model = LastStep(cures.forget_bias_(layer("LSTM"), 0.0))
    assert diagnose(model, lag=5)["encoder.l0"].verdict == "healthy"
    assert diagnose(model)["encoder.l0"].verdict == "vanishes"
    assert diagnose(model, lag=np.int64(5))["encoder.l0"].lag == 5
    asked = diagnose(model, lag=500)["encoder.l0"]
    assert asked.verdict == "undecided"
    assert f"the longest lag in the batch is {T - 1} steps" in asked.cause


def test_without_gradients_there_is_no_diagnosis() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="call it outside"):
        diagnose(LastStep(layer("LSTM")))


@settings(max_examples=20)
@given(
    kind=st.sampled_from(["RNN", "GRU", "LSTM"]),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    ours=st.booleans(),
    packed=st.booleans(),
)
def test_any_layer_and_nothing_of_the_users_is_touched(
    kind: str, layers: int, bidirectional: bool, ours: bool, packed: bool
) -> None:
    torch.manual_seed(0)
    family = getattr(uv.nn if ours else nn, kind)
    options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": True, "dropout": 0.3 * (layers > 1)}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = family(3, 6, **options)
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if packed else x
            _, final = self.rnn(given)
            return self.norm(final[0][-1] if kind == "LSTM" else final[-1])

    model = Model().train()
    x, y, lengths = torch.randn(5, 20, 3), torch.randn(5, 6), torch.tensor([20, 3, 7, 20, 12])
    model.norm.weight.grad = torch.ones(6)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = uv.diagnose(model, x, lengths, y, budget=0, loss=mse_loss)
    ends = ("", ".reverse")[: 1 + bidirectional]
    assert list(found) == [f"rnn.l{k}{end}" for k in range(layers) for end in ends]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert model.rnn.weight_ih_l0.grad is None
    assert model.norm.weight.grad.tolist() == [1.0] * 6
    assert not model.rnn._forward_hooks


def test_a_bare_layer_and_every_output() -> None:
    lstm = layer("LSTM")
    found = uv.diagnose(lstm, data()[0], budget=0, loss=lambda output: output[0].square().mean())
    assert found["l0"].verdict == "vanishes"
    frame = found.to_dataframe()
    assert frame.layer.tolist() == ["l0"]
    assert {"verdict", "carry_half_life", "survival"} <= set(frame.columns)
    assert found.prescriptions[0].cure.startswith("chrono_")
    verification = found.verify(found.prescriptions[0].apply(lstm))
    assert verification.to_dataframe().verdict_after.tolist() == ["healthy"]
    assert "vanishes" in repr(verification)
    with pytest.raises(KeyError, match="no layer 'l7'"):
        found["l7"]


def test_error_that_comes_in_through_the_cell_state_alone() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer("LSTM")

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[1][1][-1]

    found = uv.diagnose(Through(), data()[0], torch.randn(B, H), budget=0, loss=mse_loss)
    assert found["rnn.l0"].verdict == "vanishes"


def test_a_gradient_that_reaches_can_be_too_sharp_for_the_steps() -> None:
    sharp, mild = LastStep(relu(1.02)), LastStep(cures.chrono_(layer("LSTM"), T))

    def at(lr: float, model: nn.Module) -> LayerDiagnosis:
        return diagnose(model, optimizer=torch.optim.Adam(model.parameters(), lr=lr))["encoder.l0"]

    for lr, model, too_sensitive in ((3e-2, sharp, True), (3e-4, sharp, False), (3e-2, mild, False)):
        found = at(lr, model)
        assert found.verdict == "healthy"
        assert ("too sensitive" in found.cause) == too_sensitive
    once, tenfold = (at(lr, sharp).evidence["step_change"] for lr in (1e-3, 1e-2))
    assert tenfold == pytest.approx(10 * once)


def test_attention_reads_every_step_of_both_directions() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.rnn = nn.Embedding(9, 3), layer("LSTM", H=8, bidirectional=True)
            self.score, self.head = nn.Linear(16, 1), nn.Linear(16, 1)

        def forward(self, words: Tensor) -> Tensor:
            y, _ = self.rnn(self.embedding(words))
            return self.head((self.score(y).softmax(1) * y).sum(1))

    found = uv.diagnose(Attention(), torch.randint(9, (B, T)), torch.randn(B, 1), budget=0, loss=mse_loss)
    assert [d.verdict for d in found.values()] == ["vanishes", "vanishes"]
    assert all(d.evidence["error_steps"] == 1.0 and d.lag == T - 1 for d in found.values())


def test_a_direction_that_is_read_where_it_starts_is_undecided() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer("GRU", bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0][:, -1, :1] + self.rnn(x)[0][:, -1, H : H + 1]

    found = uv.diagnose(Last(), data()[0], data()[1], budget=0, loss=mse_loss)
    assert found["rnn.l0"].verdict == "vanishes"
    assert found["rnn.l0.reverse"].verdict == "undecided"
    assert "no gradient travels through it" in found["rnn.l0.reverse"].cause


def test_a_lower_reverse_layer_is_reached_through_the_layer_above() -> None:
    """The error made at the last step is at the lower reverse layer's first step too: by the forward layer above it,
    not by its own recurrence."""

    class Stacked(nn.Module):
        def __init__(self, final: bool) -> None:
            super().__init__()
            self.rnn, self.final = layer("GRU", H=8, num_layers=2, bidirectional=True), final

        def forward(self, x: Tensor) -> Tensor:
            y, h = self.rnn(x)
            return (h[-2] + h[-1])[:, :1] if self.final else y[:, -1, :1] + y[:, -1, 8:9]

    x, y = data()
    last, final = (uv.diagnose(Stacked(final), x, y, budget=0, loss=mse_loss) for final in (False, True))
    assert "no gradient travels through it" in last["rnn.l1.reverse"].cause
    lower = last["rnn.l0.reverse"]
    assert lower.verdict == "undecided"
    assert "reaches its others through the layer above alone" in lower.cause
    assert "read the reverse direction at the first step" in lower.cause
    assert all(d.verdict != "undecided" for d in final.values())
    rnn, source = layer("GRU", H=8, num_layers=2, bidirectional=True), x.transpose(0, 1)
    major = nn.GRU(3, 8, num_layers=2, bidirectional=True)
    major.load_state_dict(rnn.state_dict())
    reached = uv.flow.adjoint_map(major, source, sources=[T - 1], at="l0.reverse")
    assert bool(reached.norms[0, T - 5].gt(0).all())


def test_a_call_whose_output_is_thrown_away_is_passed_over() -> None:
    class Twice(LastStep):
        def forward(self, x: Tensor) -> Tensor:
            self.encoder(x)
            return super().forward(x)

    once, twice = (diagnose(kind(layer("LSTM")))["encoder.l0"] for kind in (LastStep, Twice))
    assert twice.verdict == once.verdict
    assert len(twice.curve) == len(once.curve)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = layer("LSTM", H=1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1][0][-1]


def test_the_samples_followed_may_all_be_shorter_than_the_longest() -> None:
    lengths = torch.tensor([9, 12, 7, 30, 60, 20, 11, 8])
    found = uv.diagnose(Packed(), data()[0], lengths, data()[1], budget=0, loss=mse_loss, samples=3)["rnn.l0"]
    assert found.lag == 11


def test_what_is_packed_is_not_told_to_pack() -> None:
    (x, y), lengths, model = data(), torch.tensor([60, 20, 18, 15, 22, 20, 19, 21]), Packed()
    found = uv.diagnose(model, x, lengths, y, budget=0, loss=mse_loss)["rnn.l0"]
    assert found.cause.startswith("forget gate")
    assert found.evidence["constant_tail"] == 0
    inputs = torch.cat([x[b, :n] for b, n in enumerate(lengths)]) @ model.rnn.weight_ih_l0.detach().T
    assert found.evidence["input_scale"] == pytest.approx(float(inputs.std()), rel=1e-5)
    # At the lag of 59 there is one sample only.
    assert math.isnan(found.rate_interval[0])
    assert found.rate_in_words == f"{found.rate:+.3g} nats per step"
    held = x.clone()
    held[:, 5:] = 1.0
    tail = uv.diagnose(model, held, lengths, y, budget=0, loss=mse_loss)["rnn.l0"].evidence["constant_tail"]
    assert tail == pytest.approx(14 / 20, abs=0.05)


def test_a_constrained_layer_is_diagnosed_and_only_advice_is_given() -> None:
    rnn = cures.constrain_(cures.spectral_radius_(layer("RNN"), 0.5), "spectral")
    found = diagnose(LastStep(rnn))
    assert found["encoder.l0"].verdict == "vanishes"
    assert [p.act for p in found.prescriptions] == [None]


@pytest.mark.parametrize(("samples", "steps"), [(B, 1), (B, 2), (1, T), (1, 1)])
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_too_little_evidence_is_undecided_and_gives_no_rate(samples: int, steps: int, kind: str) -> None:
    model, (x, y) = LastStep(layer(kind)), data()
    diagnosis = uv.diagnose(model, x[:samples, :steps], y[:samples], budget=0, loss=mse_loss)
    found = diagnosis["encoder.l0"]
    assert found.verdict == "undecided"
    assert ("needs at least 2 steps" if steps < 3 else "pass at least two") in found.cause
    assert math.isnan(found.rate)
    assert all(map(math.isnan, found.rate_interval))
    assert found.half_life is None
    assert not diagnosis.prescriptions
    assert "nats" not in repr(diagnosis)


def test_an_empty_batch_and_a_nan_are_named() -> None:
    model, (x, y) = LastStep(layer("LSTM")), data()
    for empty in (x[:0], x[:, :0], x[:, :, :0]):
        with pytest.raises(ValueError, match="batch: expected at least one sample and one step, got a tensor of shape"):
            uv.diagnose(model, empty, y[: len(empty)], budget=0, loss=mse_loss)
    spoilt = x.clone()
    spoilt[1, 2, 0] = math.nan
    for batch, where in (((spoilt, y), "input 0"), ((x, y * math.nan), "target 0")):
        found = uv.diagnose(model, *batch, budget=0, loss=mse_loss).findings[0]
        assert (found.code, found.where) == ("nan", where)
        assert "values" in found.proof
    with pytest.raises(TypeError, match="loss: expected a function"):
        uv.diagnose(model, x, y, budget=0, loss="mse")  # type: ignore[arg-type]


def test_what_can_not_be_diagnosed_is_an_error() -> None:
    x, y = data()

    class Beside(LastStep):
        def forward(self, x: Tensor) -> Tensor:
            self.encoder(x)
            return self.head(torch.ones(B, H))

    for model, why in ((nn.Linear(3, 1), "found none"), (Beside(layer("LSTM")), "does not depend on them")):
        found = uv.diagnose(model, x, x[..., :1].clone() if why == "found none" else y, budget=0, loss=mse_loss)
        assert not found.layers
        assert any("the gradient's reach was not measured" in n and why in n for n in found.notes)
    broken = LastStep(layer("LSTM"))
    nn.init.constant_(broken.encoder.weight_hh_l0, math.nan)
    nan = uv.diagnose(broken, x, y, budget=0, loss=mse_loss).findings[0]
    assert (nan.code, nan.where) == ("nan", "encoder.weight_hh_l0")
    model = LastStep(layer("LSTM"))
    with pytest.raises(ValueError, match=r"loss: expected a tensor with one number, got \(8, 1\)"):
        uv.diagnose(model, x, y, budget=0, loss=lambda a, b: a - b)
    divided = uv.diagnose(model, x, y, budget=0, loss=lambda a, b: (a - b).mean() / 0).findings[0]
    assert (divided.code, divided.where) == ("nan", "loss")
    cut = uv.diagnose(model, x, y, budget=0, loss=lambda a, b: a.detach().mean()).findings[0]
    assert cut.code == "parameters_unmoved"
    for lag in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="lag: expected a whole number of at least 1 step"):
            uv.diagnose(model, x, y, budget=0, loss=mse_loss, lag=lag)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples: expected a whole number of at least 1"):
        uv.diagnose(model, x, y, budget=0, loss=mse_loss, samples=0)
    infinite = x.clone()
    infinite[0, 0, 0] = math.inf
    assert uv.diagnose(model, infinite, y, budget=0, loss=mse_loss).findings[0].where == "input 0"
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        uv.diagnose("model", x, y, budget=0, loss=mse_loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got OrderedDict"):
        diagnose(model).verify(model.state_dict())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected the diagnosed one"):
        diagnose(model).prescriptions[0].apply(nn.Linear(1, 1))


def test_an_error_at_the_final_state_is_each_samples_own_last_steps() -> None:
    torch.manual_seed(0)
    lstm, lengths = nn.LSTM(2, 3, bidirectional=True), torch.tensor([2, 6, 4])
    packed = pack_padded_sequence(torch.randn(6, 3, 2), lengths, enforce_sorted=False)

    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = lstm

        def forward(self, x: PackedSequence) -> torch.Tensor:
            return self.lstm(x)[1][0]

    (found,), _ = capture(Ends(), lambda m: (m(packed) * torch.arange(1.0, 4.0)[:, None]).sum(), 0)
    expected = torch.zeros(6, 3, 6, dtype=torch.float64)
    for b, length in enumerate(lengths):
        expected[length - 1, b, :3] = b + 1
        expected[0, b, 3:] = b + 1
    assert torch.equal(found.error, expected)
