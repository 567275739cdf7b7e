"""The user's files: what is read, and what is refused, in which words; nothing is dropped on the way."""

import csv
import decimal
import io
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unvanish.train.data.layouts import sequences, series
from unvanish.train.data.sequences import Sequences
from unvanish.train.data.table import DataError, read_table, read_text
from unvanish.train.data.ucr import read_ts

WIDE = [
    (b"", "row 1: the file is empty"),
    (b"\n1,2\n", "row 1: empty"),
    (b"a,y\n", "row 2: there are no rows"),
    (b"a,,y\n1,2,x\n", "row 1, column 2: the column has no name"),
    (b"a,a,y\n1,2,x\n", "row 1, column 2: 'a' occurs twice"),
    (b"a, a,y\n1,2,x\n", "row 1, column 2: 'a' occurs twice"),
    (b"a,b\n1,2\n", "row 1: no column 'y'"),
    (b"A,Y\n1,2\n", "row 1: no column 'y'"),
    (b"a;y\n1;2\n", "row 1: no column 'y' (--target); there are a;y; separate columns by commas"),
    (b"a\ty\n1\t2\n", "separate columns by commas"),
    (b"a;y\n1,5;x\n", "row 2, column 2: expected 1 columns as in the header, got 2; separate columns by commas"),
    (b"y\nx\n", "row 1: no column is left"),
    (b"a,y\n1\n", "row 2, column 2: expected 2 columns"),
    (b"a,y\n1,x,3\n", "row 2, column 3: expected 2 columns"),
    (b"a,y\n1,x\n2\n", "row 3, column 2"),
    (b'a,y\n1,"x\ny"\n2\n', "row 4, column 2"),
    (b"a,y\r\n1,x\r\n2\r\n", "row 3, column 2"),
    (b"a,y\r1,x\r2\r", "row 3, column 2"),
    (b"\xef\xbb\xbfa,y\n1\n", "row 2, column 2"),
    (b"a,y\n1,x\n\n2,x\n", "row 3, column 1: an empty line"),
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
    ("a,y\n1,x\n".encode("utf-16"), "row 1: a zero byte"),
    ("a,y\n1,é\n".encode("latin-1"), "row 2: not UTF-8 (byte 0xe9)"),
    (b"a,y\n1,\x00\n", "row 2: a zero byte"),
    (b"\x89PNG\r\n\x1a\n", "row 1: not UTF-8"),
    (b"PAR1\x15\x04\x15", "row 2: there are no rows"),
    (b"PK\x03\x04\x00", "row 1: a zero byte"),
    (b"\x1f\x8b\x08\x08", "row 1: not UTF-8"),
    (b'a,y\n"1,x\n', "row 2: not CSV: a quote is never closed"),
    (b'a,y\n1,x\n2,"x\n3,x\n', "row 3: not CSV: a quote is never closed"),
    (b'a,y\n"1"2,x\n', "row 2: not CSV"),
    (b"a,y\n1," + b"x" * 200_000 + b"\n", "row 2: not CSV: field larger"),
    (",".join(map(str, range(1_000_000))).encode() + b",y\n", "row 1: 1000001 columns"),
    (b"a,y\n" + b"1," * 1_000_000 + b"x\n", "row 2, column 3: expected 2 columns as in the header, got 1000001"),
    (b'{"a": 1}\n', "row 2: there are no rows"),
    (b"<html>\n<p>", "row 1: no column 'y'"),
    ("ä,ÿ\n1,2\n".encode(), "row 1: no column 'y'"),
    ("a,y\n١x,2\n".encode(), "row 2, column 'a'"),
    ("a,y\n1\u20282,x\n".encode(), "row 2, column 'a'"),
]

