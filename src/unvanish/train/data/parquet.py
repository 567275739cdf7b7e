"""A table from a Parquet file, with a precise error for anything wrong with it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unvanish.extras import extra
from unvanish.train.data.table import EXACT, MAX_BYTES, SMALLER, DataError, Table, check_header
from unvanish.train.memory import CELL, require

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import FileMetaData


def read_parquet(path: Path) -> Table:
    """Columns of numbers, text, times, true and false.

    Whole numbers beyond 2^53 are kept as they are written, so that no two ids become one.

    Raises:
        DataError: anything that is not such a file, with file, row and column.
        OSError: the file can't be read.
    """
    with extra("lab"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    with path.open("rb") as stream:  # any failure from here on is the file's fault
        try:
            with pq.ParquetFile(stream) as file:
                schema = file.schema_arrow
                _check_size(path, schema, file.metadata)
                check_header(path, [str(name) for name in schema.names])
                for field in schema:
                    if not _readable(field.type):
                        raise DataError(
                            f"{path}: row 1, column {field.name!r}: expected numbers, text or times, got {field.type}"
                        )
            # A text that many rows share is kept once: unpacked, a small file could hold more than the memory does.
            texts = [field.name for field in schema if _is_text(field.type)]
            with pq.ParquetFile(stream, read_dictionary=texts) as file:
                table = file.read()
            table.validate(full=True)
            columns = {name: _cells(column) for name, column in zip(table.column_names, table.columns, strict=True)}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: row 1: not Parquet, or damaged: {error}") from error
    if not table.num_rows:
        raise DataError(f"{path}: row 1: there are no rows")
    return Table(path, columns, list(range(1, table.num_rows + 1)))


def _check_size(path: Path, schema: "pa.Schema", meta: "FileMetaData") -> None:
    from pyarrow import types

    unpacked = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    if max(unpacked, 8 * meta.num_rows * meta.num_columns) > MAX_BYTES:
        raise DataError(
            f"{path}: {meta.num_rows} rows of {meta.num_columns} columns unpack to more than "
            f"{MAX_BYTES / 2**30:.0f} GiB"
        )
    plain = sum(types.is_floating(kind) or types.is_integer(kind) for kind in schema.types)
    # Unpacked; a column at a time as Python's objects; then float64, or strings.
    held = unpacked + meta.num_rows * (CELL + 16 * plain + CELL * (meta.num_columns - plain))
    require(held, str(path), SMALLER)


def _is_text(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _readable(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _readable(kind.value_type)
    plain = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null, _is_text)
    return any(of(kind) for of in plain) or (types.is_temporal(kind) and not types.is_interval(kind))


def _cells(column: "pa.ChunkedArray") -> list[str] | np.ndarray:
    from pyarrow import types

    kind = column.type
    if types.is_floating(kind):
        return np.array([math.nan if v is None else v for v in column.to_pylist()], dtype=np.float64)
    if types.is_integer(kind):
        whole = column.to_pylist()
        if all(v is None or abs(v) <= EXACT for v in whole):
            return np.array([math.nan if v is None else v for v in whole], dtype=np.float64)
        return ["" if v is None else str(v) for v in whole]
    if types.is_dictionary(kind):
        found: list[str] = []
        for chunk in column.chunks:
            texts = ["" if v is None else str(v) for v in chunk.dictionary.to_pylist()]
            found += ["" if i is None else texts[i] for i in chunk.indices.to_pylist()]
        return found
    return ["" if v is None else str(v) for v in column.to_pylist()]
