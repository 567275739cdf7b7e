"""The trainer with scikit-learn's interface: estimators to clone, pickle, search over and put into a pipeline."""

from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, Self

import numpy as np
from torch import Tensor

from unvanish.extras import extra
from unvanish.train.configuration import Optimizer, Schedule
from unvanish.train.data.missing import Missing, check_missing, filled, refuse
from unvanish.train.data.sequences import Sequences
from unvanish.train.data.series import Series, last_season
from unvanish.train.forecasting import Forecasting
from unvanish.train.learn import train_on
from unvanish.train.models import Read
from unvanish.train.problems import Classification, DataProblem, Regression, outputs_of
from unvanish.train.settings import Settings
from unvanish.train.trained import Trained

with extra("lab"):
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d


@dataclass(eq=False, repr=False)
class _Estimator(BaseEstimator):
    """The base of the estimators; after `fit`, `trained_` is the trained model: `trained_.save(folder)` saves it.

    A dataclass for its `__init__`, from whose signature scikit-learn reads the parameters. They have the names and the
    defaults of the settings.
    """

    cell: str = Settings.cell
    _: KW_ONLY
    hidden: int = Settings.hidden
    layers: int = Settings.layers
    bidirectional: bool = Settings.bidirectional
    dropout: float = Settings.dropout
    read: Read | None = Settings.read
    epochs: int | None = Settings.epochs
    steps: int | None = Settings.steps
    batch: int = Settings.batch
    lr: float = Settings.lr
    clip: float = Settings.clip
    optimizer: Optimizer = Settings.optimizer
    weight_decay: float = Settings.weight_decay
    schedule: Schedule = Settings.schedule
    patience: int | None = Settings.patience
    omega: float = Settings.omega
    missing: Missing = "error"
    random_state: int | np.random.RandomState | None = 0
    trained_: Trained = field(init=False)

    def _train(self, problem: type[DataProblem], data: Any, **options: Any) -> Self:
        names = {setting.name for setting in fields(Settings)}
        chosen = {name: value for name, value in self.get_params().items() if name in names}
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        settings = Settings(**chosen, seed=seed)
        self.trained_ = train_on(problem(data, **options, test=False), settings, flow_every=None, assessed=False)  # type: ignore[call-arg]
        return self


