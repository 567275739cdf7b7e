"""The command line: `unvanish --help`. Nothing heavy is imported until a command runs."""

from unvanish.cli.app import main

__all__ = ["main"]
