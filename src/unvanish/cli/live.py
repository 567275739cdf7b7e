"""`unvanish live FOLDER`: a page that follows a training."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from unvanish.cli.output import UserError


def live(
    folder: Annotated[
        Path,
        typer.Argument(help="A folder of `uv.watch(..., stream=FOLDER)`, or one that `unvanish train` writes."),
    ],
    port: Annotated[int, typer.Option(help="Port on this machine; 0: a free one.")] = 0,
) -> None:
    """Follow a running training in the browser: reach and loss, every layer's gradient over time, warnings.

    Serves on 127.0.0.1 alone, and only to who has the printed address. It reads the folder and nothing else; it goes on
    when the trainer dies. Ctrl-C ends it.
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
    console.print(f"Follows {folder} at [bold]{server.url}[/bold]")
    console.print("Ctrl-C ends it.")
    try:
        server.serve()
    except KeyboardInterrupt:
        console.print("ended")
