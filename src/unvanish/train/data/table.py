"""A table out of a file: CSV or Parquet; every refusal names file, row and column.

Rows are counted as lines of the file, the header being row 1; in Parquet, which has no lines, the first row is 1. A
missing value is an empty cell, NA, NaN or null.
"""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MISSING = {"", "na", "nan", "null"}
MAX_COLUMNS = 100_000
MAX_BYTES = 4 * 2**30
"""of a file, and of what a compressed file unpacks to"""


class DataError(ValueError):
    """What is wrong with a data file, and where."""


@dataclass(frozen=True)
class Table:
    """Columns of equal length."""

    path: Path
    columns: dict[str, list[str] | np.ndarray]
    """name → cells as written in the file, or float64 where the file itself says that they are numbers"""
    rows: list[int]
    """where each row stands in the file"""

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
                raise DataError(f"{self.path}: row 1: no column {column!r} (--{option}); there are {shown}")
        if len(set(named.values())) < len(named):
            raise DataError(
                f"{self.path}: row 1: {', '.join(f'--{o} {c!r}' for o, c in named.items())} must be different columns"
            )

    def text(self, column: str, what: str) -> list[str]:
        """The cells of a column, none missing; numbers as Python writes them, whole ones without a point.

        Raises:
            DataError: one is missing; `what` it should have been.
        """
        cells = self.columns[column]
        if isinstance(cells, np.ndarray):
            found = ["" if math.isnan(v) else str(int(v)) if v == int(v) else repr(float(v)) for v in cells]
        else:
            found = [cell.strip() for cell in cells]
        for row, cell in enumerate(found):
            if cell.lower() in MISSING:
                raise DataError(f"{self.where(row, column)}: the {what} is missing")
        return found

    def numbers(self, columns: list[str]) -> np.ndarray:
        """`[rows, columns]` float64, NaN where a value is missing.

        Raises:
            DataError: a cell is no finite number.
        """
        return np.stack([self._numbers(column) for column in columns], axis=1)

    def _numbers(self, column: str) -> np.ndarray:
        cells = self.columns[column]
        if isinstance(cells, np.ndarray):
            for row in np.flatnonzero(np.isinf(cells))[:1]:
                raise DataError(f"{self.where(row, column)}: expected a finite number, got {cells[row]}")
            return cells
        return np.array([self._number(row, column, cell) for row, cell in enumerate(cells)])

    def _number(self, row: int, column: str, cell: str) -> float:
        try:
            value = float(cell)
        except ValueError as error:
            if cell.strip().lower() in MISSING:
                return math.nan
            raise DataError(f"{self.where(row, column)}: expected a number, got {cell[:40]!r}") from error
        if not (math.isfinite(value) or cell.strip().lower() == "nan") or "_" in cell:
            raise DataError(f"{self.where(row, column)}: expected a finite number, got {cell[:40]!r}")
        return value


def read_table(path: Path) -> Table:
    """A CSV file (UTF-8, comma-separated, with a header), or by its suffix .parquet a Parquet file.

    Raises:
        DataError: anything that is not such a file, with file, row and column.
        OSError: the file can't be read.
    """
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: it isn't one, with the row.
        OSError: the file can't be read.
    """
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: {path.stat().st_size / 2**30:.1f} GiB; expected at most {MAX_BYTES / 2**30:.0f} GiB")
    data = path.read_bytes()
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise DataError(f"{path}: row {line}: a zero byte; expected a text file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: row {line}: not UTF-8 (byte {data[error.start]:#04x}); save it as UTF-8") from error


def _read_csv(path: Path) -> Table:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header: list[str] = []
    cells: list[list[str]] = []
    rows: list[int] = []
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
                cells.append(row)
                rows.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}: row {reader.line_num}: not CSV: {error}") from error
    if not header:
        raise DataError(f"{path}: row 1: the file is empty; expected a header and rows")
    if not rows:
        raise DataError(f"{path}: row 2: there are no rows below the header")
    columns: dict[str, list[str] | np.ndarray] = {
        name: list(column) for name, column in zip(header, zip(*cells, strict=True), strict=True)
    }
    return Table(path, columns, rows)


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            meta = file.metadata
            unpacked = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            # Before anything is unpacked: a small file can hold more than the memory does.
            if max(unpacked, 8 * meta.num_rows * meta.num_columns) > MAX_BYTES:
                raise DataError(
                    f"{path}: {meta.num_rows} rows of {meta.num_columns} columns unpack to more than "
                    f"{MAX_BYTES / 2**30:.0f} GiB"
                )
            _check_header(path, [str(name) for name in file.schema_arrow.names])
            table = file.read()
    except pa.ArrowException as error:
        raise DataError(f"{path}: row 1: not Parquet: {error}") from error
    if not table.num_rows:
        raise DataError(f"{path}: row 1: there are no rows")
    columns: dict[str, list[str] | np.ndarray] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            columns[name] = np.array([math.nan if v is None else float(v) for v in column.to_pylist()])
        elif pa.types.is_nested(kind) or pa.types.is_binary(kind):
            raise DataError(f"{path}: row 1, column {name!r}: expected numbers, text or times, got {kind}")
        else:
            columns[name] = ["" if v is None else str(v) for v in column.to_pylist()]
    return Table(path, columns, list(range(1, table.num_rows + 1)))


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
