"""Models of other packages, each with a training step of its own: `SUBJECTS`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

import unvanish as uv

T, B, H = 9, 4, 6
Step = Callable[[Any], Tensor]
"""a model → its loss on a batch"""


@dataclass
class Subject:
    """A model and its loss."""

    model: nn.Module
    loss: Step
    records: list[str]
    states: dict[str, Any] = field(default_factory=dict)
    """as for `uv.watch`, where its cells are its own"""
    tolerance: float = 1e-4
    copies: bool = True
    """whether a deep copy of it computes what it does"""
    own_trainer: Any = None
    """the GradientFlow that was a callback of the package's own training, where that is one of Lightning's"""


def batch(features: int = 5, time_major: bool = True) -> Tensor:
    shape = (T, B, features) if time_major else (B, T, features)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def usable(name: str) -> Any:
    """The package, or a skip; torchaudio comes compiled for one build of torch, and does not load in others."""
    return pytest.importorskip(name, reason=f"{name} is missing, or made for another torch",
                               exc_type=(ImportError, OSError))  # type: ignore[arg-type] # fmt: skip


class Readout(nn.Module):
    """A recurrent part of a package, and a read-out of its last step."""

    def __init__(self, layer: nn.Module, batch_first: bool = False) -> None:
        super().__init__()
        self.layer, self.batch_first = layer, batch_first
        self.head = nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        while not isinstance(out, Tensor):
            out = out[0]
        return self.head(out[:, -1] if self.batch_first else out[-1])


class Stepped(nn.Module):
    """A cell of a package that is called once per step; `advance(cell, x, state)` gives (output, state)."""

    def __init__(self, cell: nn.Module, advance: Callable[..., tuple[Tensor, Any]], features: int = 5) -> None:
        super().__init__()
        self.inner, self.cell, self.advance = nn.Linear(features, H), cell, advance
        self.head = nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        state, total = None, torch.zeros(())
        getattr(self.cell, "reset_mem", lambda: None)()
        for row in x:
            out, state = self.advance(self.cell, self.inner(row), state)
            total = total + out
        return self.head(total)


def squared(x: Tensor) -> Step:
    return lambda m: (m(x) - 1.0).square().mean()


class Series(lightning.Callback):
    """Keeps the first batch of a training."""

    def __init__(self) -> None:
        self.batch: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch if self.batch is None else self.batch


def listeners() -> list[lightning.Callback]:
    """Callbacks for a package's own training."""
    return [Series(), uv.flow.GradientFlow(every=1, pictures=False)]


def trained_module(module: Any, callbacks: list[Any], records: list[str]) -> Subject:
    """A Lightning module after a training of one step, whose loss is its `training_step`."""
    module.trainer = None
    given = next(c.batch for c in callbacks if isinstance(c, Series))
    flow = next(c for c in callbacks if isinstance(c, uv.flow.GradientFlow))

    def loss(m: Any) -> Tensor:
        out = m.training_step(given, 0)
        return out["loss"] if isinstance(out, dict) else out

    module.train()
    for p in module.parameters():
        p.grad = None
    return Subject(module, loss, records, own_trainer=flow)


SILENT = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip


def forecasting(name: str) -> Subject:
    package = pytest.importorskip("pytorch_forecasting")
    import numpy as np
    import pandas as pd

    rows = [
        {"t": t, "series": f"s{s}", "y": np.sin(0.5 * t + s) + 2, "x": 0.1 * t} for s in range(3) for t in range(24)
    ]
    data = package.TimeSeriesDataSet(
        pd.DataFrame(rows), time_idx="t", target="y", group_ids=["series"], min_encoder_length=2,
        max_encoder_length=8, max_prediction_length=3, time_varying_known_reals=["t"],
        time_varying_unknown_reals=["y"], **({} if name == "DeepAR" else {"randomize_length": True}),
    )  # fmt: skip
    x, y = next(iter(data.to_dataloader(train=True, batch_size=6, num_workers=0)))
    sizes, records = {"hidden_size": H, "dropout": 0.1}, ["rnn.l0", "rnn.l1"]
    if name == "TemporalFusionTransformer":
        sizes |= {"attention_head_size": 2, "hidden_continuous_size": 4}
        records = ["lstm_encoder.l0", "lstm_decoder.l0"]
    else:
        sizes |= {"rnn_layers": 2}
    model = getattr(package, name).from_dataset(data, **sizes).train()
    return Subject(model, lambda m: m.loss(m(x)["prediction"], y), records)


