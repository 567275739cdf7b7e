"""Malformed input for every parser, led by coverage (atheris, which is no dependency): figures for docs/faults.md.

python benchmarks/fuzz.py [record|checkpoint|model|ts|csv|parquet|settings|command_line] [inputs]

Ends with a traceback where anything but what is documented to be raised comes out, and leaves the input in crash-*.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import atheris
import pandas as pd
import torch
from safetensors.torch import save

import unvanish as uv
from unvanish import train
from unvanish.cli import main
from unvanish.flow.files import SCHEMA, Record, _pack
from unvanish.train.checkpoints import SEAL, SealedCheckpointIO
from unvanish.train.settings import Settings
from unvanish.train.trained import CONFIG

PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
CSV = b"id,time,a,y\n1,2026-01-01,0.5,up\n1,2026-01-02,NA,up\n2,2026-01-01,-1e3,down\n"
TS = b"@univariate false\n@dimensions 2\n@equalLength true\n@seriesLength 2\n@classLabel true a b\n@data\n1,2:3,?:a\n"
WORDS = [
    "compare",
    "report",
    "diagnose",
    "tasks",
    "train",
    "predict",
    "export",
    "--task",
    "--length",
    "--cells",
    "--hidden",
    "--steps",
    "--lr",
    "--out",
    "--data",
    "--target",
    "--kind",
    "--checkpoint",
    "-h",
    "--json",
    "-1",
    "0",
    "nan",
    "1e999",
    "a.py:f",
    "adding",
    "lstm,gru",
    ".",
    "/",
    "--",
    "=",
    "--lr=x",
]


def record(data: bytes) -> None:
    """A flow file of any bytes; or, sound in all else, with any text for its tree, or any tree."""
    path = PLACE / "r.flow"
    if data[:1] in b"{T":
        tree = json.dumps(_tree(atheris.FuzzedDataProvider(data[1:]))) if data[:1] == b"T" else data.decode("latin-1")
        data = save(SOME, {"unvanish.flow": str(SCHEMA), "record": tree})
    path.write_bytes(data)
    uv.flow.load(path)


def _tree(draw: atheris.FuzzedDataProvider, depth: int = 0) -> Any:
    kind = draw.ConsumeIntInRange(0, 9)
    if kind < 5 or depth > 4:
        return [None, draw.ConsumeInt(4), draw.ConsumeFloat(), draw.ConsumeUnicode(4), {"tensor": str(kind)}][kind % 5]
    inner = [_tree(draw, depth + 1) for _ in range(draw.ConsumeIntInRange(0, 4))]
    if kind == 5:
        return {"float": draw.ConsumeUnicode(4)}
    if kind == 6:
        return {["tuple", "list", draw.ConsumeUnicode(2)][draw.ConsumeIntInRange(0, 2)]: inner}
    if kind == 7:
        return {"dict": dict(zip("abcd", inner, strict=False))}
    record, names = RECORDS[draw.ConsumeIntInRange(0, len(RECORDS) - 1)]
    return {"record": record, "fields": dict(zip(names, (inner * 20)[: len(names)], strict=False))}


def checkpoint(data: bytes) -> None:
    """Any bytes under a seal that is right: nobody but a forger makes one."""
    path = PLACE / "c.ckpt"
    path.write_bytes(data + hashlib.sha256(data).digest() + SEAL)
    SealedCheckpointIO().load_checkpoint(path)


def model(data: bytes) -> None:
    """A model's config.json of any bytes; its weights are sound."""
    (PLACE / "model" / CONFIG).write_bytes(data)
    train.Trained.load(PLACE / "model")


def ts(data: bytes) -> None:
    path = PLACE / "d.ts"
    path.write_bytes(data)
    for missing in ("error", "previous"):
        with contextlib.suppress(ValueError):
            train.read_data(path, "classification", missing=missing)


def csv(data: bytes) -> None:
    """As a wide and a long table, as series, and as texts."""
    path = PLACE / "d.csv"
    path.write_bytes(data)
    _each_layout(path)


def parquet(data: bytes) -> None:
    path = PLACE / "d.parquet"
    path.write_bytes(data)
    _each_layout(path)


def _each_layout(path: Path) -> None:
    for kind, options in (
        ("classification", {"target": "y", "missing": "mean"}),
        ("regression", {"target": "y", "id": "id", "time": "time", "missing": "previous"}),
        ("forecasting", {"target": "a", "id": "id"}),
        ("language", {"text": "y"}),
    ):
        with contextlib.suppress(ValueError, OSError):
            train.read_data(path, kind, **options)


