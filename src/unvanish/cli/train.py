"""`unvanish train` and `unvanish predict`: a model of the user's own data."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from unvanish.cli.output import UserError

DataFile = Annotated[Path, typer.Option(help="CSV with a header, UTF-8; one sequence per row, or with --id one step.")]
IdColumn = Annotated[str | None, typer.Option(help="Column that tells sequences apart, in a long file.")]
MissingPolicy = Annotated[str, typer.Option(help="A missing value is an 'error', or gets the channel's 'mean'.")]


def train(
    data: DataFile,
    target: Annotated[str, typer.Option(help="Column of the answers.")],
    kind: Annotated[str, typer.Option(help="classification or regression.")] = "classification",
    id: IdColumn = None,
    missing: MissingPolicy = "error",
    cell: Annotated[str, typer.Option(help="Model, as in `unvanish compare --cells`.")] = "lstm-chrono",
    hidden: Annotated[int, typer.Option(help="Hidden units.")] = 48,
    epochs: Annotated[int, typer.Option(help="Passes over the training sequences, at most.")] = 50,
    patience: Annotated[int, typer.Option(help="Epochs without improvement before it stops.")] = 10,
    batch: Annotated[int, typer.Option(help="Sequences per update.")] = 32,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-2,
    clip: Annotated[float, typer.Option(help="Global gradient norm.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of split, weights and order.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the model; must be new.")] = Path("unvanish-model"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Train on your own sequences: 70 % train, 15 % validation, 15 % test, whole sequences, by seed and class."""
    if out.exists():
        raise UserError(f"--out: {out} exists; name a new folder")
    try:  # before the training, not after it
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.").cleanup()
    except OSError as error:
        raise UserError(f"--out: {out} can't be written: {error.strerror}") from error
    if kind not in ("classification", "regression"):
        raise UserError(f"--kind: expected classification or regression, got {kind!r}")
    if missing not in ("error", "mean"):
        raise UserError(f"--missing: expected error or mean, got {missing!r}")
    from lightning.pytorch.callbacks import RichProgressBar

    from unvanish.train.data import read_csv
    from unvanish.train.supervised import Settings, train_on

    settings = Settings(cell, hidden, epochs, batch, lr, clip, patience, seed)
    sequences = read_csv(data, target=target, id=id, missing=missing)
    trained = train_on(sequences, settings, kind, [] if quiet else [RichProgressBar()])
    trained.save(out)
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    for label, count in trained.config["class_counts"].items():
        console.print(f"class {escape(label)}: {count} of {len(sequences)}")
    for metric, value in trained.config["test"].items():
        console.print(f"test {metric} {value:.4g}; without a model {trained.config['baseline'][metric]:.4g}")
    console.print(f"Model: [bold]{escape(str(out.absolute()))}[/bold]")


def predict(
    model: Annotated[Path, typer.Argument(help="A folder that `unvanish train` wrote.")],
    data: DataFile,
    target: Annotated[str | None, typer.Option(help="Column of answers to leave out.")] = None,
    id: IdColumn = None,
    missing: MissingPolicy = "error",
) -> None:
    """Apply a saved model: CSV on the terminal, one line per sequence."""
    if missing not in ("error", "mean"):
        raise UserError(f"--missing: expected error or mean, got {missing!r}")
    import csv
    import sys

    from unvanish.train.data import read_csv
    from unvanish.train.supervised import Trained

    sequences = read_csv(data, target=target, id=id, missing=missing)
    answers = Trained.load(model).predict(sequences)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["sequence", "prediction"])
    writer.writerows(zip(sequences.names, answers, strict=True))
