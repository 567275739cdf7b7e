"""Runs our commands for one page, each in a copy of this process: five seconds of imports are paid once per page.

Reads a line of JSON per command, `{"arguments": [...], "folder": "...", "output": "file"}`, and answers with its exit
code.
"""

import json
import os
import sys
import traceback
from typing import NoReturn

import unvanish.train  # noqa: F401 (for the copies)
from unvanish.cli import main


def serve() -> None:
    """Until the page's kernel closes the pipe."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(arguments: list[str], folder: str, output: str) -> NoReturn:
    code: int | str | None = 0
    try:
        os.chdir(folder)
        file = os.open(output, os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["unvanish", *arguments]
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    serve()
