"""Train a model on the user's sequences, keep it in a folder, apply it."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from unvanish.train.data import DataError, Sequences, split
from unvanish.train.data.sequences import Scale
from unvanish.train.fit import _quiet
from unvanish.train.models import recipe

SCHEMA = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Settings:
    """How to train."""

    cell: str = "lstm-chrono"
    hidden: int = 48
    epochs: int = 50
    batch: int = 32
    lr: float = 1e-2
    clip: float = 1.0
    patience: int = 10
    """epochs without a better validation loss before training stops"""
    seed: int = 0

    def __post_init__(self) -> None:
        recipe(self.cell)
        for name in ("hidden", "epochs", "batch", "lr", "clip", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


class LastStateModel(nn.Module):
    """answer = W h_T + b, T each sequence's own length."""

    def __init__(self, cell: str, inputs: int, hidden: int, outputs: int, length: int) -> None:
        super().__init__()
        chosen = recipe(cell)
        options = {} if chosen.nonlinearity is None else {"nonlinearity": chosen.nonlinearity}
        self.recurrent = chosen.layer(inputs, hidden, batch_first=True, **options)
        if chosen.prepare is not None:
            chosen.prepare(self.recurrent, max(length, 2))
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """`[B, T, I]`, `[B]` → `[B, O]`"""
        _, final = self.recurrent(x, lengths=lengths)
        return self.head((final[0] if isinstance(final, tuple) else final)[-1])


@dataclass(frozen=True)
class Trained:
    """A model with all that is needed to apply it."""

    model: LastStateModel
    config: dict[str, Any]

    def predict(self, data: Sequences) -> list[str] | list[float]:
        """A class or a number per sequence.

        Raises:
            DataError: other channels than in training.
        """
        if data.channels != self.config["channels"]:
            raise DataError(f"data: expected the channels {self.config['channels']}, got {data.channels}")
        scale = Scale(**self.config["scale"])
        self.model.eval()
        loader = DataLoader([(scale(x), torch.tensor(0)) for x in data.x], batch_size=256, collate_fn=_together)  # type: ignore[arg-type]
        with torch.no_grad():
            answers = torch.cat([self.model(x, lengths) for x, lengths, _ in loader])
        if self.config["kind"] == "classification":
            return [self.config["classes"][i] for i in answers.argmax(1).tolist()]
        mean, deviation = self.config["target_scale"]
        return (answers[:, 0].double() * deviation + mean).tolist()

    def batch(self, data: Sequences, most: int = 512) -> tuple[Tensor, Tensor, Tensor]:
        """(x [B, T, I], lengths [B], y [B]) of the first `most` sequences, scaled as in training; for `uv.diagnose`.

        Raises:
            DataError: other channels than in training, no target, or one that training did not know.
        """
        if data.channels != self.config["channels"]:
            raise DataError(f"data: expected the channels {self.config['channels']}, got {data.channels}")
        if data.y is None:
            raise DataError("data: expected a target; name its column with --target")
        if self.config["kind"] == "classification":
            classes = {label: torch.tensor(place) for place, label in enumerate(self.config["classes"])}
            unknown = sorted(set(data.y) - set(classes))
            if unknown:
                raise DataError(f"data: expected the classes {list(classes)}, got {unknown[0]!r}")
            y = [classes[label] for label in data.y]
        else:
            mean, deviation = self.config["target_scale"]
            y = list(((torch.tensor(_numbers(data), dtype=torch.float64) - mean) / deviation).float())
        scale = Scale(**self.config["scale"])
        return _together([(scale(x), answer) for x, answer in zip(data.x[:most], y[:most], strict=True)])

    def loss(self, answer: Tensor, y: Tensor) -> Tensor:
        """What training minimised, of answers `[B, O]`."""
        return cross_entropy(answer, y) if self.config["kind"] == "classification" else mse_loss(answer[:, 0], y)

    def save(self, folder: Path) -> None:
        """Weights as safetensors and config.json, no pickle; the folder appears whole, by rename.

        Raises:
            FileExistsError: there is something already.
            OSError: it can't be written.
        """
        if folder.exists():
            raise FileExistsError(f"--out: {folder} exists; name a new folder")
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
        try:
            save_file(self.model.state_dict(), stage / WEIGHTS)
            (stage / CONFIG).write_text(json.dumps(self.config, indent=1), encoding="utf-8")
            os.replace(stage, folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> "Trained":
        """A folder that `save` wrote.

        Raises:
            ValueError: it is not one.
        """
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if config.get("schema") != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}, got {config.get('schema')}")
            settings = config["settings"]
            model = LastStateModel(settings["cell"], len(config["channels"]), settings["hidden"], config["outputs"], 2)
            model.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"model: {folder} is not a folder that `unvanish train` wrote: {error}") from error
        return cls(model, config)


