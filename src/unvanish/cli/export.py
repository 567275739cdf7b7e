"""`unvanish export`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def export(
    model: Annotated[Path, typer.Argument(help="Folder of a model that `unvanish train` trained on your own data.")],
    out: Annotated[Path, typer.Argument(help="File to write: .onnx, or .pt2 for torch.export.")],
    steps: Annotated[
        int | None,
        typer.Option(help="For .pt2: use torch's own operators only, for sequences padded to this many steps."),
    ] = None,
) -> None:
    """Export a trained model to ONNX or torch.export, and check that its answers stay the same.

    Its inputs are `x` and `lengths`. It scales the channels itself.
    The vocabulary of a text model stays in its config.json.
    """
    from unvanish import train

    difference = train.export(train.Trained.load(model), out, steps=steps)
    Console(highlight=False, soft_wrap=True, emoji=False).print(
        f"{escape(str(out))}: answers as the model does, to {difference:.0e} of the largest answer"
    )
