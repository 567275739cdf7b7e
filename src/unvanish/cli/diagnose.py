"""`unvanish diagnose FILE.py:factory`, or of a folder that `unvanish train` wrote."""

import json
import math
import runpy
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from unvanish.cli.output import UserError

if TYPE_CHECKING:
    from unvanish.diagnosis import Diagnosis


def diagnose(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="FILE.py:FACTORY. Runs this file; FACTORY() returns (model, batch, loss). Or, with --data, a folder "
            "that `unvanish train` wrote.",
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="A file as `unvanish train` reads it; its first 512 sequences.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="With --data: column of the answers; by default as the model was trained.")
    ] = None,
    id: Annotated[str | None, typer.Option(help="With --data: column that tells sequences apart, likewise.")] = None,
    time: Annotated[str | None, typer.Option(help="With --data: column of times, likewise.")] = None,
    text: Annotated[str | None, typer.Option(help="With --data: column of texts, likewise.")] = None,
    missing: Annotated[str | None, typer.Option(help="With --data: as in `unvanish train`.")] = None,
    lag: Annotated[
        int | None, typer.Option(help="Steps that the task needs; by default what the batch offers.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to load into the model first: safetensors, or a state_dict of torch.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of the batch that are followed.")] = 16,
    trial: Annotated[
        bool, typer.Option("--trial", help="Train a copy for 100 updates: the chance to learn, of it and of the cures.")
    ] = False,
    lr: Annotated[
        float, typer.Option(help="Adam's learning rate: of the trial, and for what is too sensitive.")
    ] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed of dropout, of drawn cures and of the trial.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Say what becomes of the error in a model's recurrent layers, why, and what to do.

    FACTORY returns the model, the batch as a tuple or list (input, …, target), and the loss (output, target) → scalar.
    Your file is executed; nothing else is.
    """
    columns = {"target": target, "id": id, "time": time, "text": text, "missing": missing}
    if data is None:
        for name, value in columns.items():
            if value is not None:
                raise UserError(f"--{name}: says how to read a file; expected --data with it")
        model, batch, loss = _made(source)
    else:
        model, batch, loss = _trained(source, data, **columns)
    if checkpoint is not None:
        _load(model, checkpoint)
    if data is None and batch:
        _try_out(source, model, batch, loss)
    import unvanish as uv

    found = uv.diagnose(model, *batch, loss=loss, lag=lag, samples=samples, trial=trial, lr=lr, seed=seed)
    if as_json:
        typer.echo(json.dumps(_strict(_plain(found))))
    else:
        _print(found, Console(quiet=quiet, highlight=False, emoji=False))


def _trained(folder: str, data: Path, **columns: str | None) -> tuple[Any, tuple[Any, ...], Any]:
    from unvanish import train as training

    trained = training.Trained.load(Path(folder))
    if trained.config["kind"] == "task":
        name = trained.config["task"]["name"]
        raise UserError(f"SOURCE: expected a model that was trained on data, got one of the task {name}")
    told = trained.config.get("columns", {}) | {name: value for name, value in columns.items() if value is not None}
    if "target" not in told and data.suffix.lower() != ".ts":
        raise UserError("--target: expected the column of the answers, which this model's folder does not tell")
    given = training.read_data(data, trained.config["kind"], **told)
    if not isinstance(given, training.Sequences):
        raise UserError(
            f"SOURCE: expected a model for classification or regression, got one for {trained.config['kind']}"
        )
    batch, loss = trained.batch(given)
    return trained.model, batch, loss


def _made(source: str) -> tuple[Any, tuple[Any, ...], Any]:
    file, _, name = source.rpartition(":")
    if Path(source).is_dir():
        raise UserError(f"SOURCE: {source} is a folder; of one that `unvanish train` wrote, add the file to --data")
    if not file.endswith(".py") or not name.isidentifier():
        raise UserError(f"FILE.py:FACTORY: expected a Python file and a function in it, got {source!r}")
    if not Path(file).is_file():
        raise UserError(f"FILE.py:FACTORY: there is no file {file}")
    import sys

    from torch import nn

    before = sys.path[:]
    sys.path.insert(0, str(Path(file).parent.absolute()))
    try:
        names = runpy.run_path(file, run_name=Path(file).stem)
    except (Exception, SystemExit) as error:
        raise UserError(f"FILE.py:FACTORY: running {file} raised {_raised(error, file)}") from error
    finally:
        sys.path[:] = before
    factory = names.get(name)
    if not callable(factory):
        raise UserError(f"FILE.py:FACTORY: {file} has no function {name!r}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise UserError(f"FILE.py:FACTORY: {name}() raised {_raised(error, file)}") from error
    if not isinstance(made, tuple) or len(made) != 3 or not callable(made[2]):
        raise UserError(
            f"FILE.py:FACTORY: expected {name}() to return (model, batch, loss), got {type(made).__name__}"
            + (f" of {len(made)}" if isinstance(made, tuple) else "")
        )
    model, batch, loss = made
    if not isinstance(model, nn.Module):
        raise UserError(
            f"FILE.py:FACTORY: expected {name}() to return a torch.nn.Module as model, got {type(model).__name__}"
        )
    return model, tuple(batch) if isinstance(batch, tuple | list) else (batch,), loss


def _try_out(source: str, model: Any, batch: tuple[Any, ...], loss: Any) -> None:
    """What the user's model and loss raise on the user's batch is theirs to mend, and told in a line."""
    import copy

    import torch

    inputs, target = (batch[:-1], batch[-1:]) if len(batch) > 1 else (batch, ())
    try:
        with torch.no_grad(), torch.random.fork_rng():
            loss(copy.deepcopy(model)(*inputs), *target)
    except Exception as error:
        raise UserError(
            f"FILE.py:FACTORY: loss(model(input), target) raised {_raised(error, source.rpartition(':')[0])}"
        ) from error


def _raised(error: BaseException, file: str) -> str:
    """What was raised, and the last line of the user's own file on the way there."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):  # it tells its place itself
        return what
    own = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).absolute() == Path(file).absolute()]
    return f"{what}; at {file}, line {own[-1].lineno}: {own[-1].line}" if own else what