HEAD = b"@problemName p\n@univariate false\n@classLabel true a b\n"
UCR = [
    (b"", "row 1: there is no @data line"),
    (b"a,y\n1,2\n", "row 1: expected a line that starts with @"),
    (HEAD, "row 4: there is no @data line"),
    (HEAD + b"@data\n", "row 5: there is no series"),
    (HEAD + b"@dta\n1,2:a\n", "row 5: expected a line that starts with @"),
    (b"@timeStamps true\n@data\n", "row 1: series with time stamps"),
    (HEAD + b"@data\n(0,1),(1,2):a\n", "row 5, channel 1: series with time stamps"),
    (b"@timeStamps\n@data\n1,2\n", "row 1: expected true or false after @timestamps, got ''"),
    (b"@classLabel yes a b\n@data\n1,2:a\n", "row 1: expected true or false after @classlabel, got 'yes"),
    (b"@dimensions two\n@data\n1:2\n", "row 1: expected a whole number above 0 after @dimensions"),
    (b"@seriesLength 0\n@data\n1\n", "row 1: expected a whole number above 0 after @serieslength"),
    (HEAD + b"@data\n1,2\n", "row 5: the label is missing"),
    (HEAD + b"@data\n1,2:\n", "row 5: the label is missing"),
    (HEAD + b"@data\n1,2:c\n", "row 5, channel 2: 'c' is none of the classes"),
    (HEAD + b"@data\n1,x:a\n", "row 5, channel 1, step 2: expected a number, got 'x'"),
    (HEAD + b"@data\n1,inf:a\n", "row 5, channel 1, step 2: expected a finite number"),
    (HEAD + b"@data\n1,?:a\n", "row 5, channel 1, step 2: the value is missing"),
    (HEAD + b"@data\n1,:a\n", "row 5, channel 1, step 2: the value is missing"),
    (HEAD + b"@data\n1,2:1,2,3:a\n", "row 5, channel 2: expected 2 steps as in channel 1, got 3"),
    (HEAD + b"@data\n1,2:3,4:a\n# so\n1,2:a\n", "row 7: expected 2 channels, got 1"),
    (HEAD + b"@dimensions 3\n@data\n1,2:3,4:a\n", "row 6: expected 3 channels, got 2"),
    (b"@univariate true\n@data\n1,2:3,4\n", "row 3: expected 1 channels, got 2"),
    (HEAD + b"@equalLength true\n@data\n1,2:a\n1:b\n", "row 7: expected 2 steps"),
    (HEAD + b"@equalLength true\n@seriesLength 3\n@data\n1,2:a\n", "row 7: expected 3 steps"),
    (b"@univariate false\n@data\n" + b"1:" * 1_000_000 + b"1\n", "row 3: 1000001 channels"),
    (HEAD + b"@data\n1,2:\xff\n", "row 5: not UTF-8"),
    (HEAD + b"@data\n1\x00,2:a\n", "row 5: a zero byte"),
]

LONG = [
    ("i,a,y\n1,2,x\n1,3,z\n", "row 3, column 'y': sequence '1' has 'x' above and 'z' here"),
    ("i,a,y\n,2,x\n", "row 2, column 'i': the id is missing"),
    ("i,a,y\n1,,x\n", "row 2, column 'a': the value is missing"),
    ("a,y\n1,x\n", "row 1: no column 'i'"),
    ("a,i,y,t\n1,p,x,1\n1,q,x,0\n1,p,x,1\n", "row 4, column 't': expected a later time than in the row of 'p' before"),
    ("i,y\n1,x\n", "row 1: no column is left for values"),
]


def refused(path: Path, content: bytes, read: Any) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as said:
        read(path)
    assert str(path) in str(said.value)
    return str(said.value)


def wide(path: Path) -> Sequences:
    return sequences(read_table(path), target="y")


