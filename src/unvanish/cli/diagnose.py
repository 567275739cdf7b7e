"""`unvanish diagnose FILE.py:factory`, or of a folder that `unvanish train` wrote."""

import json
import math
import runpy
import traceback
import warnings
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
            help="FILE.py:FACTORY, where FACTORY() returns (model, batch, loss), (model, step) or (LightningModule, "
            "batch); or a folder written by `unvanish train`, with --data unless it was trained on a task.",
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Data file in a format of `unvanish train`; at most 512 sequences are used.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="With --data: column of the answers; by default the one used in training.")
    ] = None,
    id: Annotated[str | None, typer.Option(help="With --data: column of sequence ids; by default as above.")] = None,
    time: Annotated[str | None, typer.Option(help="With --data: column of times; by default as above.")] = None,
    text: Annotated[str | None, typer.Option(help="With --data: column of texts; by default as above.")] = None,
    missing: Annotated[
        str | None, typer.Option(help="With --data: what to do with missing values, as in `unvanish train`.")
    ] = None,
    lag: Annotated[
        int | None, typer.Option(help="Longest lag that the task needs, in steps; by default the longest in the batch.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to load into the model first: safetensors or a torch state_dict.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of the batch whose gradients are measured.")] = 16,
    budget: Annotated[
        float, typer.Option(help="Seconds for training copies of the model, each with one change; 0: none.")
    ] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of dropout, random cures and the training of copies.")] = 0,
    out: Annotated[Path | None, typer.Option(help="HTML file to write the diagnosis to; it opens offline.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Find out why a model does not learn, with proofs, and what to change.

    The batch is a tuple or list (input, …, target), the loss a function of (output, target), the step one of the model.
    Your file is executed; no other file is.

    Exit status: 0 if nothing was found that keeps the model from learning, 1 if something was, 2 for an error.
    """
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"--out: expected a file in a folder that exists, got {out}")
    columns = {"target": target, "id": id, "time": time, "text": text, "missing": missing}
    factory = data is None and not Path(source).is_dir()
    if factory:
        for name, value in columns.items():
            if value is not None:
                raise UserError(f"--{name}: says how to read a file; expected --data with it")
        model, batch, how = _made(source)
    else:
        model, batch, loss = _trained(source, data, **columns)
        how = {"loss": loss}
    if checkpoint is not None:
        _load(model, checkpoint)
    if factory and (batch or how):
        _try_out(source, model, batch, how)
    import unvanish as uv

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same of every pass; what matters is a finding
        found = uv.diagnose(
            model,
            *batch,
            **how,
            lag=lag,
            samples=samples,
            budget=budget,
            seed=seed,
            progress=_silent if quiet else None,
        )
    if out is not None:
        found.to_html(out)
    if as_json:
        typer.echo(json.dumps(_strict(_plain(found))))
    else:
        console = Console(quiet=quiet, highlight=False, emoji=False)
        _print(found, console)
        if out is not None:
            console.print(f"Page: [bold]{escape(str(out.absolute()))}[/bold]", soft_wrap=True)
    if not found.healthy:
        raise typer.Exit(1)


def _silent(sentence: str) -> None:
    pass


def _trained(folder: str, data: Path | None, **columns: str | None) -> tuple[Any, tuple[Any, ...], Any]:
    """(model, batch, loss) of a folder that `unvanish train` wrote, and of data if it was trained on some."""
    from unvanish import train as training

    trained = training.Trained.load(Path(folder))
    if trained.config["kind"] == "task":
        if data is not None:
            name = trained.config["task"]["name"]
            raise UserError(f"--data: {folder} was trained on the task {name}, which draws its own; leave it out")
        return trained.model, *trained.batch()
    if data is None:
        raise UserError(f"--data: expected a file like the one that {folder} was trained on")
    told = trained.config.get("columns", {}) | {name: value for name, value in columns.items() if value is not None}
    kind = trained.config["kind"]
    if "target" not in told and kind != "language" and data.suffix.lower() != ".ts":
        raise UserError("--target: expected the column of the answers, which this model's folder does not tell")
    return trained.model, *trained.batch(training.read_data(data, kind, **told))


def _made(source: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(model, batch, loss or step by name)"""
    file, _, name = source.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise UserError(f"FILE.py:FACTORY: expected a Python file and a function in it, got {source!r}")
    if not Path(file).is_file():
        raise UserError(f"FILE.py:FACTORY: there is no file {file}")
    import sys

    from torch import nn

    # As Python does for a script, and for good: the factory, the step and the model may import later.
    sys.path.insert(0, str(Path(file).parent.absolute()))
    try:
        names = runpy.run_path(file, run_name=Path(file).stem)
    except (Exception, SystemExit) as error:
        raise UserError(f"FILE.py:FACTORY: running {file} raised {_raised(error, file)}") from error
    factory = names.get(name)
    if not callable(factory):
        raise UserError(f"FILE.py:FACTORY: {file} has no function {name!r}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise UserError(f"FILE.py:FACTORY: {name}() raised {_raised(error, file)}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or (len(made) == 3 and not callable(made[2])):
        raise UserError(
            f"FILE.py:FACTORY: expected {name}() to return (model, batch, loss), (model, step) or (LightningModule, "
            f"batch), got {type(made).__name__}" + (f" of {len(made)}" if isinstance(made, tuple) else "")
        )
    model, batch = made[:2]
    if not isinstance(model, nn.Module):
        raise UserError(
            f"FILE.py:FACTORY: expected {name}() to return a torch.nn.Module as model, got {type(model).__name__}"
        )
    if len(made) == 3:
        return model, tuple(batch) if isinstance(batch, tuple | list) else (batch,), {"loss": made[2]}
    if callable(batch) and not hasattr(model, "training_step"):
        return model, (), {"step": batch}
    if not hasattr(model, "training_step"):
        raise UserError(
            f"FILE.py:FACTORY: expected {name}() to return a step, or a LightningModule and its batch, got "
            f"{type(batch).__name__} with {type(model).__name__}"
        )
    return model, (batch,), {}


def _try_out(source: str, model: Any, batch: tuple[Any, ...], how: dict[str, Any]) -> None:
    """Reports what the user's model and loss raise on the user's batch as a one-line error."""
    from unvanish.diagnosis.structure import detached_copy
    from unvanish.seeding import generators_kept

    inputs, target = (batch[:-1], batch[-1:]) if len(batch) > 1 else (batch, ())
    calls = {"step": "step(model)", "loss": "loss(model(input), target)"}
    what = calls.get(next(iter(how), ""), "training_step(batch, 0)")
    try:
        with generators_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the diagnosis says what matters
            twin = detached_copy(model)
            if "step" in how:
                how["step"](twin)
            elif "loss" in how:
                how["loss"](twin(*inputs), *target)
            else:
                twin.training_step(*batch, 0)  # type: ignore[operator]
    except Exception as error:
        raise UserError(f"FILE.py:FACTORY: {what} raised {_raised(error, source.rpartition(':')[0])}") from error


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

    plan = found.plan
    return {
        "model": found.model,
        "headline": found.headline,
        "healthy": found.healthy,
        "findings": [asdict(finding) for finding in found.findings],
        "plan": {
            "steps": [step.says for step in plan.steps],
            "code": plan.code,
            "predicted": None if plan.predicted is None else asdict(plan.predicted),
        },
        "tried": [asdict(row) for row in found.tried],
        "chance": found.chance,
        "layers": {name: asdict(d) for name, d in found.items()},
        "notes": list(found.notes),
    }


def _strict(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_COLOUR = {"error": "red", "warning": "yellow", "note": "cyan"}


def _print(found: "Diagnosis", console: Console) -> None:
    first = found.findings[0]
    colour = "green" if first.code == "healthy" else _COLOUR[first.severity]
    console.print(f"[bold {colour}]{first.code}[/]: {escape(first.says)}")
    for finding in found.findings:
        where = f" in {finding.where}" if finding.where else ""
        if finding is not first:
            console.print(
                f"\n[{_COLOUR[finding.severity]}]{finding.severity}, {finding.code}[/]{escape(where)}: "
                f"{escape(finding.says)}"
            )
        elif where:
            console.print(f"  where: {finding.where}", markup=False)
        console.print(f"  proof: {finding.proof}", markup=False)
        # A plan is printed once, below.
        if finding.do and finding.do != found.plan.code:
            console.print(f"  do: {finding.do}", markup=False)
        console.print(f"  more: {finding.page}", markup=False)
    if found.plan:
        console.print("\n[bold]Plan[/bold]")
        console.print(str(found.plan).rstrip(), markup=False)
    if found.chance_in_words:
        console.print(f"\n{found.chance_in_words}", markup=False)
    if found.layers:
        console.print("\n[bold]Reach of the gradient[/bold] (a measurement; it matters if the answer needs more steps)")
    for name, d in found.items():
        half = "" if d.half_life is None else f", half-life {d.half_life:.3g} steps"
        console.print(
            f"  {name} ({d.cell}): {d.verdict}; {d.rate_in_words}{half}, reach {d.reach} of {d.lag} steps", markup=False
        )
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
