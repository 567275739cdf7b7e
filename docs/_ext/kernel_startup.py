"""Run by each page's kernel before its first cell: a shell line that fails, fails the build.

IPython's own `!` goes on after a failure, and runs commands in a terminal, so that progress bars fill the page.
"""

import os
import re
import shlex
import subprocess
import sys
import traceback

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
        printed, code = _in_shell(line)
    else:
        printed, code = _in_fork([ours[1], *shlex.split(ours[2])])
        if ours[3]:
            printed, code = f"{printed}exit code {code}\n", 0
    print(printed, end="")
    if code:
        raise RuntimeError(f"exit code {code}: {line}")


def _in_shell(line: str) -> tuple[str, int]:
    # The kernel sets it; a program that obeys it fills the page with its progress bars in a pipe too.
    env = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    done = subprocess.run(
        line, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=env
    )
    return done.stdout, done.returncode


def _in_fork(arguments: list[str]) -> tuple[str, int]:
    """A command in a copy of this process: five seconds of imports are then paid once per page and not per command."""
    import unvanish.train  # noqa: F401 (for the copies)

    reading, writing = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _become(arguments, writing)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        printed = pipe.read()
    return printed, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _become(arguments: list[str], output: int) -> None:
    """Be the command `unvanish`; never returns, so that nothing of the kernel runs twice."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.environ.pop("FORCE_COLOR", None)
        sys.argv = ["unvanish", *arguments]
        from unvanish.cli import main

        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_shell = get_ipython()
assert _shell is not None
_shell.system = system
