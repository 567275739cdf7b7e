"""Splits, scales, windows and vocabularies: nothing of what is held back reaches the training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unvanish.train.data.layouts import series
from unvanish.train.data.sequences import Scale, split
from unvanish.train.data.series import Series, last_season, split_in_time, training_steps
from unvanish.train.data.table import DataError, read_table
from unvanish.train.data.vocabulary import Vocabulary


@given(st.lists(st.sampled_from("abc"), min_size=9, max_size=60), st.integers(0, 5), st.booleans())
def test_a_split_holds_each_sequence_once_and_each_class(y: list[str], seed: int, test: bool) -> None:
    parts = split(y, len(y), seed, test=test)
    assert sorted(i for part in parts.values() for i in part) == list(range(len(y)))
    assert ("test" in parts) == test
    assert parts == split(y, len(y), seed, test=test)
    for label in set(y):
        if y.count(label) >= 3:
            assert all(any(y[i] == label for i in part) for part in parts.values())


def test_a_split_is_seven_to_one_and_a_half_and_never_empty() -> None:
    assert {name: len(part) for name, part in split(None, 1000, 0).items()} == {
        "train": 700,
        "validation": 150,
        "test": 150,
    }
    assert split(None, 1000, 0) != split(None, 1000, 1)
    with pytest.raises(DataError, match="2 sequences leave the validation split empty"):
        split(None, 2, 0)


def test_missing_is_the_mean_and_the_scale_is_of_the_known() -> None:
    scale = Scale.of([np.array([[1.0, 5.0], [np.nan, 5.0], [3.0, 5.0]])])
    assert scale(np.array([[2.0, 5.0], [np.nan, 6.0], [3.0, 4.0]])).tolist() == [[0, 0], [0, 1], [1, -1]]


def test_the_rounding_of_a_constant_is_not_blown_up() -> None:
    scale = Scale.of([np.full((7, 1), 0.1)])
    assert abs(float(scale(np.array([[0.2]])))) < 1
    with pytest.raises(DataError, match="too large to be scaled"):
        Scale.of([np.array([[1e300], [-1e300]])])
    with pytest.raises(DataError, match="deviations from the mean"):
        Scale.of([np.array([[1.0], [2.0]])])(np.array([[1e40]]))


def test_series_stand_apart_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("shop,day,sold,rain\np,2026-01-30,1,0\nq,2026-01-30,5,\np,2026-02-01,2,1\nq,2026-02-01,6,3\n")
    found = series(read_table(path), target="sold", id="shop", time="day", missing="mean")
    assert found.channels == ["sold", "rain"]
    np.testing.assert_array_equal(found.values["p"], [[1, 0], [2, 1]])
    np.testing.assert_array_equal(found.values["q"], [[5, np.nan], [6, 3]])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("t,v\n1,2\n1,3\n", {"time": "t"}, "row 3, column 't': expected a later time"),
        ("t,v\n2026-01-02,2\n2026-01-01,3\n", {"time": "t"}, "row 3, column 't': expected a later time"),
        ("t,v\n2026-01-02,2\nsoon,3\n", {"time": "t"}, "row 3, column 't': expected times"),
        ("t,v\n2026-01-32,2\n", {"time": "t"}, "row 2, column 't': expected times"),
        ("t,v\n,2\n", {"time": "t"}, "row 2, column 't': the time is missing"),
        ("t,v\n1,2\n2,\n", {"time": "t"}, "row 3, column 'v': the value is missing"),
        ("v\n2\n\n", {"missing": "mean", "time": "v"}, "row 1: --target 'v', --time 'v' must be different columns"),
        (
            "t,v\n1,2\n2,\n",
            {"missing": "mean"},
            "row 3, column 'v': the value to forecast is missing; fill it in, or choose",
        ),
        (
            "t,v\n1,\n2,1\n",
            {"missing": "previous"},
            "row 2, column 'v': the value to forecast is missing; fill it in: no",
        ),
    ],
)
def test_a_wrong_series_is_refused_by_row_and_column(
    tmp_path: Path, content: str, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "d.csv"
    path.write_text(content)
    with pytest.raises(DataError) as said:
        series(read_table(path), target="v", **options)
    assert str(path) in str(said.value)
    assert message in str(said.value)


@given(st.lists(st.integers(60, 90), min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 20))
def test_what_a_split_forecasts_lies_inside_it(lengths: list[int], horizon: int, window: int) -> None:
    data = Series({f"s{k}": np.zeros((n, 1)) for k, n in enumerate(lengths)}, ["v"])
    parts = split_in_time(data, horizon, window)
    for name, values in data.values.items():
        told = {
            part: {step for w in windows if w.series == name for step in range(w.end, w.end + horizon)}
            for part, windows in parts.items()
        }
        train = len(training_steps(values))
        assert max(told["train"]) < train <= min(told["validation"])
        assert max(told["validation"]) < min(told["test"])
        assert max(told["test"]) == len(values) - 1
        assert all(w.end >= window for w in parts["train"])


def test_a_series_that_is_too_short_is_refused() -> None:
    with pytest.raises(DataError, match="series 's' has 30 steps, of which 4 fall to the test split"):
        split_in_time(Series({"s": np.zeros((30, 1))}, ["v"]), 5, 10)


def test_the_seasonal_naive_forecast_repeats_the_last_known_season() -> None:
    values = np.arange(10.0)
    assert last_season(values, 6, 5, 3).tolist() == [3, 4, 5, 3, 4]
    assert last_season(values, 6, 3).tolist() == [5, 5, 5]
    assert last_season(values, 10, 2, 10).tolist() == [0, 1]
    with pytest.raises(ValueError, match="season: expected 1 to 6, the steps that are known, got 7"):
        last_season(values, 6, 5, 7)


def test_a_vocabulary_of_words() -> None:
    words = Vocabulary.of(["It's GOOD , good film", "a film it is"], "word")
    again = Vocabulary.from_json(words.to_json())
    assert words("Film GOOD, it!").tolist() == again("film good it".replace(" it", ", it!")).tolist()
    assert len(words) == len(again) == 4  # film, good and it stand there twice, the rest is unknown
    assert words("unheard").tolist() == [0]
    assert words(" ").tolist() == [0]
    with pytest.raises(ValueError, match="vocabulary: no tokenizer"):
        Vocabulary.from_json({"so": "not"})


@given(st.text(min_size=1, max_size=40))
def test_a_vocabulary_of_characters_loses_none(text: str) -> None:
    characters = Vocabulary.of([text], "character")
    ids = characters(text)
    assert len(ids) == len(text)
    assert (ids > 0).all()
    assert Vocabulary.from_json(characters.to_json()).write(ids.tolist()) == text
    assert torch.equal(Vocabulary.of([text], "character")(text), ids)
