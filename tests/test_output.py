"""A run killed while its results take the place of earlier ones loses neither."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unvanish.cli.output import MARKER, OutputFolder

REPLACE = """
import os, shutil, signal, sys
from pathlib import Path
from unvanish.cli.output import MARKER, OutputFolder
calls = iter(range(9))
def dying(function):
    def call(*arguments):
        if next(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
os.replace, shutil.rmtree = dying(os.replace), dying(shutil.rmtree)
with OutputFolder(Path(sys.argv[1])).staged() as stage:
    (stage / MARKER).write_text("later")
"""


@pytest.mark.parametrize(
    ("killed_at", "stands", "found"),
    [(0, True, "earlier"), (1, False, "earlier"), (2, True, "later")],
    ids=["before the earlier is set aside", "between", "before it is cleared away"],
)
def test_killed_while_it_takes_an_earlier_runs_place(killed_at: int, stands: bool, found: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputFolder(out).staged() as stage:
        (stage / MARKER).write_text("earlier")
    neighbour = tmp_path / ".out.two.abcdefgh.old"
    neighbour.mkdir()
    done = subprocess.run([sys.executable, "-c", REPLACE, str(out), str(killed_at)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.exists() is stands
    OutputFolder(out)
    assert (out / MARKER).read_text() == found
    assert not [p for p in tmp_path.glob(".out.*.old") if p != neighbour]
    assert neighbour.is_dir()
