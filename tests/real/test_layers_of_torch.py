"""Models of other packages whose recurrent layers are torch's, or subclasses of them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unvanish as uv
from tests.real.independent import expected

pytestmark = pytest.mark.real

Run = Callable[[nn.Module], Tensor]


def seeded(run: Run) -> Run:
    def call(model: nn.Module) -> Tensor:
        torch.manual_seed(1)
        return run(model)

    return call


def check(model: nn.Module, run: Run, *names: str, tolerance: float = 1e-9) -> uv.flow.Watch:
    """A training step is bitwise what it is without a watch, and each record is what autograd alone finds."""
    run = seeded(run)
    plain, twin = copy.deepcopy(model), copy.deepcopy(model)
    loss = run(plain)
    loss.backward()
    with uv.watch(model) as flow:
        watched = run(model)
        watched.backward()
    assert torch.equal(watched, loss)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
    assert set(flow) == set(names)
    for name in names:
        record = flow[name]
        assert record.valid, record.problem
        assert record.residual < tolerance
        twin.zero_grad()
        theirs = expected(twin, run, name)
        assert record.lengths.tolist() == [len(norms) for norms in theirs]
        for b, norms in enumerate(theirs):
            torch.testing.assert_close(
                record.dh[: len(norms), b], torch.tensor(norms).double(), rtol=100 * tolerance, atol=1e-12
            )
            assert not record.dh[len(norms) :, b].any()
        assert record.dh.any()
    return flow


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("lengths", [(12, 7, 5, 3), (11, 7, 5, 0), (0, 3, 9, 9)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_pytorch_forecasting_layers(kind: str, lengths: tuple[int, ...], dropout: float) -> None:
    package = pytest.importorskip("pytorch_forecasting.models.nn.rnn")
    torch.manual_seed(0)
    rnn = getattr(package, kind)(5, 6, 2, dropout=dropout, batch_first=True).double()
    x = torch.randn(4, 12, 5, dtype=torch.float64)

    def run(m: nn.Module) -> Tensor:
        y, state = m(x, lengths=torch.tensor(lengths), enforce_sorted=False)
        h = state if isinstance(state, Tensor) else torch.cat(state)
        return y.square().mean() + h.square().mean()

    flow = check(rnn, run, "l0", "l1")
    assert flow["l0"].lengths.tolist() == [max(n, 1) for n in lengths]


def forecasting_batch(**settings: Any) -> tuple[Any, Any]:
    pytest.importorskip("pytorch_forecasting")
    import numpy as np
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet

    rows = [
        {"t": t, "series": f"s{s}", "y": np.sin(0.5 * t + s) + 2, "x": 0.1 * t} for s in range(3) for t in range(24)
    ]
    data = TimeSeriesDataSet(
        pd.DataFrame(rows),
        time_idx="t",
        target="y",
        group_ids=["series"],
        min_encoder_length=2,
        max_encoder_length=8,
        max_prediction_length=3,
        time_varying_known_reals=["t"],
        time_varying_unknown_reals=["y"],
        **settings,
    )
    return data, next(iter(data.to_dataloader(train=True, batch_size=6, num_workers=0)))


@pytest.mark.parametrize("name", ["RecurrentNetwork", "DeepAR", "TemporalFusionTransformer"])
def test_pytorch_forecasting_models(name: str) -> None:
    data, (x, y) = forecasting_batch(**({"randomize_length": True} if name != "DeepAR" else {}))
    import pytorch_forecasting

    torch.manual_seed(0)
    sizes = {"hidden_size": 6, "dropout": 0.1}
    if name == "TemporalFusionTransformer":
        sizes |= {"attention_head_size": 2, "hidden_continuous_size": 4}
        layers = ["lstm_encoder.l0", "lstm_decoder.l0"]
    else:
        sizes |= {"rnn_layers": 2}
        layers = ["rnn.l0", "rnn.l1"]
    model = getattr(pytorch_forecasting, name).from_dataset(data, **sizes)

    def run(m: Any) -> Tensor:
        return m.loss(m(x)["prediction"], y)

    check(model.train(), run, *layers, tolerance=1e-4)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("python_based", [False, True])
def test_torchrl_modules_with_resets(kind: str, python_based: bool) -> None:
    modules = pytest.importorskip("torchrl.modules")
    from tensordict import TensorDict

    torch.manual_seed(0)
    module = getattr(modules, f"{kind}Module")(
        5, 6, in_key="x", out_key="y", python_based=python_based, default_recurrent_mode=True
    )
    starts = torch.zeros(3, 9, 1, dtype=torch.bool)
    starts[0, 4] = starts[2, 2] = starts[2, 7] = True
    x = torch.randn(3, 9, 5)

    def run(m: Any) -> Tensor:
        batch = TensorDict({"x": x, "is_init": starts}, [3, 9])
        return m(batch)["y"].square().mean()

    if python_based:
        model = nn.ModuleDict({"policy": module, "rnn": nn.RNN(2, 2)})
        with uv.watch(model) as flow:
            run(module).backward()
        assert "computes the recurrence by itself" in flow.skipped[f"policy.{kind.lower()}"]
        return
    flow = check(module, run, f"{kind.lower()}.l0", tolerance=1e-5)
    # One row per piece of a trajectory.
    assert sorted(flow[f"{kind.lower()}.l0"].lengths.tolist()) == [2, 2, 4, 5, 5, 9]


def test_sb3_contrib_recurrent_policy() -> None:
    policies = pytest.importorskip("sb3_contrib.common.recurrent.policies")
    from gymnasium.spaces import Box, Discrete
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    torch.manual_seed(0)
    policy = policies.RecurrentActorCriticPolicy(
        Box(-1.0, 1.0, (5,)), Discrete(3), lambda _: 1e-3, net_arch=[8], lstm_hidden_size=6
    )
    T, B = 9, 2
    zeros = torch.zeros(1, B, 6)
    states = RNNStates((zeros, zeros), (zeros, zeros))
    observations, actions = torch.randn(B * T, 5), torch.randint(3, (B * T,))
    starts = torch.zeros(B, T)
    starts[:, 0] = starts[0, 4] = 1

    def run(m: Any) -> Tensor:
        values, log_prob, _ = m.evaluate_actions(observations, actions, states, starts.flatten())
        return values.square().mean() - log_prob.mean()

    flow = check(policy, run, "lstm_actor.l0", "lstm_critic.l0", tolerance=1e-4)
    record = flow["lstm_actor.l0"]
    assert record.dh.shape == (T, B)
    assert [list(piece) for piece in record.pieces(0)] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert [len(piece) for piece in record.pieces(1)] == [9]


def test_sb3_contrib_learns_within_a_watch() -> None:
    contrib = pytest.importorskip("sb3_contrib")

    def learnt(watched: bool) -> dict[str, Tensor]:
        agent = contrib.RecurrentPPO(
            "MlpLstmPolicy", "CartPole-v1", n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu",
            policy_kwargs={"lstm_hidden_size": 8},
        )  # fmt: skip
        if watched:
            with uv.watch(agent.policy, keep=2) as flow:
                agent.learn(32)
            assert flow["lstm_actor.l0"].valid
        else:
            agent.learn(32)
        return agent.policy.state_dict()

    plain, watched = learnt(False), learnt(True)
    assert all(torch.equal(plain[key], value) for key, value in watched.items())


def test_gluonts_deepar() -> None:
    module = pytest.importorskip("gluonts.torch.model.deepar.module")
    torch.manual_seed(0)
    model = module.DeepARModel(
        "D", context_length=8, prediction_length=3, hidden_size=6, num_layers=2, dropout_rate=0.2, lags_seq=[1, 2, 3]
    )
    B, past = 4, model._past_length
    feats = {
        "feat_static_cat": torch.zeros(B, 1, dtype=torch.long),
        "feat_static_real": torch.randn(B, 1),
        "past_time_feat": torch.randn(B, past, 1),
        "past_target": torch.randn(B, past).abs(),
        "past_observed_values": torch.ones(B, past),
        "future_time_feat": torch.randn(B, 3, 1),
        "future_target": torch.randn(B, 3).abs(),
        "future_observed_values": torch.ones(B, 3),
    }
    check(model, lambda m: m.loss(**feats).mean(), "rnn.l0", "rnn.l1", tolerance=1e-4)


def usable(name: str) -> Any:
    """The package, or a skip; torchaudio comes compiled for one build of torch, and does not load in others."""
    return pytest.importorskip(
        name, reason=f"{name} is missing, or made for another torch", exc_type=(ImportError, OSError)
    )  # type: ignore[arg-type]


def test_torchaudio_tacotron2() -> None:
    models = usable("torchaudio.models")
    torch.manual_seed(0)
    model = models.Tacotron2(
        n_mels=4, n_symbol=10, symbol_embedding_dim=8, encoder_embedding_dim=8, encoder_n_convolution=1,
        attention_rnn_dim=8, attention_hidden_dim=6, attention_location_n_filter=2, attention_location_kernel_size=3,
        decoder_rnn_dim=8, prenet_dim=6, postnet_n_convolution=2, postnet_embedding_dim=6, gate_threshold=0.5,
        postnet_kernel_size=3, encoder_kernel_size=3,
    ).double()  # fmt: skip
    tokens, mel = torch.randint(10, (3, 7)), torch.randn(3, 4, 9, dtype=torch.float64)

    def run(m: Any) -> Tensor:
        out, post, gate, _ = m(tokens, torch.tensor([7, 5, 2]), mel, torch.tensor([9, 6, 6]))
        return (out - mel).square().mean() + (post - mel).square().mean() + gate.sigmoid().mean()

    check(model, run, "encoder.lstm.l0", "encoder.lstm.l0.reverse", "decoder.attention_rnn", "decoder.decoder_rnn")


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_speechbrain_wrappers(kind: str) -> None:
    nnet = usable("speechbrain.nnet.RNN")
    torch.manual_seed(0)
    model = getattr(nnet, kind)(hidden_size=6, input_size=5, num_layers=2, bidirectional=True, dropout=0.1).double()
    x = torch.randn(4, 9, 5, dtype=torch.float64)
    places = ["rnn.l0", "rnn.l0.reverse", "rnn.l1", "rnn.l1.reverse"]
    for lengths in (None, torch.tensor([1.0, 0.7, 0.5, 0.2])):
        model.zero_grad()
        check(model, lambda m, n=lengths: m(x, lengths=n)[0].square().mean(), *places)


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn"])
def test_speechbrain_attentional_decoder(kind: str) -> None:
    nnet = usable("speechbrain.nnet.RNN")
    torch.manual_seed(0)
    model = nnet.AttentionalRNNDecoder(
        rnn_type=kind, attn_type="content", hidden_size=6, attn_dim=4, num_layers=2, enc_dim=5, input_size=3
    ).double()
    x, enc = torch.randn(4, 6, 3, dtype=torch.float64), torch.randn(4, 8, 5, dtype=torch.float64)

    def run(m: Any) -> Tensor:
        return m(x, enc, torch.tensor([1.0, 0.9, 0.5, 0.4]))[0].square().mean()

    check(model, run, "rnn.rnn_cells.0", "rnn.rnn_cells.1")


def test_skorch_trains_within_a_watch() -> None:
    skorch = pytest.importorskip("skorch")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    x, y = torch.randn(12, 9, 5).numpy(), torch.randn(12, 1).numpy()

    def trained(watched: bool) -> Any:
        torch.manual_seed(0)
        net = skorch.NeuralNetRegressor(Net, max_epochs=2, batch_size=4, verbose=0, train_split=None).initialize()
        if watched:
            with uv.watch(net.module_) as flow:
                net.partial_fit(x, y)
            assert len(flow.passes("rnn.l0")) == 6
            assert all(record.valid and record.residual < 1e-4 for record in flow.passes("rnn.l0"))
        else:
            net.partial_fit(x, y)
        return net.module_.state_dict()

    plain, watched = trained(False), trained(True)
    assert all(torch.equal(plain[key], value) for key, value in watched.items())
    found = uv.diagnose(Net(), torch.from_numpy(x), torch.from_numpy(y), loss=nn.functional.mse_loss, budget=0)
    assert list(found.layers) == ["rnn.l0"]
