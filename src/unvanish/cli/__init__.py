"""The command line: `unvanish --help`. Nothing heavy is imported until a command runs."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line (`unvanish.cli.app.main`); Ctrl-C while that is still being imported ends it likewise."""
    try:
        from unvanish.cli.app import main as run
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    run()
