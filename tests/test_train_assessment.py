"""A training ends with what it came to, and with the command that follows."""

import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.test_train import call, seasons, write
from unvanish import train
from unvanish.train import Classification, Forecasting, LanguageModel, Sequences, Series, Settings

BUDGET = "so look at the data or the budget"
REACH = "look at the reach first"


def noise(steps: int = 60, samples: int = 120) -> Classification:
    """Labels that have nothing to do with the sequences."""
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(steps, 1)) for _ in range(samples)]
    return Classification(Sequences(x, list("ab" * (samples // 2)), [str(k) for k in range(samples)], ["value"]))


def walk() -> Forecasting:
    """A random walk, of which no forecast is better than the last value."""
    steps = np.random.default_rng(0).normal(size=(400, 1))
    return Forecasting(Series({"": steps.cumsum(0)}, ["value"]))


def texts() -> Classification:
    """Words that have nothing to do with the label, in texts of eight."""
    rng = np.random.default_rng(0)
    x = [" ".join(rng.choice(["red", "blue", "sun", "moon"], size=8)) for _ in range(120)]
    return Classification(Sequences(x, list("ab" * 60), [str(k) for k in range(120)], ["text"]))


def letters() -> LanguageModel:
    return LanguageModel("".join(np.random.default_rng(0).choice(list("abcd"), size=3000)))


@pytest.mark.parametrize(
    ("problem", "settings", "first", "look"),
    [
        (noise, {}, "No better than guessing", f"the gradient reaches all 60 steps, {BUDGET}"),
        (noise, {"cell": "rnn"}, "No better than guessing", REACH),
        (noise, {"cell": "rnn", "read": "mean"}, "No better than guessing", f"reaches all 60 steps, {BUDGET}"),
        (walk, {}, "No better than guessing", f"the gradient reaches all 48 steps, {BUDGET}"),
        (walk, {"cell": "rnn"}, "No better than guessing", REACH),
        (texts, {}, "No better than guessing", f"the gradient reaches all 8 steps, {BUDGET}"),
        (letters, {"batch": 4}, "No better than guessing: nats", f"the gradient reaches all 64 steps, {BUDGET}"),
        (letters, {"batch": 4, "cell": "rnn"}, "No better than guessing: nats", "every step has its own target"),
    ],
)
def test_what_is_said_where_nothing_was_learnt(problem, settings: dict, first: str, look: str) -> None:
    trained = train.train_on(problem(), Settings(hidden=16, epochs=2, **settings), flow_every=None)
    found = trained.config["assessment"]
    assert not found["better"]
    assert found["says"].startswith(first)
    assert look in found["says"]


def test_a_baseline_that_is_better_is_named() -> None:
    problem = Forecasting(seasons(), horizon=1, window=12, season=12)
    problem.judge = lambda model: {"model": {"rmse": 1.0}, "naive": {"rmse": 2.0}, "seasonal naive": {"rmse": 0.5}}
    found = train.train_on(problem, Settings(hidden=16, epochs=10), flow_every=None).config["assessment"]
    assert not found["better"]
    assert found["says"].startswith(
        "Better than a constant answer, but not than the baseline: rmse 1 against 0.5 (seasonal naive)"
    )


def test_a_fault_that_a_test_proves_is_named_before_reach() -> None:
    settings = Settings(hidden=8, epochs=1, cell="lstm", tbptt=20, read="last")
    says = train.train_on(noise(), settings, flow_every=None).config["assessment"]["says"]
    assert "the state is cut from its graph" in says


def test_the_command_that_follows_is_named_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("d.csv"))
    lines = Path("d.csv").read_text().splitlines()
    Path("noise.csv").write_text("\n".join([lines[0], *(f"{line[:-1]}{'abc'[k // 3 % 3]}" for k, line in
                                                         enumerate(lines[1:]))]))  # fmt: skip
    given = ["train", "--target", "y", "--hidden", "16", "--batch", "16", "--flow-every", "0"]
    for file, epochs, says, command in (
        ("d.csv", "10", "Better than guessing: accuracy", "predict"),
        ("noise.csv", "1", "No better than guessing", "diagnose"),
    ):
        assert call([*given, "--data", file, "--epochs", epochs, "--out", f"of-{file}"], monkeypatch) == 0
        *_, said, _, _, follows = capsys.readouterr().out.strip().splitlines()
        assert says in said
        words = shlex.split(follows.removeprefix("Next: "))
        assert words == ["unvanish", command, f"of-{file}", "--data", file]
        assert call([*words[1:], *(["--budget", "0"] if command == "diagnose" else [])], monkeypatch) in (0, 1)
        assert capsys.readouterr().out


@pytest.mark.parametrize("kind", ["forecasting", "language"])
def test_what_was_trained_on_series_or_text_can_be_diagnosed(kind: str) -> None:
    import unvanish as uv

    problem = walk() if kind == "forecasting" else letters()
    data = problem.series if isinstance(problem, Forecasting) else "abcd" * 200
    trained = train.train_on(problem, Settings(hidden=8, epochs=1, batch=4), flow_every=None, assessed=False)
    assert "assessment" not in trained.config
    batch, loss = trained.batch(data, 32)
    found = uv.diagnose(trained.model, *batch, loss=loss, budget=0)
    assert found["recurrent.l0"].lag == (47 if kind == "forecasting" else 63)
    with pytest.raises(ValueError, match="data: expected data, as the model was trained"):
        trained.batch()
