"""The user's CSV files: what is read, what is refused and in which words, and a model trained on them."""

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unvanish.cli import main
from unvanish.train.data import DataError, read_csv, split
from unvanish.train.data.sequences import Scale
from unvanish.train.supervised import Settings, Trained, train_on

MALFORMED = [
    (b"", "row 1: the file is empty"),
    (b"\n1,2\n", "row 1: empty"),
    (b"a,y\n", "row 2: there are no rows"),
    (b"a,,y\n1,2,x\n", "row 1, column 2: the column has no name"),
    (b"a,a,y\n1,2,x\n", "row 1, column 2: 'a' is there twice"),
    (b"a, a,y\n1,2,x\n", "row 1, column 2: 'a' is there twice"),
    (b"a,b\n1,2\n", "row 1: no column 'y'"),
    (b"A,Y\n1,2\n", "row 1: no column 'y'"),
    (b"a;y\n1;2\n", "row 1: no column 'y'"),
    (b"a\ty\n1\t2\n", "row 1: no column 'y'"),
    (b"y\nx\n", "row 1: no column is left"),
    (b"a,y\n1\n", "row 2, column 2: expected 2 columns"),
    (b"a,y\n1,x,3\n", "row 2, column 3: expected 2 columns"),
    (b"a,y\n1,x\n2\n", "row 3, column 2"),
    (b"a,y\n1,x\n\n2,x\n", "row 3, column 1"),
    (b"a,y\none,x\n", "row 2, column 'a': expected a number, got 'one'"),
    (b'a,y\n1,x\n"1,5",x\n', "row 3, column 'a': expected a number"),
    (b"a,y\n0x10,x\n", "row 2, column 'a'"),
    (b"a,y\n1_000,x\n", "row 2, column 'a'"),
    (b"a,y\n1 000,x\n", "row 2, column 'a'"),
    (b"a,y\n1e400,x\n", "row 2, column 'a': expected a finite"),
    (b"a,y\n" + b"9" * 5000 + b",x\n", "row 2, column 'a': expected a finite"),
    (b"a,y\ninf,x\n", "row 2, column 'a': expected a finite"),
    (b"a,y\n-Infinity,x\n", "row 2, column 'a': expected a finite"),
    (b"a,y\n#REF!,x\n", "row 2, column 'a'"),
    (b"a,y\n2020-01-01,x\n", "row 2, column 'a'"),
    (b"a,y\ntrue,x\n", "row 2, column 'a'"),
    (b"a,y\n1+2j,x\n", "row 2, column 'a'"),
    (b"a,y\n\xe2\x88\x921,x\n", "row 2, column 'a'"),
    (b"a,y\n1%,x\n", "row 2, column 'a'"),
    (b"a,y\n1,\n", "row 2, column 'y': the target is missing"),
    (b"a,y\n1,NA\n", "row 2, column 'y': the target is missing"),
    (b"a,b,y\n,,x\n", "row 2, column 'a': the sequence has no values"),
    (b"a,b,y\n,2,x\n", "row 2, column 'a': the value is missing"),
    (b"a,b,c,y\n1,nan,2,x\n", "row 2, column 'b': the value is missing"),
    (b"a,y\n1,\xff\n", "row 2: not UTF-8"),
    (b"\xff\xfea\x00,\x00y\x00", "row 1: a zero byte"),
    (b"a,y\n1,\x00\n", "row 2: a zero byte"),
    (b"\x89PNG\r\n\x1a\n", "row 1: not UTF-8"),
    (b"PAR1\x15\x04\x15", "row 2: there are no rows"),
    (b"PK\x03\x04\x00", "row 1: a zero byte"),
    (b'a,y\n"1,x\n', "not CSV: unexpected end of data"),
    (b'a,y\n"1"2,x\n', "row 2: not CSV"),
    (b"a,y\n1," + b"x" * 200_000 + b"\n", "row 2: not CSV: field larger"),
    (",".join(map(str, range(1_000_000))).encode() + b",y\n", "row 1: 1000001 columns"),
    (b'{"a": 1}\n', "row 2: there are no rows"),
    (b"<html>\n<p>", "row 1: no column 'y'"),
    ("ä,ÿ\n1,2\n".encode(), "row 1: no column 'y'"),
    ("a,y\n١x,2\n".encode(), "row 2, column 'a'"),
    ("a,y\n1\u20282,x\n".encode(), "row 2, column 'a'"),
]


