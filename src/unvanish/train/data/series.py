"""Time series, how they are split in time, and the windows a forecast is made from."""

from dataclasses import dataclass

import numpy as np

from unvanish.train.data.table import DataError

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
"""of the steps; where nothing is kept back for a test, that share trains too"""


@dataclass(frozen=True)
class Series:
    """One or more series of the same channels."""

    values: dict[str, np.ndarray]
    """name → [T, C], the forecast channel first; NaN where a value is missing"""
    channels: list[str]


@dataclass(frozen=True)
class Window:
    """The place of a forecast: made after step `end − 1` of a series, from the `length` steps before `end`."""

    series: str
    end: int
    length: int


def shares(test: bool) -> dict[str, float]:
    """The splits of a series' steps, in order."""
    return SHARES if test else {"train": SHARES["train"] + SHARES["test"], "validation": SHARES["validation"]}


def split_in_time(series: Series, horizon: int, window: int, *, test: bool = True) -> dict[str, list[Window]]:
    """The windows of each split: in every series the first 70 % of the steps train, the next 15 % validate, the last
    15 % test; without `test` the first 85 % train.

    All steps that a window forecasts are inside its split. The steps it looks back on may be earlier: they are known.

    Raises:
        DataError: a series is too short.
    """
    found: dict[str, list[Window]] = {part: [] for part in shares(test)}
    for name, values in series.values.items():
        start, done = 0, 0.0
        for part, share in shares(test).items():
            done += share
            stop = round(done * len(values))
            # Training windows are whole. Later ones too, unless the training part itself is shorter than a window.
            ends = range(max(start, window), stop - horizon + 1)
            if not ends:
                label = f"series {name!r}" if name else "the series"
                raise DataError(
                    f"data: {label} has {len(values)} steps, of which {stop - start} fall to the {part} split; too few "
                    f"for a window of {window} and a horizon of {horizon}"
                )
            found[part] += [Window(name, end, window) for end in ends]
            start = stop
    return found


def training_steps(values: np.ndarray, *, test: bool = True) -> np.ndarray:
    """The part of a series that trains."""
    return values[: round(shares(test)["train"] * len(values))]


def last_season(values: np.ndarray, end: int, horizon: int, season: int = 1) -> np.ndarray:
    """The seasonal-naive forecast of steps end … end + horizon − 1: the latest known value a whole number of seasons
    before each; season 1 repeats the last value.

    Raises:
        ValueError: there is no whole season before `end`.
    """
    if not 1 <= season <= end:
        raise ValueError(f"season: expected 1 to {end}, the steps that are known, got {season}")
    return values[end - season + np.arange(horizon) % season]
