"""Nothing is executed out of a file, nothing goes over the network, nobody else reads what is being written."""

import errno
import os
import pickle
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import unvanish as uv
from unvanish.cli.output import OutputFolder, UserError
from unvanish.flow.files import write_atomically

GUARD = """
import sys

def forbid(event, arguments):
    if event in FORBIDDEN:
        sys.stderr.write(f"forbidden: {event} {arguments}\\n")
        raise RuntimeError(event)

sys.addaudithook(forbid)
from unvanish.cli import main
"""
NETWORK = {f"socket.{event}" for event in ("connect", "bind", "sendto", "sendmsg", "getaddrinfo", "gethostbyname")}
PICKLES = {"pickle.find_class"}

IN_TURN = """
import shlex
for command in sys.argv[1:]:
    sys.argv = ["unvanish", *shlex.split(command)]
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    print(code)
"""

SOURCE = """
import torch
from torch import nn

def factory():
    return nn.LSTM(2, 3), (torch.randn(5, 4, 2), torch.zeros(5, 4, 3)), lambda out, y: (out[0] - y).square().mean()
"""


def guarded(code: str, forbidden: set[str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, in which these events raise and are told of."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"FORBIDDEN = {forbidden!r}\n{GUARD}\n{code}", *arguments],
        capture_output=True, text=True, cwd=cwd, check=False,
    )  # fmt: skip


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "arguments",
    [
        shlex.split("compare --task adding --length 12 --cells rnn --steps 2 --hidden 4 --seeds 1"),
        ["diagnose", "mine.py:factory", "--budget", "0"],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_no_command_touches_the_network(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    done = guarded("main()", NETWORK, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "forbidden" not in done.stderr


def test_the_guard_notices(tmp_path: Path) -> None:
    done = guarded("import socket; socket.create_connection(('127.0.0.1', 9))", NETWORK, tmp_path)
    assert "forbidden: socket.getaddrinfo" in done.stderr
    (tmp_path / "evil").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    done = guarded("import pickle; pickle.load(open('evil', 'rb'))", PICKLES, tmp_path)
    assert "forbidden: pickle.find_class" in done.stderr


def test_no_file_of_the_users_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "raw").write_bytes(pickle.dumps(Evil(mark)))
    torch.save({"weight_ih_l0": Evil(mark)}, tmp_path / "zip.pt")
    torch.save({"weight_ih_l0": Evil(mark)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    names = ("raw", "zip.pt", "old.pt")
    commands = [["diagnose", "mine.py:factory", "--checkpoint", name] for name in names] + [["report", "trained"]]
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "results.json").write_bytes(pickle.dumps(Evil(mark)))
    done = guarded(IN_TURN, PICKLES, tmp_path, *map(shlex.join, commands))
    said = done.stderr.splitlines()
    assert done.stdout.split() == ["2"] * 4, done.stderr
    for name, line in zip(names, said, strict=False):
        assert line.startswith(f"error: --checkpoint: {name} is no plain state_dict")
    assert "not JSON" in said[3]
    for name in names:
        with pytest.raises(ValueError, match="not a flow file"):
            uv.flow.load(tmp_path / name)
    assert not mark.exists()


def test_records_are_read_without_unpickling(tmp_path: Path) -> None:
    lstm = torch.nn.LSTM(2, 3)
    uv.flow.gate_statistics(lstm, torch.randn(4, 2, 2)).save(tmp_path / "gates.flow")
    save_file(lstm.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "mine.py").write_text(SOURCE)
    code = f"import unvanish; unvanish.flow.load('gates.flow')\n{IN_TURN}"
    done = guarded(code, PICKLES, tmp_path, "diagnose mine.py:factory --budget 0 --checkpoint weights.safetensors")
    assert done.stderr == ""
    assert done.stdout.split()[-1] == "None"


def test_that_the_factorys_file_is_run_is_said_where_it_is_asked_for(tmp_path: Path) -> None:
    done = guarded("main()", set(), tmp_path, "diagnose", "--help")
    assert "Your file is executed" in done.stdout


def test_what_is_being_written_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = OutputFolder(tmp_path / "out")
    with folder.staged() as stage:
        assert stat.S_IMODE(stage.stat().st_mode) == 0o700
        (stage / "results.json").write_text("{}")
    seen: list[int] = []
    replace = os.replace

    def looked_at(source: str, target: Path) -> None:
        seen.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob(".record.*"))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(stat.S_IMODE(os.fstat(handle).st_mode)))
    monkeypatch.setattr(os, "replace", looked_at)
    write_atomically(tmp_path / "record", b"1")
    assert seen[0] == 0o600
    assert (tmp_path / "record").read_bytes() == b"1"


def test_a_full_disk_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    def fill() -> None:
        with OutputFolder(tmp_path / "out").staged() as stage:
            (stage / "results.json").write_text("{}")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="the disk is full, nothing was written"):
        fill()
    assert list(tmp_path.iterdir()) == []