def darts(name: str, records: list[str], **options: Any) -> Subject:
    package = pytest.importorskip("darts")
    models = pytest.importorskip("darts.models")
    import numpy as np

    callbacks = listeners()
    series = package.TimeSeries.from_values(np.sin(0.4 * np.arange(60))[:, None].astype(np.float32))
    model = getattr(models, name)(
        input_chunk_length=8, n_epochs=1, batch_size=8, random_state=0,
        pl_trainer_kwargs=SILENT | {"callbacks": callbacks, "max_steps": 1}, **options,
    )  # fmt: skip
    model.fit(series)
    return trained_module(model.model, callbacks, records)


def neuralforecast(name: str, records: list[str], **options: Any) -> Subject:
    package = pytest.importorskip("neuralforecast")
    models = pytest.importorskip("neuralforecast.models")
    import numpy as np
    import pandas as pd

    times = pd.date_range("2020-01-01", periods=40, freq="D")
    frame = pd.concat(
        [pd.DataFrame({"unique_id": f"s{s}", "ds": times, "y": np.sin(0.4 * np.arange(40) + s)}) for s in range(3)]
    )
    silent = {key: value for key, value in SILENT.items() if key != "enable_checkpointing"}
    model = getattr(models, name)(
        h=3, input_size=8, max_steps=1, batch_size=4, windows_batch_size=8, scaler_type="identity", random_seed=1,
        callbacks=listeners(), enable_checkpointing=False, **silent, **options,
    )  # fmt: skip
    forecast = package.NeuralForecast(models=[model], freq="D")
    forecast.fit(frame)
    # It trains copies of the model, and of the callbacks.
    return trained_module(forecast.models[0], forecast.models[0].trainer_kwargs["callbacks"], records)


def gluonts() -> Subject:
    module = pytest.importorskip("gluonts.torch.model.deepar.module")
    model = module.DeepARModel(
        "D", context_length=8, prediction_length=3, hidden_size=H, num_layers=2, dropout_rate=0.2, lags_seq=[1, 2, 3]
    )
    past = model._past_length
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
    return Subject(model, lambda m: m.loss(**feats).mean(), ["rnn.l0", "rnn.l1"])


def torchrl(kind: str) -> Subject:
    modules = pytest.importorskip("torchrl.modules")
    from tensordict import TensorDict

    module = getattr(modules, f"{kind}Module")(5, H, in_key="x", out_key="y", default_recurrent_mode=True)
    starts = torch.zeros(3, T, 1, dtype=torch.bool)
    starts[0, 4] = starts[2, 2] = starts[2, 7] = True
    x = torch.randn(3, T, 5)
    loss = lambda m: m(TensorDict({"x": x, "is_init": starts}, [3, T]))["y"].square().mean()  # noqa: E731
    return Subject(module, loss, [f"{kind.lower()}.l0"])


def sb3() -> Subject:
    policies = pytest.importorskip("sb3_contrib.common.recurrent.policies")
    from gymnasium.spaces import Box, Discrete
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    policy = policies.RecurrentActorCriticPolicy(
        Box(-1.0, 1.0, (5,)), Discrete(3), lambda _: 1e-3, net_arch=[8], lstm_hidden_size=H
    )
    zeros = torch.zeros(1, 2, H)
    states = RNNStates((zeros, zeros), (zeros, zeros))
    observations, actions = torch.randn(2 * T, 5), torch.randint(3, (2 * T,))
    starts = torch.zeros(2, T)
    starts[:, 0] = starts[0, 4] = 1

    def loss(m: Any) -> Tensor:
        values, log_prob, _ = m.evaluate_actions(observations, actions, states, starts.flatten())
        return values.square().mean() - log_prob.mean()

    return Subject(policy, loss, ["lstm_actor.l0", "lstm_critic.l0"])