def settings(data: bytes) -> None:
    """Every option of a training, of the type that the command line gives it."""
    draw = atheris.FuzzedDataProvider(data)
    chosen = {}
    for field in fields(Settings):
        kind = str(field.type).removeprefix("<class '")
        if draw.ConsumeBool():
            if kind.startswith("bool"):
                chosen[field.name] = draw.ConsumeBool()
            elif kind.startswith("int"):
                chosen[field.name] = draw.ConsumeInt(8)
            elif kind.startswith("float"):
                chosen[field.name] = draw.ConsumeFloat()
            else:
                given = ["adam", "cosine", "last", "lstm", draw.ConsumeUnicode(6)]
                chosen[field.name] = given[draw.ConsumeIntInRange(0, 4)]
    Settings(**chosen).configuration(draw.ConsumeIntInRange(1, 10**6))


def command_line(data: bytes) -> None:
    draw = atheris.FuzzedDataProvider(data)
    words = [WORDS[draw.ConsumeIntInRange(0, len(WORDS) - 1)] for _ in range(draw.ConsumeIntInRange(0, 6))]
    words.insert(draw.ConsumeIntInRange(0, len(words)), draw.ConsumeUnicodeNoSurrogates(8))
    # Nothing is trained: a command line that is right up to here has a hidden size that is none.
    given = words[:1] == ["compare"] or words[:1] == ["train"]
    sys.argv = ["unvanish", *words, *(["--hidden", "0"] if given else [])]
    said = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        main()
    except SystemExit as stop:
        if stop.code not in (None, 0, 2):
            raise RuntimeError(f"{sys.argv}: exit code {stop.code}") from stop
    finally:
        sys.stdout, sys.stderr = said


def seeds(name: str) -> list[bytes]:
    """What is sound, to begin from."""
    if name == "record":
        gates.save(PLACE / "seed")
        return [(PLACE / "seed").read_bytes(), json.dumps(_pack(gates, {})).encode(), b"T" + bytes(range(99))]
    if name == "checkpoint":
        whole, old = io.BytesIO(), io.BytesIO()
        torch.save({"state": torch.ones(2), "step": 3}, whole)
        torch.save({"state": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
        return [whole.getvalue(), old.getvalue()]
    if name == "model":
        return [(PLACE / "model" / CONFIG).read_bytes()]
    if name == "parquet":
        pd.read_csv(io.BytesIO(CSV)).to_parquet(PLACE / "seed")
        return [(PLACE / "seed").read_bytes()]
    return {"ts": [TS], "csv": [CSV]}.get(name, [bytes(range(64))])


def watch_coverage() -> None:
    """Instrument what is loaded of the package, and the libraries' readers written in Python."""
    watched = ("unvanish.", "torch.serialization", "torch._weights")
    for module in [module for name, module in sys.modules.items() if name.startswith(watched)]:
        for thing in list(vars(module).values()):
            for function in [thing, *(vars(thing).values() if isinstance(thing, type) else ())]:
                if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)


PARSERS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f for f in (record, checkpoint, model, ts, csv, parquet, settings, command_line)
}

if __name__ == "__main__":
    name, inputs = (*sys.argv[1:], "100000")[:2]
    warnings.simplefilter("ignore")
    gates = uv.flow.gate_statistics(torch.nn.LSTM(2, 3), torch.randn(3, 2, 2))
    RECORDS = [(name, [f.name for f in fields(kind)]) for name, kind in Record._kinds.items() if is_dataclass(kind)]
    SOME = {str(i): torch.ones(2, 2) for i in range(4)}
    if name == "model":
        train.train_on(
            train.TaskProblem(train.make_task("adding", 8, 0)), Settings(hidden=4, steps=1), out=PLACE / "model"
        )
    (PLACE / "corpus").mkdir()
    for number, seed in enumerate(seeds(name)):
        (PLACE / "corpus" / str(number)).write_bytes(seed)
    os.chdir(PLACE)

    def refused(data: bytes) -> None:
        with contextlib.suppress(ValueError, OSError):
            PARSERS[name](data)

    watch_coverage()
    atheris.Setup([sys.argv[0], f"-runs={inputs}", "-seed=1", "-rss_limit_mb=6000", "-timeout=60", "corpus"], refused)
    atheris.Fuzz()
