"""The layouts of a table: wide, a sequence per row and a step per column; long, a step per row, with an id for each
sequence; a column of texts; or a time series."""

from itertools import pairwise

import numpy as np

from unvanish.extras import extra
from unvanish.train.data.missing import Missing, check_missing, filled, refuse
from unvanish.train.data.sequences import Sequences
from unvanish.train.data.series import Series
from unvanish.train.data.table import DataError, Table


def sequences(
    table: Table,
    *,
    target: str | None = None,
    id: str | None = None,
    time: str | None = None,
    text: str | None = None,
    missing: Missing = "error",
) -> Sequences:
    """Sequences with one target each.

    In a wide table the missing cells at the end of a row make its sequence shorter. Any other missing value is an
    error; or, by `missing`, the channel's "mean" over the training sequences or the sequence's "previous" known value
    takes its place (before the first, the mean).

    Args:
        table: the rows.
        target: the column of the answers; None: there is none, as when predicting.
        id: the column that tells sequences apart, in a long table; None: a wide one.
        time: the column of times of a long table, checked to increase within each sequence; not an input.
        text: the column of the texts, where the sequences are texts; other columns are ignored.
        missing: "error", "mean" or "previous"; of texts "error".

    Raises:
        DataError: the rows don't fit, with row and column.
    """
    check_missing(missing)
    if time is not None and id is None:
        raise DataError(f"{table.path}: --time is for tables of a step per row; name the sequences' column with --id")
    table.require(target=target, id=id, time=time, text=text)
    names = [f"row {row}" for row in table.rows]
    places = [] if target is None else [table.where(row, target) for row in range(len(names))]
    if text is not None:
        if id is not None:
            raise DataError(f"{table.path}: --text and --id exclude each other: a text is a sequence")
        if missing != "error":
            raise DataError(f"{table.path}: --missing: a missing text can't be replaced; leave it out")
        y = None if target is None else table.labels(target, "target")
        return Sequences(table.text(text), y, names, [text], places)
    channels = [name for name in table.columns if name not in (target, id, time)]
    if not channels:
        raise DataError(f"{table.path}: row 1: no column is left for values besides target and id")
    y = None if target is None else table.labels(target, "target")
    values = table.numbers(channels)
    if id is None:
        x = []
        for row, steps in enumerate(values):
            known = np.flatnonzero(~np.isnan(steps))
            if not len(known):
                raise DataError(f"{table.where(row, channels[0])}: the sequence has no values")
            steps = steps[: known[-1] + 1]
            for t in np.flatnonzero(np.isnan(steps))[:1]:
                refuse(table.where(row, channels[t]), missing)
            x.append(filled(steps[:, None], missing))
        return Sequences(x, y, names, ["value"], places)
    groups = _groups(table, id)
    _all_known(table, values, channels, missing)
    if time is not None:
        _check_order(table, time, groups)
    if y is not None:
        for name, rows in groups.items():
            for row in rows:
                if y[row] != y[rows[0]]:
                    raise DataError(
                        f"{table.where(row, str(target))}: sequence {name!r} has {y[rows[0]]!r} above and {y[row]!r} "
                        "here; expected one target per sequence"
                    )
    return Sequences(
        [filled(values[rows], missing) for rows in groups.values()],
        None if y is None else [y[rows[0]] for rows in groups.values()],
        list(groups),
        channels,
        [places[rows[0]] for rows in groups.values()] if places else [],
    )


def series(
    table: Table, *, target: str, id: str | None = None, time: str | None = None, missing: Missing = "error"
) -> Series:
    """One or more time series, a row per step, in the order of time.

    Args:
        table: the rows; every other column is a further input, known up to the last step and not beyond.
        target: the column that is forecast.
        id: the column that tells series apart.
        time: the column of times, checked to increase within each series; not an input.
        missing: as in `sequences`; what is forecast can't be "mean": a forecast would be judged by a made-up value.

    Raises:
        DataError: the rows don't fit, with row and column.
    """
    check_missing(missing)
    table.require(target=target, id=id, time=time)
    channels = [target, *(name for name in table.columns if name not in (target, id, time))]
    values = table.numbers(channels)
    _all_known(table, values, channels, missing)
    groups = _groups(table, id) if id is not None else {"": list(range(len(table.rows)))}
    if time is not None:
        _check_order(table, time, groups)
    known = {name: filled(values[rows], missing) for name, rows in groups.items()}
    for name, rows in groups.items():
        for step in np.flatnonzero(np.isnan(known[name][:, 0]))[:1]:
            raise DataError(
                f"{table.where(rows[step], target)}: the value to forecast is missing; fill it in"
                + (", or choose --missing previous" if missing == "mean" else ": no value precedes it")
            )
    return Series(known, channels)


def _check_order(table: Table, time: str, groups: dict[str, list[int]]) -> None:
    """Raise where the times of a group don't increase."""
    moments = _times(table, time)
    for name, rows in groups.items():
        for before, row in pairwise(rows):
            if not moments[row] > moments[before]:
                of = f" of {name!r}" if name else ""
                raise DataError(f"{table.where(row, time)}: expected a later time than in the row{of} before it")


def _times(table: Table, column: str) -> np.ndarray:
    cells = table.columns[column]
    if isinstance(cells, np.ndarray):
        return table.numbers([column])[:, 0]
    with extra("report"):
        import pandas as pd

    times = pd.to_datetime(pd.Series(table.labels(column, "time")), errors="coerce", utc=True, format="ISO8601")
    if times.notna().all():
        return times.to_numpy(dtype="datetime64[ns]")
    try:
        return table.numbers([column])[:, 0]
    except DataError:
        row = int(np.flatnonzero(times.isna())[0])
        raise DataError(
            f"{table.where(row, column)}: expected times, as 2026-01-31 or 2026-01-31T12:00, or numbers throughout, "
            f"got {cells[row][:40]!r}"
        ) from None


def _groups(table: Table, id: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(table.labels(id, "id")):
        groups.setdefault(name, []).append(row)
    return groups


def _all_known(table: Table, values: np.ndarray, channels: list[str], missing: Missing) -> None:
    for row, column in np.argwhere(np.isnan(values))[:1]:
        refuse(table.where(row, channels[column]), missing)