def tacotron() -> Subject:
    models = usable("torchaudio.models")
    model = models.Tacotron2(
        n_mels=4, n_symbol=10, symbol_embedding_dim=8, encoder_embedding_dim=8, encoder_n_convolution=1,
        attention_rnn_dim=8, attention_hidden_dim=6, attention_location_n_filter=2, attention_location_kernel_size=3,
        decoder_rnn_dim=8, prenet_dim=6, postnet_n_convolution=2, postnet_embedding_dim=6, gate_threshold=0.5,
        postnet_kernel_size=3, encoder_kernel_size=3,
    )  # fmt: skip
    tokens, mel = torch.randint(10, (3, 7)), torch.randn(3, 4, T)

    def loss(m: Any) -> Tensor:
        out, post, gate, _ = m(tokens, torch.tensor([7, 5, 2]), mel, torch.tensor([9, 6, 6]))
        return (out - mel).square().mean() + (post - mel).square().mean() + gate.sigmoid().mean()

    places = ["encoder.lstm.l0", "encoder.lstm.l0.reverse", "decoder.attention_rnn", "decoder.decoder_rnn"]
    return Subject(model, loss, places)


def speechbrain_lstm() -> Subject:
    nnet = usable("speechbrain.nnet.RNN")
    model = nnet.LSTM(hidden_size=H, input_size=5, num_layers=2, bidirectional=True, dropout=0.1)
    x = batch(time_major=False)
    loss = lambda m: m(x, lengths=torch.tensor([1.0, 0.7, 0.5, 0.2]))[0].square().mean()  # noqa: E731
    return Subject(model, loss, ["rnn.l0", "rnn.l0.reverse", "rnn.l1", "rnn.l1.reverse"])


def speechbrain_decoder() -> Subject:
    nnet = usable("speechbrain.nnet.RNN")
    model = nnet.AttentionalRNNDecoder(
        rnn_type="gru", attn_type="content", hidden_size=H, attn_dim=4, num_layers=2, enc_dim=5, input_size=3
    )
    x, enc = batch(3, time_major=False), batch(time_major=False)
    loss = lambda m: m(x, enc, torch.tensor([1.0, 0.9, 0.5, 0.4]))[0].square().mean()  # noqa: E731
    return Subject(model, loss, ["rnn.rnn_cells.0", "rnn.rnn_cells.1"])


def skorch() -> Subject:
    package = pytest.importorskip("skorch")
    net = package.NeuralNetRegressor(
        Readout, module__layer=nn.GRU(5, H, batch_first=True), module__batch_first=True, verbose=0, train_split=None
    ).initialize()
    x, y = batch(time_major=False), torch.randn(B, 1)
    return Subject(net.module_, lambda m: net.get_loss(m(x), y), ["layer.l0"])


def snntorch(name: str, advance: Callable[..., tuple[Tensor, Any]], state: Any, **options: Any) -> Subject:
    package = pytest.importorskip("snntorch")
    cell = getattr(package, name)(threshold=0.5, **options)
    return Subject(Stepped(cell, advance), squared(3 * batch()), ["cell"], {"cell": state})


