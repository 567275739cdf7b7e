"""The folder of a training: its description, its checkpoints and, in the end, its model and a page about it."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unvanish.draw.preview import Preview, preview_paths
from unvanish.flow.files import write_atomically, write_page
from unvanish.train.checkpoints import newest
from unvanish.train.trained import CONFIG, WEIGHTS, Trained

RUN, CHECKPOINTS, PAGE = "run.json", "checkpoints", "report.html"


class RunFolder:
    """`run.json` says what is trained; `checkpoints/` and `logs/` grow; `config.json`, written last, makes it a model.

    Args:
        path: new, empty, or of the same training if `resume`.
        run: plain data that identifies the training.
        resume: whether to continue from what is there.
        first: whether this process writes.

    Raises:
        ValueError: the folder holds something else, or another training.
        FileExistsError: it holds a training, and `resume` is off.
        OSError: it can't be written.
    """

    def __init__(self, path: Path, run: dict[str, Any], resume: bool, first: bool = True) -> None:
        self.path, self.checkpoints, self.first = path, path / CHECKPOINTS, first
        self._new = False
        if not first:
            return
        run = json.loads(json.dumps(run))
        try:
            here = {entry.name for entry in path.iterdir()} - {half.name for half in self._half_written()}
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
        self._new = not here
        if here:
            self._compare(run)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for half in self._half_written():
                half.unlink()
            write_atomically(path / RUN, json.dumps(run, indent=1).encode())
            if self.finished:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
        except OSError as error:
            raise OSError(f"--out: {path} can't be written: {error.strerror}") from error

    @property
    def finished(self) -> bool:
        """Whether the model is there."""
        return (self.path / CONFIG).is_file()

    def finish(self, trained: Trained, page: tuple[str, Preview] | None = None) -> None:
        """Write the page and its card, if there is one, then the model; the checkpoints are no longer needed.

        Raises:
            OSError: it can't be written.
        """
        if self.first:
            if page is not None:
                write_page(self.path / PAGE, *page)
            trained.save(self.path)
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    @contextmanager
    def in_its_words(self) -> Iterator[None]:
        """Add the folder, and what a resumed training can start from, to errors; a refused training leaves no trace."""
        try:
            yield
        except ValueError:
            # `fit` rejects arguments before it writes a file, so the corrected command can use the same folder.
            if self._new and [entry.name for entry in self.path.iterdir()] == [RUN]:
                (self.path / RUN).unlink()
            raise
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(f"interrupted; {self._kept()}") from stop
        except OSError as error:
            if error.strerror is None:
                raise
            raise OSError(f"--out: {self.path} can't be written: {error.strerror}; {self._kept()}") from error

    def _half_written(self) -> list[Path]:
        """Partly written files that a killed process left behind."""
        cards = (path.name for path in preview_paths(PAGE))
        names = [self.path.glob(f".{name}.*") for name in (RUN, CONFIG, WEIGHTS, PAGE, *cards)]
        return [half for found in (*names, self.checkpoints.glob(".*.ckpt.*")) for half in found]

    def _kept(self) -> str:
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
    """SHA-256 of a problem's data."""
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
