"""The command line: `unvanish --help`. Nothing heavy is imported until a command runs.

Belongs here: parsing arguments, calling one public function, printing, exit codes.
Does not: anything that a program would want too; that is a function of the package below.
"""

import sys

from unvanish.extras import MissingExtraError, extra

__all__ = ["main"]


def main() -> None:
    """Run the command line (`unvanish.cli.app.main`); Ctrl-C while that is still being imported ends it likewise."""
    try:
        with extra("report"):
            from unvanish.cli.app import main as run
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run()