def ncps() -> Subject:
    package = pytest.importorskip("ncps.torch")
    cell = package.CfCCell(H, H, backbone_units=8, backbone_layers=1)

    def advance(cell: Any, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        return cell(x, torch.zeros(B, H) if h is None else h, 1.0)

    return Subject(Stepped(cell, advance), squared(batch()), ["cell"], {"cell": 1})


def named(package: str, kind: str, states: dict[str, Any], *sizes: int, **options: Any) -> Subject:
    layer = getattr(pytest.importorskip(package), kind)(5, H, *sizes, **options)
    states = {f"layer.{key}": getter for key, getter in states.items()}
    return Subject(Readout(layer), squared(batch()), list(states), states)


def norse() -> Subject:
    package = pytest.importorskip("norse.torch")

    def advance(cell: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        _, state = cell(5 * x, state)
        return state.v, state

    model = Stepped(package.LIFRecurrentCell(H, H), advance)
    return Subject(model, squared(batch()), ["cell"], {"cell": lambda m, a, o: o[1].v}, copies=False)


def whole(module: nn.Module, args: Any, out: Any) -> Any:
    return out


SUBJECTS: dict[tuple[str, str], Callable[[], Subject]] = {
    ("pytorch-forecasting", "RecurrentNetwork"): lambda: forecasting("RecurrentNetwork"),
    ("pytorch-forecasting", "DeepAR"): lambda: forecasting("DeepAR"),
    ("pytorch-forecasting", "TemporalFusionTransformer"): lambda: forecasting("TemporalFusionTransformer"),
    ("neuralforecast", "LSTM"): lambda: neuralforecast(
        "LSTM", ["hist_encoder.l0", "hist_encoder.l1"], encoder_hidden_size=H, decoder_hidden_size=H
    ),
    ("neuralforecast", "GRU, recurrent"): lambda: neuralforecast(
        "GRU", ["hist_encoder.l0", "hist_encoder.l1"], encoder_hidden_size=H, recurrent=True
    ),
    ("neuralforecast", "DeepAR"): lambda: neuralforecast(
        "DeepAR", ["hist_encoder.l0", "hist_encoder.l1"], lstm_hidden_size=H
    ),
    ("darts", "RNNModel"): lambda: darts("RNNModel", ["rnn.l0"], model="LSTM", hidden_dim=H, training_length=12),
    ("darts", "BlockRNNModel"): lambda: darts(
        "BlockRNNModel", ["rnn.l0", "rnn.l1"], model="GRU", hidden_dim=H, n_rnn_layers=2, output_chunk_length=3
    ),
    ("darts", "TFTModel"): lambda: darts(
        "TFTModel", ["lstm_encoder.l0", "lstm_decoder.l0"], hidden_size=H, num_attention_heads=2,
        output_chunk_length=3, add_relative_index=True,
    ),
    ("gluonts", "DeepAR"): gluonts,
    ("sb3-contrib", "RecurrentActorCriticPolicy"): sb3,
    ("torchrl", "LSTMModule"): lambda: torchrl("LSTM"),
    ("torchrl", "GRUModule"): lambda: torchrl("GRU"),
    ("speechbrain", "LSTM"): speechbrain_lstm,
    ("speechbrain", "AttentionalRNNDecoder"): speechbrain_decoder,
    ("torchaudio", "Tacotron2"): tacotron,
    ("skorch", "NeuralNetRegressor"): skorch,
    ("snntorch", "Leaky"): lambda: snntorch("Leaky", lambda cell, x, s: cell(x, s), 1, beta=0.9),
    ("snntorch", "Leaky, hidden state"): lambda: snntorch(
        "Leaky", lambda cell, x, s: (cell(x), s), lambda m, a, o: m.mem, beta=0.9, init_hidden=True
    ),
    ("snntorch", "RLeaky"): lambda: snntorch(
        "RLeaky", lambda cell, x, s: (lambda o: (o[0], o))(cell(x, *(s or ()))), 1, beta=0.9, linear_features=H
    ),
    ("ncps", "CfCCell"): ncps,
    ("opacus", "DPLSTM"): lambda: named("opacus.layers", "DPLSTM", {"l0": 0, "l1": 0}, 2),
    ("opacus", "DPGRU"): lambda: named("opacus.layers", "DPGRU", {"l0": whole}),
    ("torchrecurrent", "MGU"): lambda: named("torchrecurrent", "MGU", {"cells.0": whole, "cells.1": whole},
                                             num_layers=2),
    ("torchrecurrent", "PeepholeLSTM"): lambda: named("torchrecurrent", "PeepholeLSTM", {"cells.0": 0}),
    ("norse", "LIFRecurrentCell"): norse,
}  # fmt: skip
