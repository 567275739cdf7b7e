"""The Lightning callback logs what a map of the same samples says, and the same in one process as in two."""

import csv
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

import unvanish as uv


class Module(lightning.LightningModule):
    def __init__(self, layer: nn.RNNBase, packed: bool = False) -> None:
        super().__init__()
        self.encoder, self.packed = layer, packed
        self.head = nn.LazyLinear(1)

    def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        x = batch[0]
        given: Any = x
        if self.packed:
            given = pack_padded_sequence(x, batch[1], batch_first=True, enforce_sorted=False)
        _, final = self.encoder(given)
        return self.head(final[0][-1] if isinstance(final, tuple) else final[-1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


LENGTHS = torch.tensor([6, 2, 5, 6, 1, 3, 4, 6])


def fit(
    layer: nn.RNNBase, callback: lightning.Callback, steps: int = 5, packed: bool = False, **options: Any
) -> Tensor:
    x = torch.randn(8, 6, 2, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=steps, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, log_every_n_steps=1, callbacks=[callback], **{"logger": False, **options},
        )  # fmt: skip
        trainer.fit(Module(layer, packed), DataLoader(TensorDataset(x, LENGTHS), batch_size=8))
    return x


@pytest.mark.parametrize("family", [nn.LSTM, uv.nn.LSTM, nn.GRU])
def test_logs_what_a_map_says(family: Any, tmp_path: Path) -> None:
    layer = family(2, 5, num_layers=2, bidirectional=True, batch_first=True)
    callback = uv.flow.GradientFlow(every=2, samples=4)
    x = fit(layer, callback, logger=[CSVLogger(tmp_path), TensorBoardLogger(tmp_path)])[:4]
    assert list(callback.latest) == ["encoder.l0", "encoder.l0.reverse", "encoder.l1", "encoder.l1.reverse"]
    for place, source in (("l0", -1), ("l1", -1), ("l1.reverse", 0)):
        curve = uv.flow.adjoint_map(layer, x, sources=[source], at=place).over_lag(0)
        right = uv.flow.decay((curve - curve[0]).median(1).values)
        assert callback.latest[f"encoder.{place}"].rate == pytest.approx(right.rate, rel=1e-5)
        assert callback.latest[f"encoder.{place}"].reach == right.reach
    (file,) = tmp_path.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(file.open()) if row["gradient_flow/encoder.l1/rate"]]
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    assert float(rows[0]["gradient_flow/encoder.l1/rate"]) == pytest.approx(callback.latest["encoder.l1"].rate)
    assert any(b"gradient_flow" in f.read_bytes() and f.stat().st_size > 10_000 for f in tmp_path.rglob("events*"))


def test_samples_of_different_length_end_at_their_own_last_step() -> None:
    layer = nn.LSTM(2, 5, batch_first=True)
    callback = uv.flow.GradientFlow(every=1)
    x = fit(layer, callback, steps=1, packed=True)
    curves = torch.full((6, 8), torch.nan, dtype=torch.float64)
    for b, length in enumerate(LENGTHS.tolist()):
        curve = uv.flow.adjoint_map(layer, x[b : b + 1, :length], sources=[-1]).over_lag(0)[:, 0]
        curves[:length, b] = curve - curve[0]
    right = uv.flow.decay(curves.nanmedian(1).values)
    assert callback.latest["encoder.l0"].rate == pytest.approx(right.rate, rel=1e-5)


@pytest.mark.parametrize("parametrised", [False, True])
def test_no_number_of_the_training_changes(parametrised: bool) -> None:
    def gradients(callbacks: list[lightning.Callback]) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.LSTM(2, 5, num_layers=2, dropout=0.5, batch_first=True)
        if parametrised:
            nn.utils.parametrizations.spectral_norm(layer, "weight_hh_l0")
        for callback in callbacks or [lightning.Callback()]:
            fit(layer, callback, steps=3)
        return [*(p.grad for p in layer.parameters() if p.grad is not None), *layer.buffers()]

    for watched, plain in zip(gradients([uv.flow.GradientFlow(every=1)]), gradients([]), strict=True):
        assert torch.equal(watched, plain)


def test_a_dead_layer_reaches_nowhere() -> None:
    layer = nn.RNN(2, 3, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(-1.0 if weight.dim() == 1 else 0.0)
    callback = uv.flow.GradientFlow()
    fit(layer, callback, steps=1)
    assert callback.latest["encoder.l0"] == (-math.inf, 0.0, 0)


def test_a_sample_that_no_error_enters_is_left_out() -> None:
    torch.manual_seed(0)
    layer = nn.RNN(2, 3, num_layers=2, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_ih_l1", "weight_hh_l0", "weight_hh_l1"):
            getattr(layer, name).abs_()
        layer.weight_ih_l1.neg_()
        layer.bias_ih_l1.fill_(20.0)
    # The longest sample drives the upper layer dead, so that no error enters the lower one.
    x = torch.zeros(2, 6, 2)
    x[0] = 1e3
    lengths = torch.tensor([6, 3])
    module, callback = Module(layer, packed=True), uv.flow.GradientFlow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            accelerator="cpu", max_steps=1, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, logger=False, callbacks=[callback],
        ).fit(module, DataLoader(TensorDataset(x, lengths), batch_size=2))  # fmt: skip
    alone = uv.flow.adjoint_map(layer, x[1:, :3], sources=[-1], at="l0").over_lag(0)[:, 0]
    assert callback.latest["encoder.l0"].rate == pytest.approx(uv.flow.decay(alone).rate, rel=1e-5)


def test_wrong_options_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match="every, samples: expected at least 1"):
        uv.flow.GradientFlow(every=0)
    with pytest.raises(ValueError, match="fraction"):
        uv.flow.GradientFlow(fraction=1.0)

    class NoLayer(Module):
        def __init__(self) -> None:
            lightning.LightningModule.__init__(self)
            self.head = nn.Linear(2, 1)

    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, callbacks=[uv.flow.GradientFlow()]
    )
    with pytest.raises(ValueError, match=r"NoLayer has no nn\.RNN"):
        trainer.fit(NoLayer(), DataLoader(TensorDataset(torch.zeros(2, 2))))


