"""A table from a file: CSV or Parquet; every error names file, row and column.

Rows are counted as lines of the file, the header being row 1; in Parquet, which has no lines, the first row is 1. A
missing value is an empty cell, NA, NaN or null.
"""

import csv
import io
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unvanish.train.memory import of_csv, require

MISSING = {"", "na", "nan", "null"}
MAX_COLUMNS = 100_000
MAX_BYTES = 4 * 2**30
"""the limit for a file, and for the unpacked size of a compressed file"""
SMALLER = "free some, or split the file"
EXACT = 2**53
"""whole numbers up to here are exact in float64"""


class DataError(ValueError):
    """An error in a data file, with its place."""


@dataclass(frozen=True)
class Table:
    """Columns of equal length."""

    path: Path
    columns: dict[str, list[str] | np.ndarray]
    """name → cells as written in the file, or float64 where the file itself says that they are numbers"""
    rows: list[int]
    """the number of each row in the file"""

    def where(self, row: int, column: str) -> str:
        """Place of a cell, as messages name it."""
        return f"{self.path}: row {self.rows[row]}, column {column!r}"

    def require(self, **options: str | None) -> None:
        """Check the columns that options name.

        Raises:
            DataError: there is no such column, or two options name the same.
        """
        named = {option: column for option, column in options.items() if column is not None}
        for option, column in named.items():
            if column not in self.columns:
                shown = ", ".join(list(self.columns)[:10]) + (", …" if len(self.columns) > 10 else "")
                hint = _hint(list(self.columns))
                raise DataError(f"{self.path}: row 1: no column {column!r} (--{option}); there are {shown}{hint}")
        if len(set(named.values())) < len(named):
            raise DataError(
                f"{self.path}: row 1: {', '.join(f'--{o} {c!r}' for o, c in named.items())} must be different columns"
            )

    def text(self, column: str) -> list[str]:
        """The cells of a column as written, none empty.

        Raises:
            DataError: one is.
        """
        found = self._written(column)
        for row, cell in enumerate(found):
            if not cell:
                raise DataError(f"{self.where(row, column)}: the text is missing")
        return found

    def labels(self, column: str, what: str) -> list[str]:
        """The cells of a column, none missing; numbers as Python writes them, whole ones without a point.

        Raises:
            DataError: one is missing; `what` it should have been.
        """
        found = self._written(column)
        for row, cell in enumerate(found):
            if cell.lower() in MISSING:
                raise DataError(f"{self.where(row, column)}: the {what} is missing")
        return found

    def _written(self, column: str) -> list[str]:
        cells = self.columns[column]
        if isinstance(cells, list):
            return [cell.strip() for cell in cells]
        return [
            "" if math.isnan(v) else str(int(v)) if math.isfinite(v) and v == int(v) else repr(v)
            for v in cells.tolist()
        ]

    def numbers(self, columns: list[str]) -> np.ndarray:
        """`[rows, columns]` float64, NaN where a value is missing.

        Raises:
            DataError: a cell is not a finite number.
        """
        return np.stack([self._numbers(column) for column in columns], axis=1)

    def _numbers(self, column: str) -> np.ndarray:
        cells = self.columns[column]
        if isinstance(cells, list):
            return numbers(cells, lambda row: self.where(row, column))
        for row in np.flatnonzero(np.isinf(cells))[:1]:
            raise DataError(f"{self.where(row, column)}: expected a finite number, got {cells[row]}")
        return cells


