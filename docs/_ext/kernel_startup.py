"""Run by each page's kernel before its first cell: a shell line that fails, fails the build.

IPython's own `!` goes on after a failure, and runs commands in a terminal, so that progress bars fill the page.
"""

import os
import subprocess

from IPython.core.getipython import get_ipython


def system(command: str) -> None:
    """Run a shell line as in a pipe, show what it prints, and raise if its exit code is not 0."""
    shell = get_ipython()
    assert shell is not None
    line = shell.var_expand(command, depth=1)
    # The kernel sets it; a program that obeys it fills the page with its progress bars in a pipe too.
    env = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    done = subprocess.run(
        line, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=env
    )
    print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {line}")


_shell = get_ipython()
assert _shell is not None
_shell.system = system
