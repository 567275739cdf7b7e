"""`unvanish bench`: our layers beside torch's on this machine."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def bench(
    seconds: Annotated[float, typer.Option(help="Seconds for the whole benchmark.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print every row as JSON instead of tables.")] = False,
) -> None:
    """Time unvanish's layers against torch's on this machine, and report what `accelerate` gains."""
    from unvanish import engine
    from unvanish.nn.speed import compare_speed, geometric_mean, rows

    console, chosen = Console(emoji=False, highlight=False), rows()
    progress = Console(stderr=True, quiet=not console.is_terminal or as_json)
    with Progress(console=progress, transient=True) as bar:
        task = bar.add_task("torch's layers and ours, alternately", total=len(chosen))
        found = compare_speed(chosen, seconds, lambda *_: bar.advance(task))
    if as_json:
        typer.echo(json.dumps([{**vars(t.row), "torch_seconds": t.torchs, "ratio": t.ratio} for t in found]))
        return
    uses = {
        (train, low, stepped): f"{'training' if train else 'inference'}, {'bfloat16' if low else 'float32'}"
        + (", step by step" if stepped else "")
        for stepped in (False, True) for low in (False, True) for train in (True, False)
    }  # fmt: skip
    kinds = list(dict.fromkeys(t.row.kind for t in found))
    table = Table("torch's time / ours, geometric means", *kinds)
    for (train, low, stepped), name in uses.items():
        here = [t for t in found if (t.row.train, t.row.low, t.row.stepped) == (train, low, stepped)]
        means = [geometric_mean(t for t in here if t.row.kind == kind) for kind in kinds]
        table.add_row(name, *("only ours runs" if mean is None else f"{mean:.2f}" for mean in means))
    console.print(table)
    timed = [(t.ratio, t.torchs, t) for t in found if t.ratio is not None and t.torchs is not None]
    if len(timed) < len(found):
        console.print(
            f"Not timed: {len(found) - len(timed)} rows in which torch's layer raises an error here, ours does not.",
            soft_wrap=True,
        )
    lowest = Table("lowest rows: layer, T, B, I, H", "torch ms", "torch / ours")
    for ratio, torchs, t in sorted(timed, key=lambda found: found[0])[:10]:
        lowest.add_row(str(t.row), f"{1e3 * torchs:.3g}", f"{ratio:.2f}")
    console.print(lowest)

    def gains(low: bool) -> str:
        training = [t for *_, t in timed if t.row.train and t.row.low == low]
        means = {kind: geometric_mean(t for t in training if t.row.kind == kind) for kind in kinds}
        return ", ".join(f"{kind} {mean:.1f}" for kind, mean in means.items() if mean is not None)

    console.print(
        f"On this machine ({engine.isa()}, {_threads()}) accelerate makes float32 training this many times as fast: "
        f"{gains(False)}; in bfloat16: {gains(True)}.",
        soft_wrap=True,
    )


def _threads() -> str:
    import torch

    n = torch.get_num_threads()
    return f"{n} thread{'s' if n > 1 else ''}"
