"""Run by each page's kernel before its first cell: a shell line that fails, fails the build.

IPython's own `!` goes on after a failure, and runs commands in a terminal, so that progress bars fill the page.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from IPython.core.getipython import get_ipython

COMMAND = re.compile(r"unvanish (train|predict|export|compare)\b([^;|&<>$]*)(; echo \"exit code \$\?\")?")
"""A line that runs one of our commands alone, with or without its exit code printed."""


def system(line: str) -> None:
    """Run a shell line as in a pipe, show what it prints, and raise if its exit code is not 0."""
    shell = get_ipython()
    assert shell is not None
    line = shell.var_expand(line, depth=1).strip()
    ours = COMMAND.fullmatch(line)
    if ours is None:
        done = subprocess.run(
            line,
            shell=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=_environment(),
        )
        printed, code = done.stdout, done.returncode
    else:
        printed, code = _ours([ours[1], *shlex.split(ours[2])])
        if ours[3]:
            printed, code = f"{printed}exit code {code}\n", 0
    print(printed, end="")
    if code:
        raise RuntimeError(f"exit code {code}: {line}")


def _ours(arguments: list[str]) -> tuple[str, int]:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile() as output:
        asked = {"arguments": arguments, "folder": os.getcwd(), "output": output.name}
        print(json.dumps(asked), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return Path(output.name).read_text(encoding="utf-8"), code


@cache
def _server() -> "subprocess.Popen[str]":
    program = [sys.executable, str(Path(os.environ["PYTHONSTARTUP"]).with_name("command_server.py"))]
    return subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(), start_new_session=True
    )


def _environment() -> dict[str, str]:
    # The kernel sets it; a program that obeys it fills the page with its progress bars in a pipe too.
    return {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}


_shell = get_ipython()
assert _shell is not None
_shell.system = system
