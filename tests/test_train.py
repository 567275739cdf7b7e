"""Training on the user's data: it learns, beats the baselines, keeps its splits apart, and is applied again."""

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unvanish import train
from unvanish.cli import main
from unvanish.train import (
    Classification,
    DataError,
    Forecasting,
    LanguageModel,
    Regression,
    Sequences,
    Series,
    Settings,
)
from unvanish.train.data.sequences import split
from unvanish.train.models import SequenceModel, Shape


def sines(n: int = 120, *, number: bool = False) -> Sequences:
    """Sines of three frequencies and unequal length; the answer is which."""
    rng = np.random.default_rng(0)
    x = []
    for k in range(n):
        t = np.arange(int(rng.integers(12, 21)))
        x.append((np.sin(t * (0.3 + 0.4 * (k % 3)) + rng.normal()) + 0.1 * rng.normal(size=len(t)))[:, None])
    y = [str(k % 3) if number else "abc"[k % 3] for k in range(n)]
    return Sequences(x, y, [f"row {k + 2}" for k in range(n)], ["value"])


def seasons(n: int = 400) -> Series:
    rng = np.random.default_rng(1)
    return Series({"": 3 * np.sin(np.arange(n) * 2 * np.pi / 12)[:, None] + rng.normal(size=(n, 1))}, ["sales"])


TEXT = "the cat sat on the mat. the dog did not. " * 60
PROBLEMS = {
    "classification": lambda: Classification(sines()),
    "regression": lambda: Regression(sines(number=True)),
    "forecasting": lambda: Forecasting(seasons(), horizon=3, window=12, season=12),
    "language": lambda: LanguageModel(TEXT),
}
GIVEN = {"classification": sines(), "regression": sines(), "forecasting": seasons(), "language": "the "}
FIGURE = {"classification": "accuracy", "regression": "mse", "forecasting": "rmse", "language": "nats"}


@pytest.mark.parametrize("kind", list(PROBLEMS))
def test_it_learns_beats_the_baselines_repeats_and_is_applied(tmp_path: Path, kind: str) -> None:
    settings = Settings(hidden=16, epochs=10, batch=4 if kind == "language" else 16, tbptt=16)
    first, again = (train.train_on(PROBLEMS[kind](), settings) for _ in range(2))
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    figures = {who: found[FIGURE[kind]] for who, found in first.config["test"].items()}
    assert len(figures) > 1
    mine = figures.pop("model")
    if kind == "classification":
        assert mine > max(figures.values()) + 0.3
    else:
        assert mine < 0.95 * min(figures.values())
    first.save(tmp_path / "m")
    assert train.Trained.load(tmp_path / "m").predict(GIVEN[kind]) == first.predict(GIVEN[kind])
    assert first.config["assessment"]["better"]
    assert first.config["assessment"]["says"].startswith("Better than guessing: ")


def test_the_test_split_leaves_no_trace_in_the_model() -> None:
    data = sines(number=True)
    held = split(None, len(data), 0)["test"]
    assert data.y is not None
    x = [v * 1000 if i in held else v for i, v in enumerate(data.x)]
    y = ["999" if i in held else label for i, label in enumerate(data.y)]
    settings = Settings(hidden=4, epochs=2)
    plain, other = (train.train_on(Regression(d), settings) for d in (data, replace(data, x=x, y=y)))
    assert plain.config["input"] == other.config["input"]
    assert plain.config["target_scale"] == other.config["target_scale"]
    for a, b in zip(plain.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert plain.config["test"] != other.config["test"]


def test_one_class_and_text_targets_are_refused() -> None:
    data = Sequences([np.ones((1, 1))] * 10, ["x"] * 10, ["row 2"] * 10, ["value"])
    with pytest.raises(DataError, match="every sequence has the class 'x'"):
        Classification(data)
    with pytest.raises(DataError, match="row 2: expected a number, got 'x'"):
        Regression(data)


def test_other_channels_are_refused() -> None:
    trained = train.train_on(Classification(sines()), Settings(hidden=4, epochs=1))
    other = Sequences([np.ones((3, 2))], None, ["a"], ["p", "q"])
    with pytest.raises(DataError, match=r"expected the channels \['value'\], got \['p', 'q'\]"):
        trained.predict(other)


def test_paths_may_be_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("d.csv"))
    problem, data = train.read_problem("d.csv", target="y"), train.read_data("d.csv", "classification", target="y")
    trained = train.train_on(
        problem, Settings(hidden=2, steps=1), out="m", flow_every=None, loggers=train.make_loggers("csv", "m/logs")
    )
    trained.save("n")
    assert train.Trained.load("m").predict(data) == train.Trained.load("n").predict(data)
    assert train.export(trained, "m.pt2", steps=20) < 1e-4


@pytest.mark.parametrize("kind", list(PROBLEMS))
def test_data_of_another_kind_are_refused(kind: str) -> None:
    problem = PROBLEMS[kind]()
    model = problem.begin(Settings(hidden=4, batch=4)).build(9)
    trained = train.Trained(model, {"kind": kind, **problem.keep()})
    for other, data in GIVEN.items():
        if type(data) is not type(GIVEN[kind]):
            with pytest.raises(DataError, match=f"data: expected .* for {kind}, got {type(data).__name__}"):
                trained.predict(GIVEN[other])


