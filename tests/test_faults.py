"""Whatever a file holds and a command line says, it is taken or refused in words; never a traceback.

`UNVANISH_EXAMPLES=5000 pytest tests/test_faults.py` looks longer; docs/faults.md says what was found.
"""

import copy
import io
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from unvanish import report, train
from unvanish.cli import main
from unvanish.cli.diagnose import _load
from unvanish.cli.output import UserError
from unvanish.train import memory
from unvanish.train.data import parquet, table, ucr

REFUSALS = (UserError, ValueError, ArithmeticError, OSError)
"""what `unvanish` ends with one line and exit code 2 for"""

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400) | st.just(-1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)

many = settings(max_examples=int(os.environ.get("UNVANISH_EXAMPLES", "60")))
few = settings(max_examples=int(os.environ.get("UNVANISH_EXAMPLES", "250")) // 25)


@cache
def results() -> dict[str, Any]:
    compared = train.compare(["adding"], ["rnn", "lstm-chrono"], steps=3, hidden=4, batch=4, length=8, seeds=1)
    return compared.to_json()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def spoilt(draw: Callable[[Any], Any]) -> dict[str, Any]:
    """results.json with one or two places changed or taken out."""
    tree = copy.deepcopy(results())
    for _ in range(draw(st.integers(1, 2))):
        found = list(places(tree))
        container, key = found[draw(st.integers(0, len(found) - 1))]
        if draw(st.booleans()):
            container[key] = draw(junk)
        else:
            del container[key]
    return tree


@many
@given(data=st.data())
def test_any_results_make_a_page_or_are_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    with suppress(*REFUSALS):
        found = train.Comparison.from_json(spoilt(data.draw))
        report.print_comparison(found, Console(file=io.StringIO()))
        report.write_comparison(found, tmp_path_factory.getbasetemp() / "report.html")


@few
@given(data=st.data())
def test_any_results_make_figures_or_are_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    with suppress(*REFUSALS):
        found = train.Comparison.from_json(spoilt(data.draw))
        report.save_figures(found, tmp_path_factory.mktemp("figures"))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"schema":' * 50_000, "9" * 5000, "\\ud800", '"\\ud800"'])
def test_deep_and_odd_json_is_refused(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["unvanish", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@cache
def checkpoint(folder: Path, name: str) -> bytes:
    weights = nn.LSTM(2, 3).state_dict()
    if name.endswith(".safetensors"):
        save_file(weights, folder / name)
    else:
        torch.save(weights, folder / name, _use_new_zipfile_serialization=name != "old.pt")
    return (folder / name).read_bytes()


@many
@given(
    name=st.sampled_from(["new.pt", "old.pt", "new.safetensors"]),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 10_000),
    tail=st.binary(max_size=20),
)
def test_any_checkpoint_is_loaded_or_refused(
    name: str, changes: list[tuple[int, int]], cut: int, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = bytearray(checkpoint(folder, name))
    for place, byte in changes:
        whole[place % len(whole)] = byte
    path = folder / f"spoilt.{name}"
    path.write_bytes(bytes(whole[: cut if cut < len(whole) else None]) + tail)
    with suppress(*REFUSALS):
        _load(nn.LSTM(2, 3), path)


WORDS = st.sampled_from(
    """
    compare report diagnose tasks train predict --task --length --cells --hidden --steps --batch --lr --seed --out
    --json -q --quiet --help -h --data --target --id --kind --missing --checkpoint --lag --samples adding digits rnn
    lstm,gru -1 0 nan inf 1e999 mine.py:f a.py: : / . -- = --= --lr=x \0 é
    """.split()  # noqa: SIM905
) | st.text(max_size=6)


@many
@given(words=st.lists(WORDS, max_size=8))
def test_any_command_line_is_done_or_refused(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    given_out = words[:1] == ["compare"]
    argv, cwd, errors, output = sys.argv, os.getcwd(), sys.stderr, sys.stdout
    os.chdir(tmp_path_factory.mktemp("cwd"))
    # No training: a command line that is right up to here has no steps to do.
    sys.argv = ["unvanish", *words, *(["--steps", "0"] if given_out else [])]
    try:
        sys.stderr, sys.stdout = io.StringIO(), io.StringIO()
        with suppress(SystemExit):
            main()
    finally:
        sys.stderr, sys.stdout, sys.argv = errors, output, argv
        os.chdir(cwd)


@pytest.mark.parametrize("kind", ["csv", "ts", "parquet"])
def test_what_a_file_takes_is_estimated_and_refused_before_it_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[f"{(i * 37 + j) % 9973 / 7:.6f}" for j in range(20)] + ["ab"[i % 2]] for i in range(1500)]
    path = tmp_path / f"d.{kind}"
    columns = [f"c{j}" for j in range(20)]
    if kind == "ts":
        path.write_text("@classlabel true a b\n@data\n" + "\n".join(f"{','.join(r[:-1])}:{r[-1]}" for r in rows))
    elif kind == "csv":
        path.write_text("\n".join([",".join([*columns, "y"]), *(",".join(row) for row in rows)]))
    else:
        numbers = {name: [float(row[j]) for row in rows] for j, name in enumerate(columns)}
        pd.DataFrame(numbers | {"y": [row[-1] for row in rows]}).to_parquet(path)
    options = {} if kind == "ts" else {"target": "y"}
    asked: list[int] = []
    monkeypatch.setattr(memory, "available", lambda: asked.append(1) or 2**40)
    needed: list[int] = []
    for module in (table, ucr, parquet):
        monkeypatch.setattr(module, "require", lambda n, *told: (needed.append(n), memory.require(n, *told)))
    train.read_data(path, "classification", **options)  # what is imported late is no part of it
    tracemalloc.start()
    train.read_data(path, "classification", **options)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert asked
    assert most / 2 <= max(needed) <= 3 * most
    monkeypatch.setattr(memory, "available", lambda: max(needed) - 1)
    with pytest.raises(ValueError, match=rf"d\.{kind}: needs about .* GiB, .* are available; free some, or split"):
        train.read_data(path, "classification", **options)


def test_a_training_that_has_no_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    for problem in (
        train.TaskProblem(train.make_task("adding", 200_000, 0)),
        train.LanguageModel("to be or not to be " * 300),
    ):
        big = train.Settings(hidden=100_000, layers=2, steps=1, batch=8)
        with pytest.raises(ValueError, match=r"hidden 100000, layers 2, batch 8, length \d+: needs about .* lower one"):
            train.train_on(problem, big, out=tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("layers", "both", "every"), [(1, False, None), (3, True, None), (2, False, 16)])
def test_what_a_training_step_takes_is_estimated(layers: int, both: bool, every: int | None) -> None:
    T, B, I, H, O, D = 256, 8, 6, 32, 4, 1 + both
    shape = train.models.Shape("lstm", I, O, H, layers, both, checkpoint_every=every, read="all", symbols=11)
    model = shape.build(T)
    weights = sum(p.numel() for p in model.parameters())

    def estimate(length: int) -> int:
        return memory.estimated(
            I, H, O, length, B, layers=layers, directions=D, checkpoint_every=every, symbols=11, answered=length
        )  # fmt: skip

    assert estimate(0) == 16 * weights
    saved: dict[int, int] = {}
    pack = lambda t: saved.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.zeros(B, T, dtype=torch.long)).square().mean()
    kept = sum(saved.values()) - 4 * weights
    assert kept / 2 <= estimate(T) - 16 * weights <= 4 * kept
