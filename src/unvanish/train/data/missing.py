"""The treatment of missing values."""

import math
from typing import Literal, get_args

import numpy as np

from unvanish.train.data.table import DataError

Missing = Literal["error", "mean", "previous"]
MISSING_POLICIES: tuple[Missing, ...] = get_args(Missing)


def check_missing(missing: str) -> None:
    """Check that this is a policy for missing values.

    Raises:
        ValueError: it isn't.
    """
    if missing not in MISSING_POLICIES:
        raise ValueError(f"missing: expected one of {', '.join(MISSING_POLICIES)}, got {missing!r}")


def refuse(where: str, missing: Missing, option: str = "--missing ") -> None:
    """Check that the policy, which the user chooses by `option`, allows the missing value here.

    Raises:
        DataError: the policy is "error".
    """
    if missing == "error":
        raise DataError(f"{where}: the value is missing; fill it in, or choose {option}mean or {option}previous")


def filled(x: np.ndarray, missing: Missing) -> np.ndarray:
    """`[T, I]` → `[T, I]`: by the policy "previous", the last known value of a channel where one is missing.

    What stays NaN becomes the channel's mean when the values are scaled.
    """
    if missing != "previous" or not np.isnan(x).any():
        return x
    known = np.where(np.isnan(x), -1, np.arange(len(x))[:, None])
    last = np.maximum.accumulate(known, axis=0)
    return np.where(last < 0, math.nan, np.take_along_axis(x, np.maximum(last, 0), axis=0))
