"""`unvanish train` and `unvanish predict`."""

import math
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from unvanish.cli.output import UserError

if TYPE_CHECKING:
    from unvanish.train import Trained

CLASSES = 20
"""how many are listed"""
OF_DATA = ("kind", "target", "id", "time", "text", "missing", "horizon", "window", "season")
"""options that say what is learnt from a file"""
DATA, MODEL, TRAINING, RUN = "What is learnt", "Model", "Training", "Run"
DataFile = Annotated[
    Path | None,
    typer.Option(help="Data file: CSV, Parquet, UCR/UEA .ts, or plain text (language).", rich_help_panel=DATA),
]
IdColumn = Annotated[
    str | None, typer.Option(help="Column of the ids that tell sequences (or series) apart.", rich_help_panel=DATA)
]
TimeColumn = Annotated[str | None, typer.Option(help="Column of times; they must increase.", rich_help_panel=DATA)]
TextColumn = Annotated[str | None, typer.Option(help="Column of texts.", rich_help_panel=DATA)]
MissingPolicy = Annotated[
    str | None,
    typer.Option(
        help="What to do with missing values: error (the default in training), mean (of the channel) or previous.",
        rich_help_panel=DATA,
    ),
]


def _option(panel: str, help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


def train(
    task: Annotated[str | None, _option(DATA, "Task to train on (see `unvanish tasks`), instead of --data.")] = None,
    data: DataFile = None,
    kind: Annotated[
        str | None,
        _option(DATA, "classification (the default), regression, forecasting or language."),
    ] = None,
    target: Annotated[str | None, _option(DATA, "Column of the answers, or of the series to forecast.")] = None,
    id: IdColumn = None,
    time: TimeColumn = None,
    text: TextColumn = None,
    missing: MissingPolicy = None,
    horizon: Annotated[int | None, _option(DATA, "Number of steps to forecast; by default 1.")] = None,
    window: Annotated[int | None, _option(DATA, "Number of past steps that a forecast reads; by default 48.")] = None,
    season: Annotated[int | None, _option(DATA, "Steps per season, for the seasonal naive baseline.")] = None,
    length: Annotated[int | None, _option(DATA, "With --task: steps per sequence; by default the task's own.")] = None,
    cell: Annotated[
        str, _option(MODEL, "Cell and initialisation, a name as in `unvanish compare --cells`.")
    ] = "lstm-chrono",
    hidden: Annotated[int, _option(MODEL, "Hidden units.")] = 48,
    layers: Annotated[int, _option(MODEL, "Recurrent layers.")] = 1,
    bidirectional: Annotated[bool, _option(MODEL, "Read in both directions.", "--bidirectional")] = False,
    dropout: Annotated[float, _option(MODEL, "Dropout between layers and before the output.")] = 0.0,
    read: Annotated[
        str | None, _option(MODEL, "State that the output is computed from: last, or mean over the steps.")
    ] = None,
    epochs: Annotated[int | None, _option(TRAINING, "Maximum number of passes over the data; by default 50.")] = None,
    steps: Annotated[
        int | None, _option(TRAINING, "Maximum number of updates, instead of --epochs; by default 600 with --task.")
    ] = None,
    batch: Annotated[int, _option(TRAINING, "Samples per update, over all processes.")] = 32,
    lr: Annotated[float, _option(TRAINING, "Learning rate.")] = 1e-2,
    optimizer: Annotated[str, _option(TRAINING, "adam, adamw, sgd, or rmsprop with decay 0.9.")] = "adam",
    weight_decay: Annotated[float, _option(TRAINING, "Weight decay of the optimizer.")] = 0.0,
    schedule: Annotated[str, _option(TRAINING, "Learning-rate schedule: constant or cosine.")] = "constant",
    clip: Annotated[float, _option(TRAINING, "Clip the global gradient norm to this value.")] = 1.0,
    clip_recurrence: Annotated[float | None, _option(TRAINING, "Clip the gradient passed from step to step.")] = None,
    omega: Annotated[float, _option(TRAINING, "Weight of the penalty Ω of Pascanu et al.")] = 0.0,
    tbptt: Annotated[
        int | None, _option(TRAINING, "Truncated BPTT: cut the gradient every N steps, keep the state.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, _option(TRAINING, "Store one state in N and recompute the others, for very long sequences.")
    ] = None,
    patience: Annotated[
        int | None,
        _option(TRAINING, "Stop after this many rounds without improvement; 0: never. By default 10; 0 with --task."),
    ] = None,
    every: Annotated[
        int | None,
        _option(TRAINING, "Updates between two validations and checkpoints; by default a pass over the data."),
    ] = None,
    seed: Annotated[int, _option(TRAINING, "Seed of split, weights, order and dropout.")] = 0,
    out: Annotated[Path, _option(RUN, "Folder for checkpoints and the trained model.")] = Path("unvanish-model"),
    resume: Annotated[bool, _option(RUN, "Continue from the newest checkpoint in --out.", "--resume")] = False,
    logger: Annotated[str, _option(RUN, "csv, tensorboard, wandb or none; logs go to OUT/logs.")] = "csv",
    flow_every: Annotated[int, _option(RUN, "Updates between two measurements of the gradient; 0: none.")] = 100,
    devices: Annotated[int, _option(RUN, "Processes per machine.")] = 1,
    nodes: Annotated[int, _option(RUN, "Number of machines.")] = 1,
    accelerator: Annotated[str, _option(RUN, "cpu, gpu, or another accelerator of Lightning.")] = "cpu",
    budget: Annotated[
        float,
        _option(RUN, "Seconds for trying changes on copies, if the model is no better than guessing; see report.html."),
    ] = 0.0,
    as_json: Annotated[bool, _option(RUN, "Print the model's config.json instead of a summary.", "--json")] = False,
    quiet: Annotated[bool, _option(RUN, "Print nothing but errors.", "--quiet", "-q")] = False,
) -> None:
    """Train a model on a task, or on your own data.

    Every round ends with a checkpoint. After a crash, run the same command with --resume:
    it ends with the weights of an uninterrupted training.
    """
    given = locals()  # each option is called what it sets
    if (task is None) == (data is None):
        raise UserError("--task, --data: expected one of them")
    for name, value in (("flow-every", flow_every), ("budget", budget)):
        if not 0 <= value < math.inf:
            raise UserError(f"--{name}: expected 0 or more, got {value}")
    from unvanish import train as training
    from unvanish.cli.progress import TrainingBars

    settings = training.Settings(**{setting.name: given[setting.name] for setting in fields(training.Settings)})
    of_data = {name: given[name] for name in OF_DATA if given[name] is not None}
    if task is not None:
        for name in of_data:
            raise UserError(f"--{name}: not used by a task; leave it out")
        problem = training.TaskProblem(training.make_task(task, length, seed))
    else:
        if length is not None:
            raise UserError("--length: data has its own; leave it out")
        assert data is not None
        problem = training.read_problem(data, seed=seed, **of_data)
    machines = training.Machines(devices, nodes, accelerator)
    console = Console(quiet=quiet or as_json or not machines.first, highlight=False, soft_wrap=True, emoji=False)
    label = task or problem.kind
    with TrainingBars(console) as bars:
        trained = training.train_on(
            problem,
            settings,
            out=out,
            resume=resume,
            flow_every=flow_every or None,
            budget=budget,
            loggers=training.make_loggers(logger, out / "logs"),
            machines=machines,
            tell=lambda done, total, error: bars.update(f"{label} {cell}", done, total, error),
        )
    if as_json and machines.first:
        import json

        typer.echo(json.dumps(trained.config))
    _print(trained, out, console)
    source = ["--data", str(data)] if data is not None else []
    console.print(f"Next: [bold]{escape(shlex.join(_follows(trained, out, source)))}[/bold]")


def _follows(trained: "Trained", out: Path, source: list[str]) -> list[str]:
    """The command that the training's outcome asks for."""
    kind = trained.config["kind"]
    # A model that could not be examined, of which a warning has told, has no assessment.
    if kind == "task" or not trained.config.get("assessment", {"better": True})["better"]:
        return ["unvanish", "diagnose", str(out), *source]
    return ["unvanish", "predict", str(out), *(["--prompt", "..."] if kind == "language" else source)]


def _print(trained: "Trained", out: Path, console: Console) -> None:
    from unvanish.draw import steps
    from unvanish.train.run_folder import PAGE

    config = trained.config
    if "split_rule" in config:
        console.print(f"Split: {config['split_rule']} ({', '.join(f'{n} {k}' for k, n in config['split'].items())}).")
    if "class_counts" in config:
        counts = config["class_counts"]
        for label, count in list(counts.items())[:CLASSES]:
            console.print(f"class {escape(label)}: {count} of {sum(counts.values())}")
        if len(counts) > CLASSES:
            console.print(f"… and {len(counts) - CLASSES} more, see config.json")
        if max(counts.values()) > 1.5 * min(counts.values()):
            ratio = max(counts.values()) / min(counts.values())
            console.print(f"The classes are imbalanced, {ratio:.3g} to 1; look at the balanced accuracy.")
    for name, found in config.get("reach", {}).items():
        (was, now), half_lives = found["reach"], found["half_life"]
        half = " → ".join("none, it does not fade" if v is None else f"{v:.3g} steps" for v in half_lives)
        console.print(
            f"gradient in {escape(name)}, before → after training: reach {was} → {now} of {steps(found['lag'])}; "
            f"half-life {half}"
        )
    for who, figures in config["test"].items():
        shown = ", ".join(f"{metric} {value:.4g}" for metric, value in figures.items())
        console.print(f"test, {escape(who)}: {shown}")
    if "assessment" in config:
        found = config["assessment"]
        console.print(f"[bold {'green' if found['better'] else 'yellow'}]{escape(found['says'])}[/]")
    console.print(f"Model: [bold]{escape(str(out.absolute()))}[/bold]")
    if (out / PAGE).is_file():
        console.print(f"Page: [bold]{escape(str(out.absolute() / PAGE))}[/bold]")


def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a model that `unvanish train` trained.")],
    data: DataFile = None,
    target: Annotated[
        str | None, _option(DATA, "Column of the answers (not read), or of the series to forecast.")
    ] = None,
    id: IdColumn = None,
    time: TimeColumn = None,
    text: TextColumn = None,
    missing: MissingPolicy = None,
    prompt: Annotated[str | None, _option(DATA, "Text that a language model continues.")] = None,
    length: Annotated[int | None, _option(DATA, "Number of characters to generate; by default 200.")] = None,
    temperature: Annotated[
        float | None, _option(DATA, "Sampling temperature; below 1: less random. By default 1.")
    ] = None,
    seed: Annotated[int | None, _option(DATA, "Seed of the generated text; by default 0.")] = None,
) -> None:
    """Apply a trained model: print CSV with a row per sequence or forecast step, or generated text.

    Columns and the treatment of missing values are by default those of the training.
    """
    import csv
    import sys

    from unvanish import train as training

    trained = training.Trained.load(model)
    kind = trained.config["kind"]
    if kind == "task":
        name = trained.config["task"]["name"]
        raise UserError(f"MODEL: expected one that was trained on data, got one of the task {name}")
    columns = {"target": target, "id": id, "time": time, "text": text, "missing": missing}
    writing = {"length": length, "temperature": temperature, "seed": seed}
    unused = (columns | {"data": data}) if kind == "language" else writing | {"prompt": prompt}
    for name, value in unused.items():
        if value is not None:
            raise UserError(f"--{name}: not used by a model of kind {kind}; leave it out")
    if kind == "language":
        if prompt is None:
            raise UserError("--prompt: expected the text that the model continues")
        typer.echo(prompt + trained.predict(prompt, **{k: v for k, v in writing.items() if v is not None}))
        return
    if data is None:
        raise UserError("--data: expected a file")
    told = {name: value for name, value in columns.items() if value is not None}
    # New data need not have the answers, in whose column they stood in training.
    if_there = {"target"} - told.keys()
    given = training.read_data(data, kind, if_there, **(trained.config.get("columns", {}) | told))
    answers = trained.predict(given)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if not isinstance(given, training.Sequences):
        writer.writerow(["series", "step", "forecast"])
        writer.writerows((name, k, value) for name, steps in answers.items() for k, value in enumerate(steps, 1))
    else:
        writer.writerow(["sequence", "prediction"])
        writer.writerows(zip(given.names, answers, strict=True))