@pytest.mark.parametrize("read", ["last", "mean"])
@pytest.mark.parametrize("lengths", [None, [10, 7, 3]])
def test_truncation_stops_the_error_and_not_the_state(read: str, lengths: list[int] | None) -> None:
    torch.manual_seed(0)
    shape = Shape("lstm", 2, 3, 4, read=read)  # type: ignore[arg-type]
    whole, cut = shape.build(10), replace(shape, tbptt=4).build(10)
    cut.load_state_dict(whole.state_dict())
    x, of = torch.randn(3, 10, 2), None if lengths is None else torch.tensor(lengths)
    x.requires_grad_()
    answers = [model(x, of) for model in (whole, cut)]
    torch.testing.assert_close(*answers)
    full, part = (torch.autograd.grad(answer.square().sum(), x)[0] for answer in answers)
    for b, last in enumerate(lengths or [10] * 3):
        begins = (last - 1) // 4 * 4
        torch.testing.assert_close(part[b, begins:], full[b, begins:])
        assert full[b, :last].ne(0).all()
        assert part[b, :begins].ne(0).any() == (read == "mean" and begins > 0)


def test_a_validation_loss_that_is_never_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Classification(sines())
    monkeypatch.setattr(problem, "loss", lambda answer, y: answer.sum() * (1.0 if answer.requires_grad else torch.nan))
    with pytest.raises(ArithmeticError, match="the validation loss was never finite"):
        train.train_on(problem, Settings(hidden=4, epochs=1))
    with pytest.raises(ArithmeticError, match="the validation loss became nan at update 3; try a smaller lr"):
        train.train_on(problem, Settings(hidden=4, epochs=2, patience=0))


def write(path: Path) -> None:
    data = sines()
    assert data.y is not None
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow([*(f"t{t}" for t in range(20)), "y"])
        for x, y in zip(data.x, data.y, strict=True):
            values = [f"{v:.4f}" for v in np.asarray(x)[:, 0]]
            out.writerow([*values, *[""] * (20 - len(values)), y])


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["unvanish", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("d.csv"))
    base = ["train", "--data", "d.csv", "--target", "y", "--epochs", "1", "--hidden", "4"]
    assert call([*base, "--out", "m"], monkeypatch) == 0
    assert "class a: 40 of 120" in capsys.readouterr().out
    page = {"report.html", "report-card.png", "report-card.svg"}
    assert {path.name for path in Path("m").iterdir()} == page | {
        "config.json",
        "model.safetensors",
        "run.json",
        "logs",
    }
    assert json.loads(Path("m/config.json").read_text())["kind"] == "classification"
    assert call(["predict", "m", "--data", "d.csv", "--target", "y"], monkeypatch) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 121
    assert {row[1] for row in rows[1:]} <= set("abc")
    Path("new.csv").write_text(
        "".join(line.rpartition(",")[0] + "\n" for line in Path("d.csv").read_text().splitlines())
    )
    for known in ("d.csv", "new.csv"):  # the answers' column is that of the training, or not there
        assert call(["predict", "m", "--data", known], monkeypatch) == 0
        assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == rows
    for wrong, message in (
        ([*base, "--out", "m"], "--out: m holds a finished training"),
        ([*base, "--out", "d.csv/n"], "--out: d.csv/n"),
        ([*base, "--out", "n", "--kind", "guess"], "--kind: expected"),
        ([*base, "--out", "n", "--missing", "drop"], "missing: expected"),
        ([*base, "--out", "n", "--cell", "nope"], "cell: expected one of rnn"),
        (
            ["predict", ".", "--data", "d.csv", "--target", "y"],
            "model: . has no config.json; name a folder that `unvanish train` finished",
        ),
        (["predict", "gone", "--data", "d.csv"], "model: gone has no config.json; name a folder"),
        (["predict", "m", "--data", "none.csv"], "--data: none.csv can't be read: No such file or directory"),
        (["train", "--data", "d.csv", "--out", "n"], "--target: expected the column of the answers"),
    ):
        assert call(wrong, monkeypatch) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("n").exists()


def test_a_language_model_goes_on_from_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, left = [], []
    step = SequenceModel.step

    def listening(model: SequenceModel, x: Any, lengths: Any = None, state: Any = None) -> Any:
        answer, after = step(model, x, lengths, state)
        if model.training:
            given.append(state)
            left.append(after.detach())
        return answer, after

    monkeypatch.setattr(SequenceModel, "step", listening)
    settings = Settings(cell="gru", hidden=6, steps=3, batch=4, tbptt=16, every=3)
    train.train_on(LanguageModel(TEXT), settings, out=tmp_path / "m")
    assert given[0] is None
    assert all(torch.equal(now, before) for now, before in zip(given[1:3], left, strict=False))
