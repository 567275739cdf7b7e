"""Commands: parse, call one public function, print."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer.exceptions import TyperException

from unvanish.cli.bench import bench
from unvanish.cli.diagnose import diagnose
from unvanish.cli.export import export
from unvanish.cli.installed import installed
from unvanish.cli.interrupt import Commands, ended_like_ctrl_c
from unvanish.cli.live import live
from unvanish.cli.output import MARKER, OutputFolder, UserError
from unvanish.cli.train import predict, train
from unvanish.extras import MissingExtraError

app = typer.Typer(
    name="unvanish",
    cls=Commands,
    help="See, explain and cure vanishing gradients in recurrent networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

USER_ERROR = 2
INTERRUPTED = 130


@app.callback()
def _root() -> None:
    """See, explain and cure vanishing gradients in recurrent networks."""


@app.command()
def compare(
    task: Annotated[
        list[str] | None, typer.Option(help="Task; repeat the option for several. By default adding and digits-padded.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Steps per sequence; by default the task's own. Tasks of images have a fixed length."),
    ] = None,
    cells: Annotated[
        str, typer.Option(help="Models to train, separated by commas.")
    ] = "rnn,gru,lstm,lstm-chrono,janet-chrono,ur_lstm",
    hidden: Annotated[int, typer.Option(help="Hidden units.")] = 32,
    steps: Annotated[int | None, typer.Option(help="Optimizer updates; by default the task's own.")] = None,
    batch: Annotated[int, typer.Option(help="Samples per update.")] = 32,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="First seed; it fixes data, weights and their order.")] = 0,
    seeds: Annotated[int, typer.Option(help="Trainings per model and task, from consecutive seeds.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder to write to: new, empty, or the folder of an earlier run.")] = Path(
        "unvanish-compare"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of tables.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Train cells, with and without cures, on tasks with long lags, and report which ones learn.

    Prints a table and writes a folder with report.html (which opens offline), figures, results.json and flow records.
    """
    folder = OutputFolder(out)
    from unvanish import report, train
    from unvanish.cli.progress import TrainingBars

    console = Console(quiet=quiet or as_json, emoji=False)
    names = [name.strip() for name in cells.split(",") if name.strip()]
    if not names:
        raise UserError(f"--cells: expected names out of {', '.join(train.RECIPES)}, got {cells!r}")
    with folder.staged() as stage, TrainingBars(console) as bars:
        result = train.compare(
            task or train.DEFAULT_TASKS,
            names,
            length=length,
            hidden=hidden,
            steps=steps,
            batch=batch,
            lr=lr,
            seed=seed,
            seeds=seeds,
            flows=stage,
            command=shlex.join(["unvanish", *sys.argv[1:]]),
            tell=bars.update,
            say=bars.say,
        )
        bars.say("drawing the figures and writing the report")
        (stage / "results.json").write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")
        report.save_figures(result, stage)
        report.write_comparison(result, stage / "report.html")
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    report.print_comparison(result, console)
    console.print(f"Report: [bold]{escape(str(folder.path / 'report.html'))}[/bold]", highlight=False)


app.command()(diagnose)
app.command()(live)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `unvanish compare` wrote.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Rebuild report.html and the figures from the results.json of a comparison."""
    path = folder / MARKER
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"FOLDER: {folder} has no {MARKER}; name a folder that `unvanish compare` wrote") from error
    except OSError as error:
        raise UserError(f"FOLDER: {path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise UserError(f"{path}: not JSON that `unvanish compare` wrote: {error}") from error
    from unvanish import report, train

    result = train.Comparison.from_json(data)
    report.save_figures(result, folder)
    report.write_comparison(result, folder / "report.html")
    console = Console(quiet=quiet, emoji=False)
    report.print_comparison(result, console)
    console.print(f"Report: [bold]{escape(str((folder / 'report.html').absolute()))}[/bold]", highlight=False)


@app.command()
def tasks(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the tasks, each with its length, chance level and source."""
    from rich.table import Table

    from unvanish import train

    if as_json:
        facts = ("title", "describe", "source", "kind", "default_length")
        typer.echo(json.dumps({name: {f: getattr(task, f) for f in facts} for name, task in train.TASKS.items()}))
        return
    table = Table(show_lines=True)
    for column in ("task", "what it asks", "steps", "chance"):
        table.add_column(column, justify="right" if column in ("steps", "chance") else "left")
    for name, task in train.TASKS.items():
        chance = "" if not isinstance(getattr(task, "chance", None), float) else f"{task.chance:.3g}"
        table.add_row(name, f"{task.describe}\n[dim]{escape(task.source)}[/dim]", str(task.default_length), chance)
    Console(emoji=False).print(table)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """Show versions, installed extras, the processor, and which engine rung runs here and why."""
    import torch

    from unvanish import engine, train
    from unvanish.cells import CELLS

    if as_json:
        rung = engine.explain(CELLS["lstm"], torch.zeros(1, 1, 1)).rung
        found = {"rung": rung, "isa": engine.isa() if rung == "native" else None, "parts": installed()}
        typer.echo(json.dumps(train.environment() | found))
        return
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    for name, value in train.environment().items():
        console.print(f"{name:12} {escape(value)}")
    console.print("\n[bold]parts[/bold]")
    for name, found in installed().items():
        console.print(f"{name:12} {escape(found)}")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        console.print(f"\n[bold]a float32 sequence on {device}[/bold]")
        choice = engine.explain(CELLS["lstm"], torch.zeros(2, 1, 1, device=device))
        console.print(escape(str(choice)))
        if choice.rung == "native":
            console.print(f"instruction set: {engine.isa()}")


app.command()(bench)
app.command()(train)
app.command()(predict)
app.command()(export)


def main() -> None:
    """Run the command line; a user's error ends with one line and exit code 2, Ctrl-C or SIGTERM with 130."""
    try:
        with ended_like_ctrl_c():
            status = app(standalone_mode=False)  # typer.Exit's code, or what the command returned
        if isinstance(status, int) and status:
            sys.exit(status)
    except (UserError, MissingExtraError, ValueError, ArithmeticError, OSError) as error:
        _fail(str(error), USER_ERROR)
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "interrupted; nothing was written", INTERRUPTED)
    except TyperException as error:
        _fail(error.format_message(), USER_ERROR)


def _fail(message: str, code: int) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    console.print("[bold red]error:[/bold red]", escape(message))
    sys.exit(code)
