"""A watched training on disk: one small file per recorded backward pass."""

import os
from collections.abc import Iterator
from pathlib import Path

from unvanish.flow.record import Flow

SUFFIX = ".flow"


class Stream:
    """A folder to which records are written in the order of their arrival.

    Raises:
        FileExistsError: the folder holds files.
        OSError: it can't be made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"stream: {folder} is not empty; name a new folder, so that two runs don't mix")
        self.folder = folder
        self.written = 0

    def write(self, flow: Flow, step: int) -> None:
        """Write the records of one backward pass.

        Raises:
            OSError: it can't be written.
        """
        self.written += 1
        flow.save(self.folder / f"{self.written:08d}-step-{step}{SUFFIX}")


def read_stream(folder: str | os.PathLike[str]) -> Iterator[Flow]:
    """The records that `watch(model, stream=folder)` wrote, in order, one at a time in memory.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged.
    """
    files = sorted(Path(folder).glob(f"*{SUFFIX}"))
    if not files:
        raise FileNotFoundError(f"folder: expected the files of watch(model, stream=...), {folder} has none")
    return (Flow.load(file) for file in files)
