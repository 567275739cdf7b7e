"""The .ts files of the UCR/UEA archive: `@` lines, then a series per line, channels parted by `:`, the label last."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unvanish.train.data.missing import Missing, check_missing, filled, refuse
from unvanish.train.data.sequences import Sequences
from unvanish.train.data.table import MAX_COLUMNS, SMALLER, DataError, numbers, read_text
from unvanish.train.memory import of_ts, require

UNKNOWN = ("?", "nan", "")
"""missing values"""


@dataclass
class _Header:
    """The content of the `@` lines; None where they don't say."""

    classes: list[str] = field(default_factory=list)
    labelled: bool = False
    equal: bool | None = None
    length: int | None = None
    channels: int | None = None


def read_ts(path: Path, *, missing: Missing = "error") -> Sequences:
    """Sequences of equal or unequal length, of one or more channels, and their labels.

    Args:
        path: a .ts file; `?` and NaN are missing values. Where the header says what classes, lengths and channels
            there are, the series have to agree.
        missing: as in `sequences`.

    Raises:
        DataError: it is not a valid .ts file, with file, row and channel.
        OSError: the file can't be read.
    """
    check_missing(missing)
    text = read_text(path)
    require(of_ts(text), str(path), SMALLER)
    lines = re.split("\r\n|\r|\n", text)
    header, data_from = _header(path, lines)
    x, y, names, places = [], [], [], []
    for number, line in enumerate(lines[data_from:], data_from + 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        channels = line.strip().split(":")
        where = f"{path}: row {number}"
        if header.labelled:
            y.append(channels.pop().strip())
            if not channels or not y[-1] or y[-1] == "?":
                raise DataError(f"{where}: the label is missing; expected it after the last colon")
            if header.classes and y[-1] not in header.classes:
                raise DataError(
                    f"{where}, channel {len(channels) + 1}: {y[-1][:40]!r} is none of the classes in the header"
                )
        x.append(filled(_series(where, channels, missing), missing))
        names.append(f"row {number}")
        places.append(f"{where}, label")
        _agree(where, x, header)
    if not x:
        raise DataError(f"{path}: row {data_from + 1}: there is no series below @data")
    channels = [f"channel {k + 1}" for k in range(x[0].shape[1])]
    return Sequences(x, y if header.labelled else None, names, channels, places)


def _header(path: Path, lines: list[str]) -> tuple[_Header, int]:
    header = _Header()
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith(("#", "%")):
            continue
        where, key, rest = f"{path}: row {number}", words[0].lower(), words[1:]
        if not key.startswith("@"):
            raise DataError(f"{where}: expected a line that starts with @, up to @data")
        if key == "@data":
            return header, number
        if key in ("@classlabel", "@targetlabel"):
            header.labelled = _truth(where, key, rest)
            header.classes = rest[1:] if key == "@classlabel" else []
        elif key == "@timestamps" and _truth(where, key, rest):
            raise DataError(f"{where}: series with time stamps can't be read; write the values alone, in their order")
        elif key == "@equallength":
            header.equal = _truth(where, key, rest)
        elif key == "@univariate" and _truth(where, key, rest):
            header.channels = 1
        elif key == "@serieslength":
            header.length = _count(where, key, rest)
        elif key in ("@dimension", "@dimensions"):
            header.channels = _count(where, key, rest)
    raise DataError(f"{path}: row {len(lines)}: there is no @data line; expected a .ts file")


def _truth(where: str, key: str, rest: list[str]) -> bool:
    if not rest or rest[0].lower() not in ("true", "false"):
        raise DataError(f"{where}: expected true or false after {key}, got {' '.join(rest)[:40]!r}")
    return rest[0].lower() == "true"


def _count(where: str, key: str, rest: list[str]) -> int:
    if len(rest) != 1 or not rest[0].isdecimal() or len(rest[0]) > 12 or int(rest[0]) < 1:
        raise DataError(f"{where}: expected a whole number above 0 after {key}, got {' '.join(rest)[:40]!r}")
    return int(rest[0])


def _series(where: str, channels: list[str], missing: Missing) -> np.ndarray:
    if len(channels) > MAX_COLUMNS:
        raise DataError(f"{where}: {len(channels)} channels; expected at most {MAX_COLUMNS}")
    columns: list[np.ndarray] = []
    for place, channel in enumerate(channels, 1):
        cells = channel.split(",")
        if cells[0].lstrip().startswith("("):
            raise DataError(f"{where}, channel {place}: series with time stamps can't be read; write the values alone")
        values = numbers(cells, lambda step, place=place: f"{where}, channel {place}, step {step + 1}", missing=UNKNOWN)
        for step in np.flatnonzero(np.isnan(values))[:1]:
            refuse(f"{where}, channel {place}, step {step + 1}", missing)
        if columns and len(values) != len(columns[0]):
            raise DataError(
                f"{where}, channel {place}: expected {len(columns[0])} steps as in channel 1, got {len(values)}"
            )
        columns.append(values)
    return np.stack(columns, axis=1)


def _agree(where: str, x: list[np.ndarray], header: _Header) -> None:
    """Raise where the last series contradicts the header."""
    length, channels = x[-1].shape
    if channels != (expected := header.channels or x[0].shape[1]):
        raise DataError(f"{where}: expected {expected} channels, got {channels}; is a label missing, or one too many?")
    if header.equal and length != (expected := header.length or len(x[0])):
        raise DataError(f"{where}: expected {expected} steps, as the header says that all are equal; got {length}")
