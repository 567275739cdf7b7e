"""Where a training's figures go: a CSV file, TensorBoard, or Weights & Biases."""

import os
from pathlib import Path

from unvanish.extras import extra

with extra("lab"):
    from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger


LOGGERS = ("csv", "tensorboard", "wandb", "none")


def make_loggers(name: str, folder: str | os.PathLike[str]) -> list[Logger]:
    """The logger called `name`, writing into `folder`.

    Raises:
        ValueError: there is none, or its package is not installed.
    """
    if name not in LOGGERS:
        raise ValueError(f"logger: expected one of {', '.join(LOGGERS)}, got {name!r}")
    folder = Path(folder)
    try:
        if name == "csv":
            # A folder per start: a resumed training would overwrite the file.
            return [CSVLogger(folder, name="")]
        if name == "tensorboard":
            return [TensorBoardLogger(folder, name="", version="")]
        if name == "wandb":
            return [WandbLogger(save_dir=folder, project="unvanish", name=folder.parent.name)]
    except ImportError as error:
        raise ValueError(f"logger: {name} is not installed; pip install {name}, or choose another") from error
    return []
