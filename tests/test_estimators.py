"""The estimators keep scikit-learn's rules, take sequences in every form, and learn."""

import pickle
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from unvanish.train.data.sequences import Sequences
from unvanish.train.estimators import Forecaster, SequenceClassifier, SequenceRegressor
from unvanish.train.settings import Settings
from unvanish.train.trained import Trained

SMALL: dict[str, Any] = {"hidden": 8, "epochs": 3}
ANY_LENGTH = "sequences may have another number of steps than those of the training"


@pytest.mark.parametrize("kind", [SequenceClassifier, SequenceRegressor])
def test_scikit_learns_own_checks(kind: Any) -> None:
    train = "check_classifiers_train" if kind is SequenceClassifier else "check_regressors_train"
    failing = ("check_n_features_in", "check_n_features_in_after_fitting", train)
    found = check_estimator(
        kind(hidden=8, epochs=2, batch=64),
        expected_failed_checks=dict.fromkeys(failing, ANY_LENGTH),
        on_skip=None,
    )
    assert sum(check["status"] == "passed" for check in found) > 30


@pytest.mark.parametrize("kind", [SequenceClassifier, SequenceRegressor, Forecaster])
def test_every_parameter_is_a_setting_or_known_apart(kind: Any) -> None:
    chosen, settings = kind().get_params(), {field.name: field.default for field in fields(Settings)}
    apart = {"missing", "random_state"} | ({"horizon", "window", "season"} if kind is Forecaster else set())
    assert chosen.keys() - settings.keys() == apart
    assert settings.keys() - chosen.keys() == {"every", "clip_recurrence", "tbptt", "checkpoint_every", "seed"}
    assert all(chosen[name] == settings[name] for name in chosen.keys() - apart)
    documented = set(re.findall(r"\w+", (kind if kind is Forecaster else SequenceClassifier).__doc__))
    assert chosen.keys() <= documented


