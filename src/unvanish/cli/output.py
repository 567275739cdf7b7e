"""Output folders: written beside, renamed into place when complete."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = "results.json"
"""what tells an earlier run's folder from the user's own"""


ASIDE = ".old"
"""how the hidden name of a run ends that is being replaced"""


class UserError(Exception):
    """An error that the user can fix; printed without a traceback."""


class OutputFolder:
    """A folder that appears whole or not at all.

    An earlier run that stands there is set aside while the new one takes its name. Killed in between, it is put back
    by the next that wants the name; killed right after, what was set aside is cleared away then.

    Raises:
        UserError: the folder holds something else, or can't be looked at.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            self._recover()
        except OSError as error:
            raise UserError(f"--out: {path} can't be used: {error.strerror}") from error
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out: {path} is a file; name a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / MARKER).is_file():
            raise UserError(f"--out: {path} holds files that are not from an earlier run; name a new or empty folder")

    def _recover(self) -> None:
        aside = re.compile(rf"\.{re.escape(self.path.name)}\.[a-z0-9_]{{8}}{re.escape(ASIDE)}")
        parent = self.path.parent
        for left in [p for p in parent.iterdir() if aside.fullmatch(p.name)] if parent.is_dir() else []:
            if (self.path / MARKER).is_file() or not any(left.iterdir()):
                shutil.rmtree(left)
            elif not self.path.exists():
                os.replace(left, self.path)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A private folder to write into, that takes the final name if the block ends well and is removed if not.

        Raises:
            UserError: it can't be made, or the disk is full.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stage = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}."))
        except OSError as error:
            raise UserError(f"--out: {self.path} can't be written: {error.strerror}") from error
        try:
            yield stage
            os.chmod(stage, 0o777 & ~_umask())
            old = None
            if self.path.exists():
                old = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=ASIDE))
                os.replace(self.path, old)
            os.replace(stage, self.path)
            if old is not None:
                shutil.rmtree(old)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"--out: {self.path}: the disk is full, nothing was written; make room") from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