def numbers(cells: list[str], where: Callable[[int], str], missing: Collection[str] = MISSING) -> np.ndarray:
    """`[cells]` float64, NaN where a cell is one of `missing`; as Python reads numbers, but without underscores.

    Raises:
        DataError: `where` a cell is not a finite number.
    """
    try:
        values = np.array(list(map(float, cells)))
    except ValueError:
        values = None
    if values is not None and np.isfinite(values).all() and "_" not in "".join(cells):
        return values
    found = np.empty(len(cells))
    for place, cell in enumerate(cells):
        plain = cell.strip()
        try:
            found[place] = math.nan if plain.lower() in missing else float(plain)
        except ValueError:
            raise DataError(f"{where(place)}: expected a number, got {cell[:40]!r}") from None
        if "_" in plain or math.isinf(found[place]) or (math.isnan(found[place]) and plain.lower() not in missing):
            raise DataError(f"{where(place)}: expected a finite number, got {cell[:40]!r}")
    return found


def read_table(path: Path) -> Table:
    """A CSV file (UTF-8, comma-separated, with a header), or by its suffix .parquet a Parquet file.

    Raises:
        DataError: anything that is not such a file, with file, row and column.
        OSError: the file can't be read.
    """
    if path.suffix.lower() == ".parquet":
        from unvanish.train.data.parquet import read_parquet

        return read_parquet(path)
    return _read_csv(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        DataError: it isn't one, with the row.
        OSError: the file can't be read.
    """
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: {path.stat().st_size / 2**30:.1f} GiB; expected at most {MAX_BYTES / 2**30:.0f} GiB")
    require(2 * path.stat().st_size, str(path), SMALLER)
    data = path.read_bytes()
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{path}: row {line}: a zero byte; expected text in UTF-8, not UTF-16 or a binary file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: row {line}: not UTF-8 (byte {data[error.start]:#04x}); save it as UTF-8") from error


def _read_csv(path: Path) -> Table:
    text = read_text(path)
    if not text:
        raise DataError(f"{path}: row 1: the file is empty; expected a header and rows")
    require(of_csv(text), str(path), SMALLER)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    cells: list[list[str]] = []
    rows: list[int] = []
    blank = None
    line = 1
    try:
        for row in reader:
            if not header:
                header = [name.strip() for name in row]
                check_header(path, header)
            elif not row:
                blank = blank or line
            elif blank is not None:  # at the end of a file empty lines are no rows
                raise DataError(f"{path}: row {blank}, column 1: an empty line, with rows below it")
            elif len(row) != len(header):
                raise DataError(
                    f"{path}: row {line}, column {min(len(row), len(header)) + 1}: expected {len(header)} columns as "
                    f"in the header, got {len(row)}{_hint(header)}"
                )
            else:
                cells.append(row)
                rows.append(line)
            line = reader.line_num + 1  # a quoted cell may hold line ends: a row is named by its first line
    except csv.Error as error:
        told = "a quote is never closed" if str(error) == "unexpected end of data" else error
        raise DataError(f"{path}: row {line}: not CSV: {told}") from error
    if not rows:
        raise DataError(f"{path}: row 2: there are no rows below the header")
    columns: dict[str, list[str] | np.ndarray] = {
        name: list(column) for name, column in zip(header, zip(*cells, strict=True), strict=True)
    }
    return Table(path, columns, rows)


def _hint(header: list[str]) -> str:
    """Advice for a file whose columns were all read as one."""
    return "; separate columns by commas" if len(header) == 1 and any(mark in header[0] for mark in ";\t|") else ""


def check_header(path: Path, header: list[str]) -> None:
    """Check that every column has a unique name, and that there are not too many.

    Raises:
        DataError: otherwise, with the column.
    """
    if not header:
        raise DataError(f"{path}: row 1: empty; expected the names of the columns")
    if len(header) > MAX_COLUMNS:
        raise DataError(
            f"{path}: row 1: {len(header)} columns; expected at most {MAX_COLUMNS}. Longer sequences go in a long file"
        )
    seen: set[str] = set()
    for place, name in enumerate(header, 1):
        if not name:
            raise DataError(
                f"{path}: row 1, column {place}: the column has no name; give it one, or leave the column out"
            )
        if name in seen:
            raise DataError(f"{path}: row 1, column {place}: {name!r} occurs twice")
        seen.add(name)