def _load(model: Any, path: Path) -> None:
    from pickle import UnpicklingError

    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"--checkpoint: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            # Only tensors: a pickle that holds anything else is refused, not run.
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    except UnpicklingError as error:
        raise UserError(f"--checkpoint: {path} is no plain state_dict; only tensors are loaded from a file") from error
    except Exception as error:  # of damaged bytes torch's reader raises whatever it stumbles over
        raise UserError(f"--checkpoint: {path} can't be read: {type(error).__name__}: {error}") from error
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"--checkpoint: {path} does not fit the model: {error}") from error


def _plain(found: "Diagnosis") -> dict[str, Any]:
    from dataclasses import asdict

    layers = {name: asdict(d) for name, d in found.items()}
    prescriptions = [
        {
            "cure": p.cure,
            "module": p.path,
            "reason": p.reason,
            "chance": p.chance,
            "predicted": {
                name: {"verdict": d.verdict, "rate": d.rate, "reach": d.reach} for name, d in p.predicted.items()
            },
        }
        for p in found.prescriptions
    ]
    return {
        "layers": layers,
        "chance": found.chance,
        "readable": found.readable,
        "notes": list(found.notes),
        "prescriptions": prescriptions,
    }


def _strict(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_COLOUR = {"healthy": "green", "undecided": "yellow"}


def _print(found: "Diagnosis", console: Console) -> None:
    for name, d in found.items():
        colour = _COLOUR.get(d.verdict, "red")
        console.print(f"[bold]{escape(name)}[/bold] ({d.cell}): [{colour}]{d.verdict}[/{colour}]")
        half = "" if d.half_life is None else f", half-life {d.half_life:.3g} steps"
        console.print(f"  {d.rate_in_words}{half}, reach {d.reach} of {d.lag} steps", markup=False)
        console.print(f"  {d.cause}", markup=False)
    for note in found.notes:
        console.print(note, markup=False)
    if found.chance is not None:
        console.print(f"\nChance of learning as it is: {found.chance:.0%}", markup=False)
    if found.nothing:
        console.print(f"\n{found.nothing[0].upper()}{found.nothing[1:]}.", markup=False)
    for number, p in enumerate(found.prescriptions, 1):
        if number == 1:
            console.print("\n[bold]What to do[/bold], the most promising first:")
        where = f" on {p.path}" if p.path else ""
        console.print(f"  {number}. {p.cure}{where}: {p.reason}{p.limit}", markup=False)
        for name, d in p.predicted.items():
            rate = "" if math.isnan(d.rate) else f", {d.rate:+.3g} nats per step"
            console.print(f"     {name} then: {d.verdict}{rate}, reach {d.reach}", markup=False)
        if p.chance is not None:
            console.print(f"     chance of learning then: {p.chance:.0%}", markup=False)
