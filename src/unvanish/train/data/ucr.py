"""The .ts files of the UCR/UEA archive: `@` lines, then a series per line, channels parted by `:`, the label last."""

from pathlib import Path

import numpy as np

from unvanish.train.data.layouts import Missing, _filled, check_missing
from unvanish.train.data.sequences import Sequences
from unvanish.train.data.table import DataError, read_text


def read_ts(path: Path, *, missing: Missing = "error") -> Sequences:
    """Sequences and their labels.

    Args:
        path: a .ts file; `?` and NaN are missing values.
        missing: as in `sequences`.

    Raises:
        DataError: it is none, with file, row and channel.
        OSError: the file can't be read.
    """
    check_missing(missing)
    labelled, data_from = False, None
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        words = line.strip().lower().split()
        if not words or words[0].startswith(("#", "%")):
            continue
        if words[0] == "@data":
            data_from = number
            break
        if not words[0].startswith("@"):
            raise DataError(f"{path}: row {number}: expected a line that starts with @, up to @data")
        if words[0] in ("@classlabel", "@targetlabel"):
            labelled = words[1:2] == ["true"]
        if words[0] == "@timestamps" and words[1:2] == ["true"]:
            raise DataError(f"{path}: row {number}: series with time stamps can't be read; leave the stamps out")
    if data_from is None:
        raise DataError(f"{path}: row {len(lines) + 1}: there is no @data line; expected a .ts file")
    x, y, names = [], [], []
    for number, line in enumerate(lines[data_from:], data_from + 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        channels = line.strip().split(":")
        if labelled:
            y.append(channels.pop().strip())
            if not channels or not y[-1] or y[-1] == "?":
                raise DataError(f"{path}: row {number}: the label is missing; expected it after the last colon")
        x.append(_filled(_series(path, number, channels, missing), missing))
        names.append(f"row {number}")
        if x[-1].shape[1] != x[0].shape[1]:
            raise DataError(
                f"{path}: row {number}: expected {x[0].shape[1]} channels as in {names[0]}, got {x[-1].shape[1]}"
            )
    if not x:
        raise DataError(f"{path}: row {data_from + 1}: there is no series below @data")
    return Sequences(x, y if labelled else None, names, [f"channel {k + 1}" for k in range(x[0].shape[1])])


def _series(path: Path, number: int, channels: list[str], missing: Missing) -> np.ndarray:
    columns = []
    for place, channel in enumerate(channels, 1):
        where = f"{path}: row {number}, channel {place}"
        cells = channel.split(",")
        try:
            values = np.array([float("nan" if cell.strip() == "?" else cell) for cell in cells])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if np.isinf(values).any():
            raise DataError(f"{where}: expected finite numbers, got {values[np.isinf(values)][0]}")
        if missing == "error" and np.isnan(values).any():
            step = int(np.flatnonzero(np.isnan(values))[0]) + 1
            raise DataError(
                f"{where}, step {step}: the value is missing; mend it, or choose --missing mean or previous"
            )
        if columns and len(values) != len(columns[0]):
            raise DataError(f"{where}: expected {len(columns[0])} steps as in channel 1, got {len(values)}")
        columns.append(values)
    return np.stack(columns, axis=1)
