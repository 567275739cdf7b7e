"""From a file and what is to be learnt to a problem, and to what a model is applied to."""

from pathlib import Path
from typing import Any, Literal

from unvanish.train.data.layouts import sequences, series
from unvanish.train.data.missing import Missing
from unvanish.train.data.sequences import Sequences
from unvanish.train.data.series import Series
from unvanish.train.data.table import DataError, read_table, read_text
from unvanish.train.data.ucr import read_ts
from unvanish.train.forecasting import Forecasting
from unvanish.train.language import LanguageModel
from unvanish.train.problems import Classification, DataProblem, Regression

Kind = Literal["classification", "regression", "forecasting", "language"]
USED: dict[str, tuple[str, ...]] = {
    "classification": ("target", "id", "text", "missing"),
    "regression": ("target", "id", "text", "missing"),
    "forecasting": ("target", "id", "time", "missing", "horizon", "window", "season"),
    "language": ("text",),
}


def read_data(path: Path, kind: Kind, **options: Any) -> Sequences | Series | str:
    """What a file holds, for a kind of problem.

    Args:
        path: .csv or .parquet; .ts of the UCR/UEA archive (classification, regression); for a language model any other
            suffix is a text.
        kind: "classification", "regression", "forecasting" or "language".
        options: target, id, time, text: columns; missing: the policy for missing values. None: not given.

    Raises:
        DataError: the file is malformed, with file, row and column.
        ValueError: an unknown kind, or an option that it has no use for.
        OSError: the file can't be read.
    """
    given = _given(kind, options)
    missing: Missing = given.pop("missing", "error")
    if kind == "language":
        if path.suffix.lower() in (".csv", ".parquet"):
            if "text" not in given:
                raise ValueError(f"--text: expected the column of {path} that holds the texts")
            return "\n".join(read_table(path).text(given["text"]))
        if given:
            raise ValueError(f"--text: {path} is a text as it is and has no columns; leave it out")
        return read_text(path)
    if kind == "forecasting":
        if "target" not in given:
            raise ValueError("--target: expected the column that is forecast")
        return series(read_table(path), missing=missing, **given)
    if path.suffix.lower() == ".ts":
        if given:
            raise ValueError(f"--{next(iter(given))}: a .ts file has no named columns; leave it out")
        return read_ts(path, missing=missing)
    return sequences(read_table(path), missing=missing, **given)


def read_problem(
    path: Path,
    kind: Kind = "classification",
    *,
    target: str | None = None,
    id: str | None = None,
    time: str | None = None,
    text: str | None = None,
    missing: Missing | None = None,
    horizon: int | None = None,
    window: int | None = None,
    season: int | None = None,
    seed: int = 0,
) -> DataProblem:
    """What is to be learnt from a file.

    Args:
        path, kind, target, id, time, text, missing: as in `read_data`.
        horizon, window, season: as in `Forecasting`.
        seed: of the split.

    Raises:
        DataError: the file is malformed, with file, row and column; or holds too little.
        ValueError: an option that the kind has no use for, or that it needs.
        OSError: the file can't be read.
    """
    ahead = _given(kind, {"horizon": horizon, "window": window, "season": season})
    data = read_data(path, kind, target=target, id=id, time=time, text=text, missing=missing)
    if isinstance(data, Series):
        return Forecasting(data, **ahead)
    if isinstance(data, str):
        try:
            return LanguageModel(data)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    return (Classification if kind == "classification" else Regression)(data, seed=seed)


def _given(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, all of use to the kind."""
    if kind not in USED:
        raise ValueError(f"--kind: expected one of {', '.join(USED)}, got {kind!r}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in USED[kind]:
            raise ValueError(f"--{name}: {kind} has no use for it; leave it out")
    return given