class _SequenceEstimator(_Estimator):
    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.allow_nan = self.missing != "error"
        return tags

    def _sequences(self, X: Any, y: list[str] | None = None) -> Sequences:
        if texts := _texts(X):
            data = Sequences(texts, y, [f"X[{i}]" for i in range(len(texts))], ["text"])
        else:
            x = _arrays(X, self.missing)
            data = Sequences(x, y, [f"X[{i}]" for i in range(len(x))], _channels(x[0].shape[1]))
        if y is not None and len(y) != len(data):
            raise ValueError(f"y: expected a target for each of the {len(data)} sequences, got {len(y)}")
        return data

    def _answers(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return outputs_of(self.trained_.model, self.trained_.config, self._sequences(X)).double()


class SequenceClassifier(ClassifierMixin, _SequenceEstimator):
    """P(class | x_1 … x_T) = softmax(W r + b), r read off the states of a recurrent network (`SequenceModel`).

    `fit(X, y)`, `predict(X)`, `predict_proba(X)`, `score(X, y)`. X is a list of `[T_i, I]` or `[T_i]` arrays, an array
    `[N, T, I]` or `[N, T]`, or a list of texts; y holds `[N]` classes. Channels are scaled by the training sequences;
    15 % of the sequences of each class are kept back to stop early.

    Args:
        cell: a name out of `RECIPES`: the cell, and how its weights begin.
        hidden, layers, bidirectional, dropout, read: the model, as in `Settings`.
        epochs, steps, batch, lr, clip, optimizer, weight_decay, schedule, patience, omega: the training, as there.
        missing: what happens to NaN: "error"; or the channel's "mean" over the training sequences, or the sequence's
            "previous" known value takes its place.
        random_state: of what is kept back, weights and order; None: another one at each fit.

    Raises:
        ValueError: sequences, targets or parameters don't fit, with the index.
    """

    classes_: np.ndarray

    def fit(self, X: Any, y: Any) -> Self:
        """Train on the sequences X and their classes y."""
        y = _targets(y)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        # The trainer sorts its classes as texts: numbers padded with zeros keep our order.
        data = self._sequences(X, [f"{code:08d}" for code in codes])
        if len(self.classes_) < 2:
            raise ValueError(f"y: expected two classes or more, got one class, {self.classes_.tolist()[0]!r}")
        return self._train(Classification, data)

    def predict_proba(self, X: Any) -> np.ndarray:
        """`[N, classes]`, in the order of `classes_`."""
        return self._answers(X).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """`[N]`: the likeliest class."""
        answers = self._answers(X)
        return self.classes_[answers.argmax(1).numpy()]


class SequenceRegressor(RegressorMixin, _SequenceEstimator):
    """ŷ = W r + b, r read off the states of a recurrent network (`SequenceModel`); the score is R².

    `fit(X, y)`, `predict(X)`, `score(X, y)`; X and parameters are those of `SequenceClassifier`, y holds `[N]` numbers.

    Raises:
        ValueError: sequences, targets or parameters don't fit, with the index.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train on the sequences X and their numbers y."""
        y = _targets(y).astype(np.float64)
        data = self._sequences(X, [repr(float(v)) for v in y])
        data.places[:] = [f"y[{i}]" for i in range(len(data))]
        return self._train(Regression, data)

    def predict(self, X: Any) -> np.ndarray:
        """`[N]`"""
        answers = self._answers(X)
        mean, deviation = self.trained_.config["target_scale"]
        return (answers[:, 0] * deviation + mean).numpy()


@dataclass(eq=False, repr=False)
class Forecaster(_Estimator):
    """The next `horizon` values of a series, from the last `window` steps of all its channels.

    `fit(X)`, `predict(X)`, `score(X)`. X is one series, `[T, C]` or `[T]`, in the order of time, the first channel
    being forecast; or a list of such. Of each series the last 15 % of the steps are kept back to stop early; the scale
    comes from the steps before them. With `cv=TimeSeriesSplit(…)` it can be cross-validated; each part has to hold
    window + horizon steps or more.

    Args:
        cell: a name out of `RECIPES`.
        horizon: steps forecast at once.
        window: steps looked back on.
        season: steps of a season, for the seasonal-naive forecast of the score; None: the last value is repeated.
        hidden, layers, bidirectional, dropout, read: the model, as in `Settings`.
        epochs, steps, batch, lr, clip, optimizer, weight_decay, schedule, patience, omega: the training, as there.
        missing: as in `SequenceClassifier`; in the first channel "mean" is no choice, as a forecast would be judged by
            a made-up value.
        random_state: of weights and order; None: another one at each fit.

    Raises:
        ValueError: series or parameters don't fit.
    """

    horizon: int = 1
    window: int = 48
    season: int | None = None

    def fit(self, X: Any, y: None = None) -> Self:
        """Train on one series, or a list of them; `y` exists for scikit-learn and must be None."""
        if y is not None:
            raise ValueError("y: expected None, as what is forecast is the first channel of X")
        found = self._series(X)
        data = Series({str(i): values for i, values in enumerate(found)}, _channels(found[0].shape[1]))
        return self._train(Forecasting, data, horizon=self.horizon, window=self.window, season=self.season)

    def predict(self, X: Any) -> np.ndarray:
        """`[horizon]`: what follows the last step of a series; `[N, horizon]` for a list of N."""
        forecast = self._forecasts(self._series(X))
        return forecast if isinstance(X, list | tuple) and np.ndim(X[0]) else forecast[0]

    def backtest(self, X: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`[N, horizon]` each: forecasts from every step of X that has a window before and a horizon after it, the
        actual values, and the (seasonal-)naive forecasts."""
        seen, truth, naive = [], [], []
        for values in self._series(X):
            for end in range(max(self.window, self.season or 1), len(values) - self.horizon + 1):
                seen.append(values[end - self.window : end])
                truth.append(values[end : end + self.horizon, 0])
                naive.append(last_season(values[:, 0], end, self.horizon, self.season or 1))
        if not seen:
            raise ValueError(f"X: expected at least window + horizon = {self.window + self.horizon} steps")
        return self._forecasts(seen), np.stack(truth), np.stack(naive)

    def score(self, X: Any, y: None = None) -> float:
        """1 − Σ(forecast − y)²/Σ(naive − y)² over the backtest: 0 is as good as the (seasonal-)naive forecast, 1 is
        perfect."""
        said, truth, naive = self.backtest(X)
        return float(1 - ((said - truth) ** 2).sum() / ((naive - truth) ** 2).sum())

    def _series(self, X: Any) -> list[np.ndarray]:
        several = isinstance(X, list | tuple) and len(X) and np.ndim(X[0])
        found = _arrays(X if several else [X], self.missing)
        for i, values in enumerate(found):
            for step in np.flatnonzero(np.isnan(values[:, 0]))[:1]:
                raise ValueError(
                    f"X[{i}], step {step}: the value to forecast is missing; fill it in, or pass missing='previous'"
                )
        return found

    def _forecasts(self, windows: list[np.ndarray]) -> np.ndarray:
        check_is_fitted(self)
        data = Series({str(i): values for i, values in enumerate(windows)}, _channels(windows[0].shape[1]))
        return np.array(list(self.trained_.predict(data).values()))


def _targets(y: Any) -> np.ndarray:
    if y is None:
        raise ValueError("y: requires y to be passed, but the target y is None")
    y = column_or_1d(y, warn=True)
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError(f"y[{int(np.flatnonzero(~np.isfinite(y))[0])}]: expected no NaN and no infinity")
    return y


def _channels(count: int) -> list[str]:
    return [f"channel {k + 1}" for k in range(count)]


def _texts(X: Any) -> list[str]:
    """X, if it is a list, an array or a column of texts; else nothing."""
    if isinstance(X, list | tuple) or (hasattr(X, "dtype") and getattr(X, "ndim", 0) == 1):
        return list(X) if all(isinstance(x, str) for x in X) else []
    return []


def _arrays(X: Any, missing: Any) -> list[np.ndarray]:
    """`[T_i, I]` float64 each, with missing values treated according to the policy.

    Raises:
        ValueError: X is something else, with the index.
    """
    check_missing(missing)
    if isinstance(X, list | tuple) and len(X) and any(np.ndim(x) for x in X):
        found = [
            check_array(np.asarray(x)[:, None] if np.ndim(x) == 1 else x, dtype=np.float64, ensure_all_finite=False)  # type: ignore[arg-type]
            for x in X
        ]
    else:
        X = check_array(X, dtype=np.float64, allow_nd=True, ensure_all_finite=False)  # type: ignore[arg-type]
        if X.ndim > 3:
            raise ValueError(f"X: expected [N, T, I], [N, T] or a list of [T, I], got an array of {X.ndim} dimensions")
        found = list(X if X.ndim == 3 else X[..., None])
    for i, values in enumerate(found):
        if values.shape[1] != found[0].shape[1]:
            raise ValueError(f"X[{i}]: expected {found[0].shape[1]} channels as in X[0], got {values.shape[1]}")
        for step, channel in np.argwhere(np.isinf(values))[:1]:
            raise ValueError(f"X[{i}], step {step}, channel {channel}: expected a finite number, got infinity")
        for step, channel in np.argwhere(np.isnan(values))[:1]:
            refuse(f"X[{i}], step {step}, channel {channel}: NaN", missing, option="missing=")
    return [filled(values, missing) for values in found]
