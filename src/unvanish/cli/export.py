"""`unvanish export`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def export(
    model: Annotated[Path, typer.Argument(help="A folder that `unvanish train` finished, of your own data.")],
    out: Annotated[Path, typer.Argument(help="File to write: .onnx, or .pt2 for torch.export.")],
    steps: Annotated[
        int | None,
        typer.Option(help="For .pt2: of torch's own operators alone, for sequences padded to so many steps."),
    ] = None,
) -> None:
    """Write a saved model for other programs, and check that it answers there as it does here.

    Inputs `x` and `lengths`; scales are part of the file, the vocabulary of a text model is in its config.json.
    """
    from unvanish import train

    difference = train.export(train.Trained.load(model), out, steps=steps)
    Console(highlight=False, soft_wrap=True, emoji=False).print(
        f"{escape(str(out))}: answers as the model does, to {difference:.0e} of the largest answer"
    )
