"""CSV in: wide, one sequence per row and one step per column; or long, one step per row, sequences told apart by an id.

A missing value is an empty cell or NA, NaN, null. In a wide file the missing cells at the end of a row make its
sequence shorter; any other missing value is an error unless `missing="mean"`.
"""

import csv
import io
import math
from pathlib import Path
from typing import Literal

import numpy as np

from unvanish.train.data.sequences import Sequences

MISSING = {"", "na", "nan", "null"}
MAX_COLUMNS = 100_000

Missing = Literal["error", "mean"]


class DataError(ValueError):
    """What is wrong with a data file, and where."""


def read_csv(path: Path, *, target: str | None = None, id: str | None = None, missing: Missing = "error") -> Sequences:
    """Read sequences; rows are counted as lines of the file, the header being row 1.

    Args:
        path: UTF-8, comma-separated, with a header.
        target: the column of the answers; None: there is none, as when predicting.
        id: the column that tells sequences apart, in a long file; None: a wide file.
        missing: "error", or "mean": the channel's mean over the training sequences takes the place.

    Raises:
        DataError: anything that is not such a file, with file, row and column.
        OSError: the file can't be read.
    """
    if missing not in ("error", "mean"):
        raise ValueError(f"missing: expected error or mean, got {missing!r}")
    header, rows = _rows(path)
    for option, column in (("target", target), ("id", id)):
        if column is not None and column not in header:
            shown = ", ".join(header[:10]) + (", …" if len(header) > 10 else "")
            raise DataError(f"{path}: row 1: no column {column!r} (--{option}); there are {shown}")
    if target is not None and target == id:
        raise DataError(f"{path}: row 1: column {target!r} can't be both target and id")
    channels = [(place, name) for place, name in enumerate(header) if name not in (target, id)]
    if not channels:
        raise DataError(f"{path}: row 1: no column is left for values besides target and id")
    answer = None if target is None else header.index(target)
    if answer is not None:
        for line, row in rows:
            if row[answer].strip().lower() in MISSING:
                raise DataError(f"{path}: row {line}, column {target!r}: the target is missing")
    if id is None:
        x = [_wide(path, line, row, channels, missing) for line, row in rows]
        y = None if answer is None else [row[answer].strip() for _, row in rows]
        return Sequences(x, y, [f"row {line}" for line, _ in rows], ["value"])
    return _long(path, rows, channels, header.index(id), id, answer, target, missing)


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows with their line; all rows as long as the header."""
    data = path.read_bytes()
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{path}: row {line}: a zero byte; expected a text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: row {line}: not UTF-8 (byte {data[error.start]:#04x}); save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            if not header:
                header = [name.strip() for name in row]
                _check_header(path, header)
            elif len(row) != len(header):
                raise DataError(
                    f"{path}: row {reader.line_num}, column {min(len(row), len(header)) + 1}: expected "
                    f"{len(header)} columns as in the header, got {len(row)}"
                )
            else:
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise DataError(f"{path}: row {reader.line_num}: not CSV: {error}") from error
    if not header:
        raise DataError(f"{path}: row 1: the file is empty; expected a header and rows")
    if not rows:
        raise DataError(f"{path}: row 2: there are no rows below the header")
    return header, rows


def _check_header(path: Path, header: list[str]) -> None:
    if not header:
        raise DataError(f"{path}: row 1: empty; expected the names of the columns")
    if len(header) > MAX_COLUMNS:
        raise DataError(
            f"{path}: row 1: {len(header)} columns; expected at most {MAX_COLUMNS}. Longer sequences go in a long file"
        )
    seen: set[str] = set()
    for place, name in enumerate(header, 1):
        if not name:
            raise DataError(f"{path}: row 1, column {place}: the column has no name")
        if name in seen:
            raise DataError(f"{path}: row 1, column {place}: {name!r} is there twice")
        seen.add(name)


def _number(path: Path, line: int, column: str, cell: str) -> float:
    """A finite number, or NaN for a missing one."""
    if cell.strip().lower() in MISSING:
        return math.nan
    try:
        value = float(cell)
    except ValueError as error:
        raise DataError(f"{path}: row {line}, column {column!r}: expected a number, got {cell[:40]!r}") from error
    if not math.isfinite(value) or "_" in cell:
        raise DataError(f"{path}: row {line}, column {column!r}: expected a finite number, got {cell[:40]!r}")
    return value


def _refuse_missing(path: Path, line: int, column: str) -> DataError:
    return DataError(f"{path}: row {line}, column {column!r}: the value is missing; mend it, or choose --missing mean")


def _wide(path: Path, line: int, row: list[str], channels: list[tuple[int, str]], missing: Missing) -> np.ndarray:
    values = [_number(path, line, name, row[place]) for place, name in channels]
    while values and math.isnan(values[-1]):
        values.pop()
    if not values:
        raise DataError(f"{path}: row {line}, column {channels[0][1]!r}: the sequence has no values")
    for value, (_, name) in zip(values, channels, strict=False):
        if missing == "error" and math.isnan(value):
            raise _refuse_missing(path, line, name)
    return np.array(values)[:, None]


def _long(
    path: Path,
    rows: list[tuple[int, list[str]]],
    channels: list[tuple[int, str]],
    place_of_id: int,
    id: str,
    answer: int | None,
    target: str | None,
    missing: Missing,
) -> Sequences:
    steps: dict[str, list[list[float]]] = {}
    answers: dict[str, str] = {}
    for line, row in rows:
        name = row[place_of_id].strip()
        if not name:
            raise DataError(f"{path}: row {line}, column {id!r}: the id is missing")
        values = [_number(path, line, column, row[place]) for place, column in channels]
        for value, (_, column) in zip(values, channels, strict=True):
            if missing == "error" and math.isnan(value):
                raise _refuse_missing(path, line, column)
        steps.setdefault(name, []).append(values)
        if answer is not None and answers.setdefault(name, row[answer].strip()) != row[answer].strip():
            raise DataError(
                f"{path}: row {line}, column {target!r}: sequence {name!r} has {answers[name]!r} above and "
                f"{row[answer].strip()!r} here; expected one target per sequence"
            )
    y = None if answer is None else [answers[name] for name in steps]
    return Sequences([np.array(v) for v in steps.values()], y, list(steps), [name for _, name in channels])