class _Module(lightning.LightningModule):
    def __init__(self, model: LastStateModel, classify: bool, lr: float) -> None:
        super().__init__()
        self.model, self.classify, self.lr = model, classify, lr
        self.best: tuple[float, dict[str, Tensor]] | None = None

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        x, lengths, y = batch
        answer = self.model(x, lengths)
        return cross_entropy(answer, y) if self.classify else mse_loss(answer[:, 0], y)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if not loss.isfinite():
            raise ArithmeticError(f"the training loss became {loss.item()} at update {self.global_step}; lower lr")
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("validation_loss", self.loss(batch), batch_size=len(batch[2]), prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        loss = float(self.trainer.callback_metrics["validation_loss"])
        if self.best is None or loss < self.best[0]:
            self.best = loss, {name: value.clone() for name, value in self.model.state_dict().items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.lr)


def train_on(
    data: Sequences,
    settings: Settings,
    kind: Literal["classification", "regression"],
    callbacks: Sequence[lightning.Callback] = (),
) -> Trained:
    """Adam with early stopping; the weights of the best validation loss are kept, and judged once on the test split.

    Raises:
        DataError: one class only, or a target that is not a number in regression.
        ValueError: too few sequences.
        ArithmeticError: the loss became NaN or infinite.
    """
    if data.y is None:
        raise ValueError("data: expected a target; name its column with --target")
    classify = kind == "classification"
    classes = sorted(set(data.y)) if classify else []
    if classify and len(classes) < 2:
        raise DataError(f"data: the target has one class only, {classes[0]!r}; expected two or more")
    parts = split(data.y if classify else None, len(data), settings.seed)
    scale = Scale.of([data.x[i] for i in parts["train"]])
    if classify:
        y, target_scale = [torch.tensor(classes.index(label)) for label in data.y], None
    else:
        numbers = torch.tensor(_numbers(data), dtype=torch.float64)
        chosen = numbers[parts["train"]]
        target_scale = (float(chosen.mean()), float(chosen.std(correction=0)) or 1.0)
        y = list(((numbers - target_scale[0]) / target_scale[1]).float())
    samples = [(scale(x), answer) for x, answer in zip(data.x, y, strict=True)]
    torch.manual_seed(settings.seed)
    outputs = len(classes) if classify else 1
    longest = max(len(data.x[i]) for i in parts["train"])
    model = LastStateModel(settings.cell, len(data.channels), settings.hidden, outputs, longest)
    module = _Module(model, classify, settings.lr)
    stop = EarlyStopping("validation_loss", patience=settings.patience, check_finite=False)
    with _quiet():
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=settings.epochs,
            num_sanity_val_steps=0,
            gradient_clip_val=settings.clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=bool(callbacks),
            enable_model_summary=False,
            callbacks=[stop, *callbacks],
        )
        order = torch.Generator().manual_seed(settings.seed)
        trainer.fit(
            module,
            _loader(samples, parts["train"], settings.batch, order),
            _loader(samples, parts["validation"], 256),
        )
    if module.best is None:
        raise ArithmeticError("the validation loss was never finite; try a smaller lr")
    model.load_state_dict(module.best[1])
    config: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": kind,
        "settings": asdict(settings),
        "channels": data.channels,
        "classes": classes,
        "class_counts": dict(Counter(data.y)) if classify else {},
        "outputs": outputs,
        "scale": asdict(scale),
        "target_scale": target_scale,
        "split": {name: len(indices) for name, indices in parts.items()},
        "epochs_run": trainer.current_epoch,
    }
    trained = Trained(model, config)
    test = Sequences([data.x[i] for i in parts["test"]], None, [], data.channels)
    said, truth = trained.predict(test), [data.y[i] for i in parts["test"]]
    if classify:
        config["test"] = {"accuracy": sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth)}
        common = max(Counter(data.y[i] for i in parts["train"]).items(), key=lambda pair: pair[1])[0]
        config["baseline"] = {"accuracy": sum(b == common for b in truth) / len(truth)}
    else:
        errors = [(float(a) - float(b)) ** 2 for a, b in zip(said, truth, strict=True)]
        config["test"] = {"mse": sum(errors) / len(errors)}
        assert target_scale is not None
        config["baseline"] = {"mse": sum((float(b) - target_scale[0]) ** 2 for b in truth) / len(truth)}
    return trained


def _numbers(data: Sequences) -> list[float]:
    numbers = []
    for name, text in zip(data.names, data.y or [], strict=True):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not abs(value) < 1e150:
            raise DataError(f"data: {name}: the target of a regression must be a finite number, got {text[:40]!r}")
        numbers.append(value)
    return numbers


def _loader(samples: list, indices: list[int], batch: int, order: torch.Generator | None = None) -> DataLoader:
    chosen = [samples[i] for i in indices]
    return DataLoader(chosen, batch, shuffle=order is not None, generator=order, collate_fn=_together)  # type: ignore[arg-type]


def _together(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    x, y = zip(*samples, strict=True)
    return pad_sequence(list(x), batch_first=True), torch.tensor([len(s) for s in x]), torch.stack(y)
