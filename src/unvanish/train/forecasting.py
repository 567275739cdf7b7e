"""Forecasts of a time series: a window of it in, the next steps out; judged on a rolling backtest."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

from unvanish.train.data.sequences import Scale
from unvanish.train.data.series import Series, Window, last_season, shares, split_in_time, training_steps
from unvanish.train.data.table import DataError
from unvanish.train.fit import answers
from unvanish.train.models import SequenceModel, Shape
from unvanish.train.problems import DataProblem, Example, Judgement, Listed, evenly, to_json
from unvanish.train.settings import Settings
from unvanish.train.supervised import together
from unvanish.train.tasks.task import Split


class Forecasting(DataProblem):
    """The change of a series over the next `horizon` steps from its last known value, read off the last `window` steps
    of all channels: mean squared error, in units of the training steps' deviation.

    In every series the first 70 % of the steps train, the next 15 % validate, the last 15 % test; what a window
    forecasts lies inside its split. The backtest forecasts from every step of the test split in turn.

    Args:
        series: one or more, the forecast channel first.
        horizon: steps forecast at once.
        window: steps looked back on.
        season: steps after which the series repeats, for the seasonal-naive baseline; None: it is left out.
        test: whether a part is kept back to judge the model on; if not, the first 85 % of the steps train.

    Raises:
        DataError: a series is too short.
        ValueError: a number out of range.
    """

    kind = "forecasting"
    applied_to = Series
    metric = "mean squared error / variance"

    def __init__(
        self, series: Series, *, horizon: int = 1, window: int = 48, season: int | None = None, test: bool = True
    ) -> None:
        for name, value in (("horizon", horizon), ("window", window), ("season", season)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if season is not None and season > window:
            raise ValueError(f"season: expected at most the window, {window} steps, got {season}")
        self.series, self.horizon, self.length, self.season = series, horizon, window, season
        self.parts = split_in_time(series, horizon, window, test=test)
        self.scale = Scale.of([training_steps(values, test=test) for values in series.values.values()])
        self._scaled = {name: self.scale(values) for name, values in series.values.items()}

    def begin(self, settings: Settings) -> Shape:
        if settings.read == "all":
            raise ValueError("read: expected last or mean in forecasting, got 'all'")
        inputs = len(self.series.channels)
        return Shape(**settings.shape(), inputs=inputs, outputs=self.horizon, read=settings.read or "last")

    def dataset(self, split: Split) -> Dataset:
        return _Windows(self._scaled, self.parts[split], self.horizon)

    minimised = staticmethod(mse_loss)

    def loss(self, answer: Tensor, y: Tensor) -> Tensor:
        return mse_loss(answer, y)

    @staticmethod
    def encoded(config: dict[str, Any], data: Series, most: int) -> list[Example]:
        """Up to `most` windows and what follows them, spread evenly over the series, as in training.

        Raises:
            DataError: other channels than in training, or fewer steps than a window and a horizon.
        """
        window, horizon = config["window"], config["horizon"]
        scaled = _scaled(config, data, window + horizon)
        windows = [
            Window(name, end, window) for name, x in scaled.items() for end in range(window, len(x) - horizon + 1)
        ]
        return [_Windows(scaled, [w], horizon)[0] for w in evenly(windows, most)]

    def error(self, answer: Tensor, y: Tensor) -> Tensor:
        return self.loss(answer, y)

    def judge(self, model: SequenceModel) -> Judgement:
        if "test" not in self.parts:
            return {}
        mean, deviation = self.scale.mean[0], self.scale.deviation[0]
        windows = self.parts["test"]
        truth = self._of_each(windows, lambda values, end: values[end : end + self.horizon])
        last = self._of_each(windows, lambda values, end: last_season(values, end, self.horizon))
        change = torch.cat([answer for answer, _ in answers(model, self, "test")]).double().numpy()
        said = {"model": last + change * deviation, "naive": last, "mean": np.full_like(truth, mean)}
        if (season := self.season) is not None:
            said["seasonal naive"] = self._of_each(
                windows, lambda values, end: last_season(values, end, self.horizon, season)
            )
        return {
            name: {"rmse": float(((f - truth) ** 2).mean() ** 0.5), "mae": float(np.abs(f - truth).mean())}
            for name, f in said.items()
        }

    def _of_each(self, windows: list[Window], take: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
        return np.stack([take(self.series.values[w.series][:, 0], w.end) for w in windows])

    def tensors(self) -> Iterable[Tensor]:
        return self._scaled.values()

    def keep(self) -> dict[str, Any]:
        return {
            "channels": self.series.channels,
            "input": to_json(self.scale),
            "horizon": self.horizon,
            "window": self.length,
            "season": self.season,
            "split_rule": "in time, within each series: "
            + ", ".join(f"{100 * share:.0f} % {part}" for part, share in shares("test" in self.parts).items())
            + "; what is forecast lies inside its split",
            "split": {name: len(windows) for name, windows in self.parts.items()},
        }

    @staticmethod
    @torch.no_grad()
    def apply(model: SequenceModel, config: dict[str, Any], data: Series) -> dict[str, list[float]]:
        """Each series → its next `horizon` values after its last step.

        Raises:
            DataError: other channels than in training, or fewer steps than a window.
        """
        scale, window = Scale(**config["input"]["scale"]), config["window"]
        scaled = _scaled(config, data, window)
        model.eval()
        samples = Listed([(x[-window:], torch.tensor(0)) for x in scaled.values()])
        found = [model(x, lengths) for x, lengths, _ in DataLoader(samples, batch_size=256, collate_fn=together)]
        change = torch.cat(found).double() * scale.deviation[0]
        return {name: (values[-1, 0] + change[k]).tolist() for k, (name, values) in enumerate(data.values.items())}


def _scaled(config: dict[str, Any], data: Series, least: int) -> dict[str, Tensor]:
    """Series → its values, scaled as in training.

    Raises:
        DataError: other channels than in training, or fewer than `least` steps.
    """
    if data.channels != config["channels"]:
        raise DataError(f"data: expected the channels {config['channels']}, got {data.channels}")
    for name, values in data.values.items():
        if len(values) < least:
            raise DataError(f"data: series {name!r} has {len(values)} steps; expected at least {least}, a window")
    scale = Scale(**config["input"]["scale"])
    return {name: scale(values) for name, values in data.values.items()}


class _Windows(Dataset):
    """(x `[window, C]`, change of the first channel over the horizon `[H]`)"""

    def __init__(self, scaled: dict[str, Tensor], windows: list[Window], horizon: int) -> None:
        self.scaled, self.windows, self.horizon = scaled, windows, horizon

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        w = self.windows[index]
        values = self.scaled[w.series]
        return values[w.end - w.length : w.end], values[w.end : w.end + self.horizon, 0] - values[w.end - 1, 0]
