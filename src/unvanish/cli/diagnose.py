"""`unvanish diagnose FILE.py:factory`."""

import json
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from unvanish.cli.output import UserError

if TYPE_CHECKING:
    from unvanish.diagnose import Diagnosis


def diagnose(
    source: Annotated[
        str, typer.Argument(metavar="FILE.py:FACTORY", help="Runs this file; FACTORY() returns (model, batch, loss).")
    ],
    lag: Annotated[int | None, typer.Option(help="Steps that the task needs. [default: what the batch offers]")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to load into the model first: safetensors, or a state_dict of torch.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of the batch that are followed.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of dropout and of drawn cures.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Say what becomes of the error in a model's recurrent layers, why, and what to do.

    FACTORY returns the model, the batch as a tuple (input, …, target), and the loss (output, target) → scalar.
    Your file is executed; nothing else is.
    """
    model, batch, loss = _made(source)
    import unvanish as uv

    if checkpoint is not None:
        _load(model, checkpoint)
    found = uv.diagnose(model, *batch, loss=loss, lag=lag, samples=samples, seed=seed)
    if as_json:
        typer.echo(json.dumps(_plain(found)))
    else:
        _print(found, Console(quiet=quiet, highlight=False))


def _made(source: str) -> tuple[Any, tuple[Any, ...], Any]:
    file, _, name = source.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise UserError(f"FILE.py:FACTORY: expected a Python file and a function in it, got {source!r}")
    if not Path(file).is_file():
        raise UserError(f"FILE.py:FACTORY: there is no file {file}")
    import sys

    sys.path.insert(0, str(Path(file).parent.absolute()))
    try:
        names = runpy.run_path(file, run_name=Path(file).stem)
    finally:
        sys.path.pop(0)
    factory = names.get(name)
    if not callable(factory):
        raise UserError(f"FILE.py:FACTORY: {file} has no function {name!r}")
    made = factory()
    if not isinstance(made, tuple) or len(made) != 3 or not callable(made[2]):
        raise UserError(
            f"FILE.py:FACTORY: expected {name}() to return (model, batch, loss), got {type(made).__name__}"
            + (f" of {len(made)}" if isinstance(made, tuple) else "")
        )
    model, batch, loss = made
    return model, batch if isinstance(batch, tuple) else (batch,), loss


def _load(model: Any, path: Path) -> None:
    from pickle import UnpicklingError

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            # Only tensors: a pickle that holds anything else is refused, not run.
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
        model.load_state_dict(weights)
    except FileNotFoundError as error:
        raise UserError(f"--checkpoint: there is no file {path}") from error
    except (SafetensorError, RuntimeError, TypeError, AttributeError, ValueError, EOFError) as error:
        raise UserError(f"--checkpoint: {path} does not fit the model: {error}") from error
    except UnpicklingError as error:
        raise UserError(f"--checkpoint: {path} is no plain state_dict; only tensors are loaded from a file") from error


def _plain(found: "Diagnosis") -> dict[str, Any]:
    from dataclasses import asdict

    layers = {name: asdict(d) for name, d in found.items()}
    prescriptions = [
        {
            "cure": p.cure,
            "module": p.path,
            "reason": p.reason,
            "predicted": {
                name: {"verdict": d.verdict, "rate": d.rate, "reach": d.reach} for name, d in p.predicted.items()
            },
        }
        for p in found.prescriptions
    ]
    return {"layers": layers, "prescriptions": prescriptions}


_COLOUR = {"healthy": "green", "undecided": "yellow"}


def _print(found: "Diagnosis", console: Console) -> None:
    for name, d in found.items():
        low, high = d.rate_interval
        colour = _COLOUR.get(d.verdict, "red")
        console.print(f"[bold]{escape(name)}[/bold] ({d.cell}): [{colour}]{d.verdict}[/{colour}]")
        half = "" if d.half_life is None else f", half-life {d.half_life:.3g} steps"
        console.print(
            f"  {d.rate:+.3g} nats per step [{low:+.2g}, {high:+.2g}]{half}, reach {d.reach} of {d.lag} steps",
            markup=False,
        )
        console.print(f"  {d.cause}", markup=False)
    if found.healthy:
        console.print("\nNothing to cure.")
    for number, p in enumerate(found.prescriptions, 1):
        if number == 1:
            console.print("\n[bold]What to do[/bold], the most promising first:")
        where = f" on {p.path}" if p.path else ""
        console.print(f"  {number}. {p.cure}{where}: {p.reason}", markup=False)
        for name, d in p.predicted.items():
            console.print(f"     {name} then: {d.verdict}, {d.rate:+.3g} nats per step, reach {d.reach}", markup=False)