def _one_of_two(rank: int, port: int, found: Any) -> None:
    distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    from unvanish.flow import callback

    own = [torch.arange(6.0)[: 4 + 2 * rank, None] + torch.tensor([[0.0, 10.0]]), torch.full((2, 1), float(rank))]
    together = callback._gather({"a": own[0].double(), "b": own[1]})
    found.put((rank, {name: v.tolist() for name, v in together.items()}))
    found.close()
    found.join_thread()
    distributed.destroy_process_group()


def test_two_processes_see_the_samples_of_both() -> None:
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    children = [context.Process(target=_one_of_two, args=(rank, 29_571, found)) for rank in range(2)]
    for child in children:
        child.start()
    answers = dict(found.get(timeout=120) for _ in children)
    for child in children:
        child.join()
    assert torch.equal(torch.tensor(answers[0]["a"]).nan_to_num(-1), torch.tensor(answers[1]["a"]).nan_to_num(-1))
    a = torch.tensor(answers[0]["a"])
    assert a.shape == (6, 4)
    assert a[5].nan_to_num(-1).tolist() == [-1, -1, 5, 15]
    assert answers[0]["b"] == [[0.0, 1.0], [0.0, 1.0]]


DISTRIBUTED = """
import sys
import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
import unvanish as uv
from tests.test_callback import Module

torch.manual_seed(0)
layer = torch.nn.LSTM(2, 5, batch_first=True)
x = torch.randn(8, 6, 2, generator=torch.Generator().manual_seed(1))
callback = uv.flow.GradientFlow(every=1, samples=4)
processes = int(sys.argv[1])
trainer = lightning.Trainer(
    accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_steps=1, logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[callback],
)
module = Module(layer)
module.head = torch.nn.Linear(5, 1)
# Lightning hands each of two processes every other sample.
trainer.fit(module, DataLoader(TensorDataset(x, x[:, 0, 0]), batch_size=8 // processes, shuffle=False))
if trainer.is_global_zero:
    print("rate", repr(callback.latest["encoder.l0"].rate))
    print("weight", module.encoder.weight_hh_l0.grad.norm().item())
"""