@pytest.mark.parametrize(("content", "message"), WIDE, ids=range(len(WIDE)))
def test_a_malformed_csv_is_refused_by_row_and_column(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refused(tmp_path / "data.csv", content, wide)


@pytest.mark.parametrize(("content", "message"), LONG, ids=range(len(LONG)))
def test_a_malformed_long_csv_is_refused_by_row_and_column(tmp_path: Path, content: str, message: str) -> None:
    def read(path: Path) -> Sequences:
        return sequences(read_table(path), target="y", id="i", time="t" if ",t\n" in content else None)

    assert message in refused(tmp_path / "data.csv", content.encode(), read)


@pytest.mark.parametrize(("content", "message"), UCR, ids=range(len(UCR)))
def test_a_malformed_ts_is_refused_by_row_and_channel(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refused(tmp_path / "data.ts", content, read_ts)


@given(content=st.binary(max_size=200) | st.text(alphabet='a,y1\n"-.e ', max_size=80).map(str.encode))
def test_any_bytes_are_read_whole_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "data.csv"
    path.write_bytes(b"a,y\n" + content)
    try:
        data = wide(path)
    except DataError as refused:
        said = str(refused)
    else:
        rows = list(csv.reader(io.StringIO((b"a,y\n" + content).decode(), newline="")))
        said = f"{path}: row" if len(data) == sum(map(bool, rows)) - 1 else "rows were dropped"
    assert said.startswith(f"{path}: row")


@given(st.text(alphabet="1?,:a@ \n(-.e", max_size=60), st.sampled_from(["error", "mean", "previous"]))
def test_any_ts_is_read_whole_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str, missing: Any) -> None:
    path = tmp_path_factory.mktemp("any") / "data.ts"
    path.write_bytes(HEAD + b"@data\n" + text.encode())
    try:
        data = read_ts(path, missing=missing)
    except DataError as error:
        told = str(error)
    else:
        told = f"{path}: row"
        lines = [line for line in text.splitlines() if line.strip()]
        assert len(data) == len(lines)
        for x, line in zip(data.x, lines, strict=True):
            assert isinstance(x, np.ndarray)
            assert x.size == line.count(",") + line.count(":")
    assert told.startswith(f"{path}: row")


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@given(st.data())
def test_a_damaged_parquet_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("any") / "data.parquet"
    parquet(path, a=[1.5, None, 3.5] * 20, i=list(range(60)), y=["x", "z", "x"] * 20)
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "junk"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        content = bytearray(b"PAR1" + data.draw(st.binary(max_size=80)) + b"PAR1")
    path.write_bytes(content)
    try:
        found = sequences(read_table(path), target="y", id="i", missing="mean")
    except DataError as error:
        told = str(error)
    else:
        told = f"{path}: row" if kind == "flip" and sum(map(len, found.x)) == 60 else "rows were dropped"
    assert told.startswith(f"{path}: row")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [[1.0]], "y": ["x"]}, "column 'a': expected numbers, text or times, got list"),
        ({"a": [{"b": 1.0}], "y": ["x"]}, "column 'a': expected numbers, text or times, got struct"),
        ({"a": [b"junk"], "y": ["x"]}, "column 'a': expected numbers, text or times, got binary"),
        ({"a": [1.0, float("inf")], "y": ["x", "x"]}, "row 2, column 'a': expected a finite number"),
        ({"a": [1.0, 2.0], "y": ["x", None]}, "row 2, column 'y': the target is missing"),
        ({"a": ["1", "b"], "y": ["x", "x"]}, "row 2, column 'a': expected a number, got 'b'"),
        ({"a": [True], "y": ["x"]}, "row 1, column 'a': expected a number, got 'True'"),
        ({"a": [date(2026, 1, 1)], "y": ["x"]}, "row 1, column 'a': expected a number, got '2026-01-01'"),
        ({"a": pa.array([], pa.float64()), "y": pa.array([], pa.string())}, "row 1: there are no rows"),
        ({"": [1.0], "y": ["x"]}, "row 1, column 1: the column has no name"),
    ],
    ids=["list", "struct", "binary", "inf", "null", "text", "bool", "date", "empty", "nameless"],
)
def test_a_wrong_parquet_is_refused_by_row_and_column(tmp_path: Path, columns: Any, message: str) -> None:
    with pytest.raises(DataError) as said:
        wide(parquet(tmp_path / "data.parquet", **columns))
    assert message in str(said.value)
    assert str(tmp_path / "data.parquet") in str(said.value)


