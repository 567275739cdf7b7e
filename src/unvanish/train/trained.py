"""A trained model in a folder: plain JSON and safetensors, written by rename; reading it executes nothing."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from unvanish.flow.files import write_atomically
from unvanish.train.data.table import DataError
from unvanish.train.forecasting import Forecasting
from unvanish.train.language import LanguageModel
from unvanish.train.models import SequenceModel, Shape
from unvanish.train.problems import Classification, Regression
from unvanish.train.supervised import together
from unvanish.train.task_problem import TaskProblem

Batch = tuple[Tensor, Tensor | None, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

SCHEMA = 2
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KINDS: dict[str, Any] = {kind.kind: kind for kind in (Classification, Regression, Forecasting, LanguageModel)}


@dataclass(frozen=True)
class Trained:
    """A model with everything needed to apply it."""

    model: SequenceModel
    config: dict[str, Any]
    """kind, settings, shape, split rule, what the inputs were scaled by, figures on the test split, …"""

    def predict(self, data: Any, **options: Any) -> Any:
        """The model's answers to data of the kind that it was trained on: a class or a number per sequence, the next
        steps of each series, or the continuation of a text.

        Args:
            data: `Sequences`, `Series`, or a text.
            options: of a language model: length, temperature, seed.

        Raises:
            DataError: other channels than in training, or of another kind.
            ValueError: a model of a task, which has no data to be applied to.
        """
        if self.config["kind"] not in KINDS:
            raise ValueError(f"model: expected one that was trained on data, got one of the {self.config['kind']}")
        kind = KINDS[self.config["kind"]]
        if not isinstance(data, kind.applied_to):
            expected = "a text" if kind.applied_to is str else kind.applied_to.__name__
            raise DataError(f"data: expected {expected} for {kind.kind}, got {type(data).__name__}")
        return kind.apply(self.model, self.config, data, **options)

    def batch(self, data: Any = None, most: int = 512) -> tuple[Batch, Loss]:
        """((x, lengths `[B]` or None where all are equal, y), loss) of up to `most` samples, encoded as in training,
        and what training minimised: what `uv.diagnose` takes.

        Args:
            data: `Sequences`, `Series` or a text, as for `predict`; None for a model of a task, which draws its own.
            most: of the sequences the first; of windows and pieces of a text as many, spread evenly.

        Raises:
            DataError: other channels or classes than in training, no targets, or too few steps.
            ValueError: data for a model of a task, or none for another.
        """
        if (data is None) != (self.config["kind"] == TaskProblem.kind):
            expected = "data" if data is None else f"none for the task {self.config['task']['name']}"
            raise ValueError(f"data: expected {expected}, as the model was trained")
        if data is None:
            task = TaskProblem.of(self.config)
            return together(task.examples("train", most)), task.loss
        kind = KINDS[self.config["kind"]]
        return together(kind.encoded(self.config, data, most)), kind.minimised

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, then config.json, which holds their SHA-256 and so seals the folder.

        Raises:
            FileExistsError: there is a model already.
            OSError: it can't be written.
        """
        folder = Path(folder)
        if (folder / CONFIG).exists():
            raise FileExistsError(f"--out: {folder} holds a model already; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        weights = save({name: value.contiguous() for name, value in self.model.state_dict().items()})
        write_atomically(folder / WEIGHTS, weights)
        config = self.config | {"sha256": hashlib.sha256(weights).hexdigest()}
        write_atomically(folder / CONFIG, json.dumps(config, indent=1).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Trained":
        """A folder that `save` wrote.

        Raises:
            ValueError: it is not such a folder, or its weights are damaged.
        """
        folder = Path(folder)
        missing = next((name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()), None)
        if missing is not None:
            raise ValueError(f"model: {folder} has no {missing}; name a folder that `unvanish train` finished")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if config.get("schema") != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}, got {config.get('schema')}")
            weights = (folder / WEIGHTS).read_bytes()
            if hashlib.sha256(weights).hexdigest() != config["sha256"]:
                raise ValueError(f"{WEIGHTS} is damaged: its checksum is wrong")
            model = Shape(**config["shape"]).build(2)
            model.load_state_dict(load(weights))
        except OSError as error:
            raise ValueError(f"model: {folder} can't be read: {error.strerror}") from error
        except (ValueError, KeyError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"model: {folder} is not a folder that `unvanish train` finished: {error}") from error
        return cls(model, config)
