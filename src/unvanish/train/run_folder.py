"""The folder of a training: what it is of, its checkpoints, in the end its model."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from unvanish.flow.files import write_atomically
from unvanish.train.checkpoints import newest
from unvanish.train.trained import CONFIG, Trained

RUN, CHECKPOINTS, LOGS = "run.json", "checkpoints", "logs"
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""set by the launchers: torchrun, Lightning's own, SLURM's"""


def is_first_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


class RunFolder:
    """`run.json` says what is trained; `checkpoints/` and `logs/` grow; `config.json`, written last, makes it a model.

    Args:
        path: new, empty, or of the same training if `resume`.
        run: plain data that tells trainings apart.
        resume: whether to go on from what is there.

    Raises:
        ValueError: the folder holds something else, or another training.
        FileExistsError: it holds a training, and `resume` is off.
        OSError: it can't be written.
    """

    def __init__(self, path: Path, run: dict[str, Any], resume: bool) -> None:
        self.path, self.checkpoints = path, path / CHECKPOINTS
        if not is_first_process():
            return
        run = json.loads(json.dumps(run))
        try:
            here = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        except FileNotFoundError:
            here = set()
        except NotADirectoryError as error:
            raise FileExistsError(f"--out: {path} is a file; name a new folder") from error
        except OSError as error:
            raise OSError(f"--out: {path} can't be written: {error.strerror}") from error
        if here and RUN not in here:
            raise ValueError(f"--out: {path} holds files that are not from a training; name a new or empty folder")
        if here and not resume:
            state = "a finished training" if CONFIG in here else "a training; add --resume to go on with it"
            raise FileExistsError(f"--out: {path} holds {state}; name a new folder for another")
        if here:
            self._compare(run)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for stale in [*path.glob(".*"), *self.checkpoints.glob(".*")]:
                stale.unlink()
            write_atomically(path / RUN, json.dumps(run, indent=1).encode())
            if self.finished:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
        except OSError as error:
            raise OSError(f"--out: {path} can't be written: {error.strerror}") from error

    @property
    def finished(self) -> bool:
        """Whether the model is there."""
        return (self.path / CONFIG).is_file()

    def finish(self, trained: Trained) -> None:
        """Write the model; its checkpoints have done their work.

        Raises:
            OSError: it can't be written.
        """
        if is_first_process():
            trained.save(self.path)
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def kept(self) -> str:
        """What there is to go on from, in words."""
        found = newest(self.checkpoints)
        return f"nothing is kept in {self.path}" if found is None else f"{found} is kept; add --resume to go on from it"

    def _compare(self, run: dict[str, Any]) -> None:
        try:
            before = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"--resume: {self.path / RUN} is damaged: {error}") from error
        old, new = _flat(before), _flat(run)
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"--resume: {name}: {self.path} was begun with {old.get(name)!r}, got {new.get(name)!r}; give what "
                    "it was begun with, or name a new folder"
                )


def fingerprint(problem: Any) -> str:
    """SHA-256 of what a problem consists of."""
    digest = hashlib.sha256()
    for tensor in problem.tensors():
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found