@pytest.mark.parametrize(("content", "message"), MALFORMED)
def test_a_malformed_file_is_refused_by_file_row_and_column(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_csv(path, target="y")
    assert str(path) in str(refused.value)
    assert message in str(refused.value)


def test_a_long_file_is_refused_by_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    for content, message in (
        ("i,a,y\n1,2,x\n1,3,z\n", "row 3, column 'y': sequence '1' has 'x' above and 'z' here"),
        ("i,a,y\n,2,x\n", "row 2, column 'i': the id is missing"),
        ("i,a,y\n1,,x\n", "row 2, column 'a': the value is missing"),
        ("a,y\n1,x\n", "row 1: no column 'i'"),
    ):
        path.write_text(content)
        with pytest.raises(DataError) as refused:
            read_csv(path, target="y", id="i")
        assert message in str(refused.value)


@given(content=st.binary(max_size=200) | st.text(alphabet='a,y1\n"-.e ', max_size=80).map(str.encode))
def test_any_bytes_are_read_whole_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "data.csv"
    path.write_bytes(b"a,y\n" + content)
    try:
        data = read_csv(path, target="y")
    except DataError as refused:
        said = str(refused)
    else:
        rows = list(csv.reader(io.StringIO((b"a,y\n" + content).decode(), newline="")))
        said = f"{path}: row" if len(data) == len(rows) - 1 else "rows were dropped"
    assert said.startswith(f"{path}: row")


def test_wide_and_long_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text("a,b,c,y\n1,2,3,x\n4,5,,z\n")
    (tmp_path / "long.csv").write_text("i,v,y\np,1,x\nq,4,z\np,2,x\np,3,x\nq,5,z\n")
    wide = read_csv(tmp_path / "wide.csv", target="y")
    long = read_csv(tmp_path / "long.csv", target="y", id="i")
    assert [v.tolist() for v in wide.x] == [v.tolist() for v in long.x] == [[[1], [2], [3]], [[4], [5]]]
    assert wide.y == long.y == ["x", "z"]


@given(st.lists(st.sampled_from("abc"), min_size=9, max_size=60), st.integers(0, 5))
def test_a_split_holds_each_sequence_once(y: list[str], seed: int) -> None:
    parts = split(y, len(y), seed)
    assert sorted(i for part in parts.values() for i in part) == list(range(len(y)))
    for label in set(y):
        if y.count(label) >= 3:
            assert all(any(y[i] == label for i in part) for part in parts.values())


def test_missing_is_the_mean_and_the_scale_is_of_the_known() -> None:
    scale = Scale.of([np.array([[1.0], [np.nan], [3.0]])])
    assert scale(np.array([[2.0], [np.nan], [3.0]])).tolist() == [[0.0], [0.0], [1.0]]


def write(path: Path, *, number: bool = False) -> None:
    """Sines of three frequencies and unequal length; the answer is which."""
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*(f"t{t}" for t in range(20)), "y"])
        for k in range(120):
            n = int(rng.integers(12, 21))
            v = np.sin(np.arange(n) * (0.3 + 0.4 * (k % 3)) + rng.normal()) + 0.1 * rng.normal(size=n)
            out.writerow([*(f"{a:.4f}" for a in v), *[""] * (20 - n), k % 3 if number else "abc"[k % 3]])


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_it_learns_beats_the_baseline_and_repeats(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "d.csv", number=kind == "regression")
    data = read_csv(tmp_path / "d.csv", target="y")
    settings = Settings(hidden=16, epochs=15)
    first, again = (train_on(data, settings, kind) for _ in range(2))  # type: ignore[arg-type]
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    if kind == "classification":
        assert first.config["test"]["accuracy"] > first.config["baseline"]["accuracy"] + 0.3
    else:
        assert first.config["test"]["mse"] < 0.5 * first.config["baseline"]["mse"]
    first.save(tmp_path / "m")
    assert Trained.load(tmp_path / "m").predict(data) == first.predict(data)


def test_the_test_split_leaves_no_trace_in_the_model(tmp_path: Path) -> None:
    write(tmp_path / "d.csv", number=True)
    data = read_csv(tmp_path / "d.csv", target="y")
    held = split(None, len(data), 0)["test"]
    assert data.y is not None
    x = [v * 1000 if i in held else v for i, v in enumerate(data.x)]
    y = ["999" if i in held else label for i, label in enumerate(data.y)]
    settings = Settings(hidden=4, epochs=2)
    plain, other = (train_on(d, settings, "regression") for d in (data, replace(data, x=x, y=y)))
    assert plain.config["scale"] == other.config["scale"]
    assert plain.config["target_scale"] == other.config["target_scale"]
    for a, b in zip(plain.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert plain.config["test"] != other.config["test"]


def test_one_class_and_text_targets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("a,y\n" + "1,x\n" * 10)
    data = read_csv(path, target="y")
    with pytest.raises(DataError, match="one class only, 'x'"):
        train_on(data, Settings(), "classification")
    with pytest.raises(DataError, match="row 2: the target of a regression must be a finite number, got 'x'"):
        train_on(data, Settings(), "regression")


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["unvanish", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("d.csv"))
    train = ["train", "--data", "d.csv", "--target", "y", "--epochs", "1", "--hidden", "4"]
    assert call([*train, "--out", "m"], monkeypatch) == 0
    assert "class a: 40 of 120" in capsys.readouterr().out
    assert {path.name for path in Path("m").iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads(Path("m/config.json").read_text())["kind"] == "classification"
    assert call(["predict", "m", "--data", "d.csv", "--target", "y"], monkeypatch) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 121
    assert {row[1] for row in rows[1:]} <= set("abc")
    for wrong, message in (
        ([*train, "--out", "m"], "--out: m exists"),
        ([*train, "--out", "d.csv/n"], "--out: d.csv/n can't be written"),
        ([*train, "--out", "n", "--kind", "guess"], "--kind: expected"),
        ([*train, "--out", "n", "--missing", "drop"], "--missing: expected"),
        ([*train, "--out", "n", "--cell", "nope"], "cells: expected names"),
        (["predict", ".", "--data", "d.csv", "--target", "y"], "not a folder that `unvanish train` wrote"),
        (["predict", "m", "--data", "none.csv"], "No such file"),
    ):
        assert call(wrong, monkeypatch) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("n").exists()
