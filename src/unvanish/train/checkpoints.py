"""Checkpoints that are complete or absent: written to a temporary file, renamed, and sealed with a checksum."""

import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from unvanish.extras import extra
from unvanish.flow.files import write_atomically

with extra("lab"):
    import lightning
    from lightning.pytorch.plugins import CheckpointIO

SEAL = b"unvanish-checkpoint-1\n"
KEPT = 2


class SealedCheckpointIO(CheckpointIO):
    """torch's checkpoint, followed by its SHA-256; read with weights_only, so nothing in it is executed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write by rename.

        Raises:
            OSError: it can't be written; what was there before is untouched.
        """
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        payload = buffer.getbuffer()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, b"".join((payload, hashlib.sha256(payload).digest(), SEAL)))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote.

        Raises:
            ValueError: the checksum is wrong, the file contains more than plain data, or it is not a checkpoint.
        """
        data = Path(path).read_bytes()
        body = len(data) - len(SEAL) - 32
        if body < 0 or not data.endswith(SEAL) or hashlib.sha256(data[:body]).digest() != data[body : body + 32]:
            raise ValueError(f"checkpoint: {path} is damaged: its checksum is wrong")
        try:
            return torch.load(io.BytesIO(data[:body]), map_location=map_location or "cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"checkpoint: {path} holds more than plain data and is refused: {error}") from error
        except Exception as error:  # torch documents none; the checksum is right, so this is no accidental damage
            raise ValueError(f"checkpoint: {path} holds no checkpoint of torch: {error!r}") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete it."""
        Path(path).unlink(missing_ok=True)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; damaged ones are skipped with a warning."""
    reader = SealedCheckpointIO()
    for path in sorted(folder.glob("*.ckpt"), reverse=True):
        try:
            reader.load_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"{error}; going on from the one before", stacklevel=2)
            continue
        return path
    return None


class SaveEachRound(lightning.Callback):
    """A checkpoint at the end of each round, the newest two kept: the older stands in if the newest is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"update-{trainer.global_step:09d}.ckpt")
        if trainer.is_global_zero:
            for path in sorted(self.folder.glob("*.ckpt"))[:-KEPT]:
                path.unlink()
