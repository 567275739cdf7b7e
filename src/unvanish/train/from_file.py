"""Reading a file as a problem to learn, or as data to which a model is applied."""

import os
from collections.abc import Collection
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
    "classification": ("target", "id", "time", "text", "missing"),
    "regression": ("target", "id", "time", "text", "missing"),
    "forecasting": ("target", "id", "time", "missing", "horizon", "window", "season"),
    "language": ("text",),
}


def read_data(
    path: str | os.PathLike[str], kind: Kind, if_there: Collection[str] = (), /, **options: Any
) -> Sequences | Series | str:
    """The content of a file, for a kind of problem.

    Args:
        path: .csv or .parquet; .ts of the UCR/UEA archive (classification, regression); for a language model any other
            suffix is a text.
        kind: "classification", "regression", "forecasting" or "language".
        if_there: which options of a classification or regression don't count where the file lacks their column.
        options: target, id, time, text: columns; missing: the policy for missing values. None: not given.

    Raises:
        DataError: the file is malformed, with file, row and column.
        ValueError: an unknown kind, or an option that does not apply to it.
        OSError: the file can't be read.
    """
    given, path = _given(kind, options), Path(path)
    try:
        return _read(path, kind, given, if_there)
    except OSError as error:
        raise OSError(f"--data: {path} can't be read: {error.strerror or error}") from error


def _read(path: Path, kind: Kind, given: dict[str, Any], if_there: Collection[str]) -> Sequences | Series | str:
    suffix = path.suffix.lower()
    if kind == "language":
        if suffix in (".csv", ".parquet"):
            if "text" not in given:
                raise ValueError(f"--text: expected the column of {path} that holds the texts")
            table = read_table(path)
            table.require(text=given["text"])
            return "\n".join(table.text(given["text"]))
        if given:
            raise ValueError(f"--text: {path} is a text as it is and has no columns; leave it out")
        return read_text(path)
    missing: Missing = given.pop("missing", "error")
    if kind == "forecasting":
        if suffix == ".ts":
            raise ValueError(f"--kind: {path} holds sequences with a label each; expected classification or regression")
        if "target" not in given:
            raise ValueError("--target: expected the column that is forecast")
        return series(read_table(path), missing=missing, **given)
    if suffix == ".ts":
        if given:
            raise ValueError(f"--{next(iter(given))}: a .ts file has no named columns; leave it out")
        return read_ts(path, missing=missing)
    table = read_table(path)
    columns = {name: column for name, column in given.items() if name not in if_there or column in table.columns}
    return sequences(table, missing=missing, **columns)


def read_problem(
    path: str | os.PathLike[str],
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
    """The problem to learn from a file.

    Args:
        path, kind, target, id, time, text, missing: as in `read_data`.
        horizon, window, season: as in `Forecasting`.
        seed: of the split.

    Raises:
        DataError: the file is malformed, with file, row and column; or contains too little.
        ValueError: an option does not apply to the kind, or a required one is missing.
        OSError: the file can't be read.
    """
    path = Path(path)
    ahead = _given(kind, {"horizon": horizon, "window": window, "season": season})
    if kind in ("classification", "regression") and target is None and path.suffix.lower() != ".ts":
        raise ValueError("--target: expected the column of the answers; of a whole text, --kind language learns")
    columns = {"target": target, "id": id, "time": time, "text": text, "missing": missing}
    data = read_data(path, kind, **columns)
    try:
        if isinstance(data, Series):
            problem = Forecasting(data, **ahead)
        elif isinstance(data, str):
            problem = LanguageModel(data)
        else:
            problem = (Classification if kind == "classification" else Regression)(data, seed=seed)
        problem.columns = {name: value for name, value in columns.items() if value is not None}
        return problem
    except DataError as error:
        if str(path) in str(error):
            raise
        raise DataError(f"{path}: {error}") from error


def _given(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, all of them applicable to the kind."""
    if kind not in USED:
        raise ValueError(f"--kind: expected one of {', '.join(USED)}, got {kind!r}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in USED[kind]:
            raise ValueError(f"--{name}: not used by {kind}; leave it out")
    return given