def test_a_parquet_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unvanish.train.data.parquet.MAX_BYTES", 2**20)
    path = parquet(tmp_path / "data.parquet", a=pa.nulls(2**17), y=pa.nulls(2**17))
    assert path.stat().st_size < 2**14
    with pytest.raises(DataError, match="131072 rows of 2 columns unpack to more than"):
        wide(path)


def test_a_text_that_many_rows_share_is_unpacked_once(tmp_path: Path) -> None:
    rows = 20_000
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 100_000]))
    path = parquet(tmp_path / "data.parquet", text=text, y=["a"] * rows)
    assert path.stat().st_size < 200_000
    found = read_table(path).text("text")
    assert len(found) == rows  # of 2 GB, were each a text of its own
    assert len({id(cell) for cell in found}) == 1


def test_parquet_says_the_same_as_csv(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('i,a,b,y\n1,0.5,3,"x, z"\n1,,4,"x, z"\n2,-1e-3,5,ä\n')
    path = parquet(tmp_path / "d.parquet", i=[1, 1, 2], a=[0.5, None, -1e-3], b=[3, 4, 5], y=["x, z", "x, z", "ä"])
    one, other = (sequences(read_table(p), target="y", id="i", missing="previous") for p in (tmp_path / "d.csv", path))
    assert one.y == other.y == ["x, z", "ä"]
    assert one.names == other.names == ["1", "2"]
    assert one.channels == other.channels == ["a", "b"]
    assert [v.tolist() for v in one.x] == [v.tolist() for v in other.x] == [[[0.5, 3], [0.5, 4]], [[-1e-3, 5]]]


def test_parquet_keeps_large_ids_apart_and_reads_every_plain_type(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "d.parquet",
        i=[2**53, 2**53 + 1],
        a=pa.array([1, 2], pa.uint8()),
        b=[decimal.Decimal("0.25"), decimal.Decimal("1.50")],
        c=pa.array(["p", "q"]).dictionary_encode(),
        t=[datetime(2026, 1, 1), datetime(2026, 1, 2)],
        y=[1.0, 2.5],
    )
    table = read_table(path)
    assert table.labels("i", "id") == ["9007199254740992", "9007199254740993"]
    assert table.numbers(["a", "b"]).tolist() == [[1, 0.25], [2, 1.5]]
    assert table.labels("c", "class") == ["p", "q"]
    assert table.labels("y", "target") == ["1", "2.5"]
    pq.write_table(pq.read_table(path).drop(["i", "c"]), path)
    assert series(read_table(path), target="y", time="t").values[""].tolist() == [[1, 1, 0.25], [2.5, 2, 1.5]]


def test_wide_and_long_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text("a,b,c,y\n1,2,3,x\n4,5,,z\n\n\n")
    (tmp_path / "long.csv").write_text("i,v,y\np,1,x\nq,4,z\np,2,x\np,3,x\nq,5,z\n")
    one = wide(tmp_path / "wide.csv")
    other = sequences(read_table(tmp_path / "long.csv"), target="y", id="i")
    assert [v.tolist() for v in one.x] == [v.tolist() for v in other.x] == [[[1], [2], [3]], [[4], [5]]]
    assert one.y == other.y == ["x", "z"]


def test_times_order_the_steps_and_are_no_channel(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("i,day,v,y\np,2026-01-30,1,x\nq,2026-01-01,2,z\np,2026-02-01,3,x\n")
    found = sequences(read_table(path), target="y", id="i", time="day")
    assert found.channels == ["v"]
    assert [v.tolist() for v in found.x] == [[[1], [3]], [[2]]]
    with pytest.raises(DataError, match="--time is for tables of a step per row; name the sequences' column with --id"):
        sequences(read_table(path), target="y", time="day")


def test_a_byte_order_mark_and_line_ends_change_nothing(tmp_path: Path) -> None:
    found = []
    for number, content in enumerate([b"a,y\n1,x\n2,z\n", b"\xef\xbb\xbfa,y\r\n1,x\r\n2,z", b'"a","y"\r1,x\r2,z\r']):
        (tmp_path / f"{number}.csv").write_bytes(content)
        data = wide(tmp_path / f"{number}.csv")
        found.append(([v.tolist() for v in data.x], data.y, data.channels))
    assert found[0] == found[1] == found[2] == ([[[1]], [[2]]], ["x", "z"], ["value"])


@pytest.mark.parametrize("policy", ["mean", "previous"])
def test_missing_values_by_policy(tmp_path: Path, policy: Any) -> None:
    (tmp_path / "d.csv").write_text("a,b,c,d,y\n,2,NA,4,x\n")
    (tmp_path / "d.ts").write_bytes(HEAD + b"@data\n?,2,?,4:a\n")
    for data in (
        sequences(read_table(tmp_path / "d.csv"), target="y", missing=policy),
        read_ts(tmp_path / "d.ts", missing=policy),
    ):
        middle = np.nan if policy == "mean" else 2
        np.testing.assert_array_equal(np.asarray(data.x[0])[:, 0], [np.nan, 2, middle, 4])


def test_ts_of_two_channels_and_unequal_length(tmp_path: Path) -> None:
    (tmp_path / "d.ts").write_bytes(
        b"#c\n@UniVariate FALSE\n@equalLength false\n@classLabel true a b\n@data\n1,2:3,4: a \n\n5:6e1:b\n"
    )
    data = read_ts(tmp_path / "d.ts")
    assert [np.asarray(v).tolist() for v in data.x] == [[[1, 3], [2, 4]], [[5, 60]]]
    assert data.y == ["a", "b"]
    assert data.names == ["row 6", "row 8"]
    (tmp_path / "d.ts").write_bytes(b"@targetLabel true\n@data\n1,2:0.5\n")
    assert read_ts(tmp_path / "d.ts").numbers() == [0.5]


def test_a_text_may_say_null_but_not_nothing(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('text,y\n"null, and\nnot",x\nnan,z\n')
    assert sequences(read_table(path), target="y", text="text").x == ["null, and\nnot", "nan"]
    path.write_text("text,y\nso,x\n ,z\n")
    with pytest.raises(DataError, match="row 3, column 'text': the text is missing"):
        sequences(read_table(path), target="y", text="text")
    with pytest.raises(DataError, match="exclude each other"):
        sequences(read_table(path), target=None, text="text", id="y")
    with pytest.raises(DataError, match="--missing: a missing text can't be replaced; leave it out"):
        sequences(read_table(path), target="y", text="text", missing="mean")


def test_one_class_and_text_targets_are_refused_by_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("a,y\n" + "1,x\n" * 10)
    with pytest.raises(DataError, match="row 2, column 'y': every sequence has the class 'x'"):
        wide(path).classes()
    path.write_text("i,a,y\n1,1,0.5\n1,2,0.5\n2,1,x\n")
    with pytest.raises(DataError, match="row 4, column 'y': expected a number, got 'x'"):
        sequences(read_table(path), target="y", id="i").numbers()
    path.write_text("a,y\n1,b\n1,a\n2,b\n")
    assert wide(path).classes() == {"a": 1, "b": 2}


def test_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(b"\xef\xbb\xbfso\r\nit goes\n")
    assert read_text(path) == "so\r\nit goes\n"
    assert "row 2: not UTF-8" in refused(path, b"so\n\xff", read_text)