def sines(n: int = 90, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Sines of three frequencies, unequal length and two channels; which?"""
    rng = np.random.default_rng(seed)
    kinds = np.arange(n) % 3
    x = [
        np.sin(np.arange(rng.integers(12, 21)) * (0.3 + 0.4 * k) + rng.normal())[:, None] * [1, 100] + [0, 1e3]
        for k in kinds
    ]
    return x, kinds


def test_it_learns_from_unequal_lengths_repeats_and_can_be_kept(tmp_path: Path) -> None:
    x, kinds = sines()
    names = np.array(["low", "mid", "high"])[kinds]
    model = SequenceClassifier(hidden=16, epochs=20).fit(x, names)
    other, truth = sines(seed=1)
    assert model.score(other, np.array(["low", "mid", "high"])[truth]) > 0.9
    assert model.classes_.tolist() == ["high", "low", "mid"]
    share = model.predict_proba(other)
    assert share.shape == (90, 3)
    np.testing.assert_allclose(share.sum(1), 1)
    assert (model.classes_[share.argmax(1)] == model.predict(other)).all()
    for again in (clone(model).fit(x, names), pickle.loads(pickle.dumps(model))):
        assert (again.predict_proba(other) == share).all()
    assert (SequenceClassifier(hidden=16, epochs=20, random_state=1).fit(x, names).predict_proba(other) != share).any()
    model.trained_.save(tmp_path / "m")
    told = Trained.load(tmp_path / "m").predict(Sequences(list(other), None, [], ["channel 1", "channel 2"]))
    assert [model.classes_[int(label)] for label in told] == model.predict(other).tolist()


def test_a_regression_scores_by_its_variance() -> None:
    x, kinds = sines()
    model = SequenceRegressor(hidden=16, epochs=20).fit(x, 1e3 + kinds)
    other, truth = sines(seed=1)
    assert model.score(other, 1e3 + truth) > 0.8
    assert 999 < model.predict(other).mean() < 1003


def test_the_forms_of_a_sequence_say_the_same() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)), np.arange(12) % 2
    forms = [x, x[..., None], list(x), list(x[..., None]), x.tolist()]
    found = [SequenceClassifier(**SMALL).fit(form, y).predict_proba(form) for form in forms]
    assert all((share == found[0]).all() for share in found)


def test_texts_are_sequences_too() -> None:
    texts = ["so good a film", "a bad bad film", "good , good", "what a bad one"] * 10
    y = ["+", "-", "+", "-"] * 10
    model = SequenceClassifier(hidden=8, epochs=10).fit(texts, y)
    assert model.score(np.array(texts, dtype=object), y) == 1
    with pytest.raises(ValueError, match="trained on texts"):
        model.predict(np.zeros((2, 3)))


def test_it_goes_into_a_pipeline_a_search_and_a_cross_validation() -> None:
    x, y = sines(60)
    last = FunctionTransformer(lambda X: np.stack([v[-12:, 0] for v in X]))
    pipeline = make_pipeline(last, StandardScaler(), SequenceClassifier(**SMALL))
    assert cross_val_score(pipeline, x, y, cv=2).shape == (2,)
    search = GridSearchCV(SequenceClassifier(epochs=2), {"hidden": [2, 4]}, cv=2, error_score="raise").fit(x, y)
    assert search.best_params_["hidden"] in (2, 4)
    assert SequenceClassifier(hidden=3).set_params(lr=0.1, cell="gru").get_params()["lr"] == 0.1


def wave(n: int = 240) -> np.ndarray:
    t = np.arange(n)
    return 50 + 10 * np.sin(t * 2 * np.pi / 12.5) + np.random.default_rng(0).normal(size=n)


def test_a_forecaster_beats_the_naive_and_forecasts_past_the_end() -> None:
    values = wave()
    model = Forecaster(horizon=3, window=25, season=12, hidden=16, epochs=15).fit(values[:180])
    said, truth, naive = model.backtest(values[155:])
    assert said.shape == truth.shape == naive.shape == (85 - 25 - 3 + 1, 3)
    assert (truth[:, 0] == values[180:238]).all()
    assert (naive[0] == values[168:171]).all()
    np.testing.assert_allclose(said[7], model.predict(values[: 180 + 7]), rtol=1e-6)
    score = model.score(values[155:])
    assert score == pytest.approx(1 - ((said - truth) ** 2).sum() / ((naive - truth) ** 2).sum())
    assert score > 0.3
    assert (pickle.loads(pickle.dumps(clone(model).fit(values[:180]))).predict(values) == model.predict(values)).all()


def test_a_forecaster_looks_at_nothing_that_is_held_back() -> None:
    values = wave()
    other = values.copy()
    other[204:] *= 100
    plain, changed = (Forecaster(window=10, hidden=4, steps=20, patience=0).fit(v) for v in (values, other))
    assert plain.trained_.config["input"] == changed.trained_.config["input"]
    assert (plain.predict(values) == changed.predict(values)).all()
    other[203] *= 100
    assert (
        Forecaster(window=10, hidden=4, steps=20).fit(other).trained_.config["input"] != plain.trained_.config["input"]
    )


def test_a_forecaster_takes_channels_several_series_and_a_cross_validation() -> None:
    two = np.stack([wave(), np.arange(240.0)], axis=1)
    model = Forecaster(horizon=2, window=8, hidden=4, epochs=1).fit([two, two[:120]])
    assert model.predict(two).shape == (2,)
    assert model.predict([two, two[:50]]).shape == (2, 2)
    assert cross_val_score(Forecaster(window=8, hidden=4, epochs=1), two, cv=TimeSeriesSplit(3)).shape == (3,)


NAN = np.array([[1.0, np.nan, 3.0], [1, 2, 3]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SequenceClassifier().fit(NAN, [0, 1]),
            r"X\[0\], step 1, channel 0: NaN.*missing=mean or missing=prev",
        ),
        (lambda: SequenceClassifier().fit([[1.0], [np.inf]], [0, 1]), r"X\[1\], step 0, channel 0: expected a finite"),
        (lambda: SequenceClassifier(missing="drop").fit(NAN, [0, 1]), "missing: expected one of"),
        (lambda: SequenceClassifier().fit([[1.0], [2.0]], [0, 0]), "y: expected two classes or more, got one class, 0"),
        (
            lambda: SequenceClassifier().fit([[1.0], [2.0]], [0]),
            "y: expected a target for each of the 2 sequences, got 1",
        ),
        (
            lambda: SequenceClassifier().fit([[[1.0, 2.0]], [[2.0]]], [0, 1]),
            r"X\[1\]: expected 2 channels as in X\[0\]",
        ),
        (lambda: SequenceClassifier().fit(np.zeros((2, 2, 2, 2)), [0, 1]), "an array of 4 dimensions"),
        (lambda: SequenceClassifier(cell="nope").fit(np.eye(20), [0, 1] * 10), "cell: expected one of rnn"),
        (lambda: SequenceClassifier(read="all").fit(np.eye(20), [0, 1] * 10), "read: expected last or mean"),
        (lambda: SequenceRegressor().fit(np.eye(20), ["a", "b"] * 10), "could not convert string"),
        (lambda: SequenceRegressor().fit(np.eye(20), [1.0, np.nan] * 10), r"y\[1\]: expected no NaN"),
        (lambda: SequenceRegressor().fit(np.eye(20), [1.0, 1e200] * 10), r"y\[1\]: expected a magnitude below 1e\+150"),
        (lambda: Forecaster().fit(wave(), wave()), "y: expected None"),
        (lambda: Forecaster().fit(wave(40)), "too few for a window of 48"),
        (
            lambda: Forecaster(missing="mean").fit([1.0, np.nan] * 50),
            r"X\[0\], step 1: the value to forecast is missing",
        ),
        (lambda: Forecaster(season=99).fit(wave()), "season: expected at most the window"),
        (lambda: Forecaster().predict(wave()), "not fitted"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
