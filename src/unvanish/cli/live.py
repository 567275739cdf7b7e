"""`unvanish live FOLDER`: a page that follows a training."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from unvanish.cli.output import UserError


def live(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder written by `uv.watch(..., stream=FOLDER)` or by `unvanish train`."),
    ],
    port: Annotated[int, typer.Option(help="Port on this machine; 0: any free port.")] = 0,
) -> None:
    """Follow a running training in the browser: reach, loss, gradient of every layer over time, warnings.

    Serves on 127.0.0.1 only, to whoever has the printed address. Reads nothing but the folder.
    Stays up when the training process ends; stop it with Ctrl-C.
    """
    from unvanish.report.following import Following
    from unvanish.report.live import LiveServer

    try:
        server = LiveServer(Following(folder), port)
    except NotADirectoryError as error:
        raise UserError(str(error)) from error
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: {port} can't be used: {error}") from error
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    console.print(f"Following {folder} at [bold]{server.url}[/bold]")
    console.print("Stop with Ctrl-C.")
    try:
        server.serve()
    except KeyboardInterrupt:
        console.print("stopped")