def test_a_distributed_training_logs_the_median_over_all_samples(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}

    def rate(processes: int) -> float:
        command = [sys.executable, str(script), str(processes)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return float(done.stdout.split("rate ")[1].split()[0])

    # One process measures its first four samples; two, four each: all eight.
    torch.manual_seed(0)
    layer = nn.LSTM(2, 5, batch_first=True)
    x = torch.randn(8, 6, 2, generator=torch.Generator().manual_seed(1))
    for processes, samples in ((1, 4), (2, 8)):
        curve = uv.flow.adjoint_map(layer, x[:samples], sources=[-1]).over_lag(0)
        right = uv.flow.decay((curve - curve[0]).median(1).values).rate
        assert rate(processes) == pytest.approx(right, rel=1e-4)


class Stepped(Module):
    """Calls its cell or layer once per step."""

    def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.head(self.states(batch[0])[-1]).square().mean()

    def states(self, x: Tensor) -> list[Tensor]:
        """The state that the cell remembers by, of each step."""
        kept, state = [], None
        for row in x.transpose(0, 1):
            out = self.encoder(row if isinstance(self.encoder, nn.RNNCellBase) else row[None], state)
            state = out if isinstance(self.encoder, nn.RNNCellBase) else out[1]
            kept.append(state[1] if isinstance(state, tuple) else state)
        return kept


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: nn.LSTMCell(2, 5), ["encoder"]),
        (lambda: nn.GRUCell(2, 5), ["encoder"]),
        (lambda: nn.LSTM(2, 5, num_layers=2), ["encoder.l0", "encoder.l1"]),
        (lambda: uv.nn.GRU(2, 5), ["encoder.l0"]),
    ],
)
def test_a_cell_or_layer_that_is_called_step_by_step(build: Any, names: list[str]) -> None:
    torch.manual_seed(0)
    module = Stepped(build())
    x = torch.randn(8, 6, 2, generator=torch.Generator().manual_seed(1))
    callback = uv.flow.GradientFlow(every=1, samples=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, callbacks=[callback],
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8))
    assert list(callback.latest) == names
    states = module.states(x)
    unit = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for layer, name in enumerate(names):
        error = torch.zeros_like(states[-1])
        (error[layer] if error.dim() == 3 else error).copy_((unit / unit.norm()).expand(8, 5))
        found = torch.autograd.grad(states[-1], states, error, retain_graph=True)
        norms = torch.stack([(g[layer] if g.dim() == 3 else g).norm(dim=-1) for g in found]).double().flip(0)
        expected = uv.flow.decay((norms / norms[0]).log().median(1).values, 0.01)
        assert callback.latest[name].reach == expected.reach
        assert callback.latest[name].rate == pytest.approx(expected.rate, rel=1e-4)


def test_a_layer_with_a_loop_of_its_own_is_told() -> None:
    class Own(nn.LSTM):
        def forward(self, x: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
            h = (x @ self.weight_ih_l0.T).chunk(4, -1)[0].tanh()
            return h, h[:, -1:].transpose(0, 1)

    both = nn.ModuleDict({"a": Own(2, 5, batch_first=True), "b": nn.GRU(2, 5, batch_first=True)})

    class Net(Module):
        def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
            return sum(self.encoder[key](batch[0])[1].square().mean() for key in "ab")  # type: ignore[index]

    callback = uv.flow.GradientFlow(every=1, pictures=False)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, callbacks=[callback],
    )  # fmt: skip
    module = Net(both)  # type: ignore[arg-type]
    module.head = nn.Linear(1, 1)
    with pytest.warns(RuntimeWarning, match=r"GradientFlow: encoder\.a: its forward computes the recurrence by itself"):
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 6, 2)), batch_size=8))
    assert list(callback.latest) == ["encoder.b.l0"]
