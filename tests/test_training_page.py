"""The page that a training ends with: the reach before and after, and what the same training's records say."""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

import unvanish as uv
from tests.test_pages import HOSTILE, LONG, Last, layer, words
from tests.test_train_assessment import noise
from unvanish import train
from unvanish.diagnosis import Diagnosis
from unvanish.diagnosis.finding import Finding
from unvanish.draw.preview import preview_files
from unvanish.train import Classification, Sequences, Settings
from unvanish.train.assessment import examine
from unvanish.train.run_folder import RunFolder
from unvanish.train.training_page import reaches, training_page, training_preview


def config(**other: Any) -> dict[str, Any]:
    """As `train_on` makes it, of a training that found something."""
    return {
        "kind": "task",
        "task": {"name": "adding", "length": 60, "seed": 0},
        "shape": {"cell": "lstm"},
        "validation": {"metric": "mean squared error", "update": [10, 20, 30], "error": [0.5, 0.02, 0.03]},
        "test": {"model": {"mean squared error": 0.025}, "chance": {"mean squared error": 0.167}},
        "assessment": {
            "better": True,
            "says": "Better than guessing: mean squared error 0.025 against 0.167 (chance).",
        },
    } | other


@pytest.fixture(scope="module")
def was() -> Diagnosis:
    torch.manual_seed(0)
    found = uv.diagnose(Last(), torch.randn(8, 40, 2), torch.randn(8, 1), loss=mse_loss, budget=0)
    return replace(found, layers={"recurrent.l0": layer("recurrent.l0", 9)})


@pytest.fixture(scope="module")
def now(was: Diagnosis) -> Diagnosis:
    return replace(was, layers={"recurrent.l0": layer("recurrent.l0", 59, verdict="healthy")})


def test_a_training_leaves_a_page_that_agrees_with_its_records(tmp_path: Path) -> None:
    problem, settings = noise(), Settings(hidden=16, epochs=2, cell="rnn", seed=3)
    trained = train.train_on(problem, settings, out=tmp_path / "m", flow_every=None)
    torch.manual_seed(settings.seed)
    fresh = problem.begin(settings).build(problem.length)
    was, now = (examine(problem, model, settings.seed) for model in (fresh, trained.model))
    reach = trained.config["reach"]["recurrent.l0"]
    assert reach["reach"] == [was["recurrent.l0"].reach, now["recurrent.l0"].reach]
    assert reach["half_life"][0] != reach["half_life"][1]
    page = (tmp_path / "m" / "report.html").read_text("utf-8")
    assert "reach {} → {} of 59 steps".format(*reach["reach"]) in page
    first, where_to_look = trained.config["assessment"]["says"].split("; ", 1)
    assert f"<h1>{first}.</h1>" in page
    assert where_to_look[1:] in words(page)
    card = training_preview(trained.config, was, now)
    assert card.result == "reach {} → {}".format(*reach["reach"])
    png, svg = ((tmp_path / "m" / f"report-card.{kind}").read_bytes() for kind in ("png", "svg"))
    assert (png, svg) == preview_files(card)
    assert train.Trained.load(tmp_path / "m").config["reach"] == trained.config["reach"]


def test_a_training_that_is_not_judged_has_no_page(tmp_path: Path) -> None:
    settings = Settings(hidden=4, epochs=1)
    trained = train.train_on(noise(), settings, out=tmp_path / "m", flow_every=None, assessed=False)
    assert "reach" not in trained.config
    assert not (tmp_path / "m" / "report.html").exists()


def test_a_page_that_fails_does_not_cost_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("unvanish.train.learn.examine", out_of_memory)
    with pytest.warns(UserWarning, match="MemoryError: no room"):
        trained = train.train_on(noise(), Settings(hidden=4, epochs=1), out=tmp_path / "m", flow_every=None)
    assert "assessment" not in trained.config
    assert train.Trained.load(tmp_path / "m").config["test"] == trained.config["test"]
    assert not (tmp_path / "m" / "report.html").exists()


def test_what_a_kill_left_of_a_page_is_removed(tmp_path: Path) -> None:
    run = {"kind": "task"}
    RunFolder(tmp_path, run, resume=False)
    for name in (".report.html.x1", ".report-card.png.x2", ".report-card.svg.x3"):
        (tmp_path / name).write_bytes(b"half")
    RunFolder(tmp_path, run, resume=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_before_and_after_stand_on_the_page(was: Diagnosis, now: Diagnosis) -> None:
    fault = Finding("padding_read", "warning", "head", "The answer reads padding.", "1 of 2 moved.", "Pass lengths.")
    page = training_page(config(), was, replace(now, findings=(fault,)))
    said = words(page)
    assert "LSTM trained on: Adding problem, 60 steps · better than guessing" in said
    assert "healthy, reach 9 → 59 of 59 steps" in said
    assert "no fault found padding_read" in said
    assert "warning: padding_read" in said
    assert "The answer reads padding." in said
    assert "0.5 after 10 updates 0.03 after 30 updates" in said
    assert "lowest 0.02, after 20 updates" in said
    assert "unvanish diagnose FOLDER --out diagnosis.html" in said
    worse = {"better": False, "says": "No better than guessing: accuracy 0.5; look at the data."}
    for other, command in (
        ({"kind": "regression", "assessment": worse}, "unvanish diagnose FOLDER --data FILE --out diagnosis.html"),
        ({"kind": "regression"}, "unvanish predict FOLDER --data FILE"),
        ({"kind": "language"}, "unvanish predict FOLDER --prompt TEXT"),
    ):
        assert command in words(training_page(config(**other), was, now))
    healthy = training_page(config(), was, now)
    assert 'class="card good"' in healthy
    assert "No exact test found a fault in the trained model." in healthy
    assert "not proved" not in healthy
    assert 'class="card good"' not in training_page(config(assessment=worse), was, now)
    assert training_preview(config(), was, now).result == "reach 9 → 59"
    assert reaches(was, now) == {"recurrent.l0": {"lag": 59, "reach": [9, 59], "half_life": [1.5, 1.5]}}


@pytest.mark.parametrize(
    ("errors", "drawn"),
    [([0.5], False), ([0.5, 0.5], True), ([0.0, 0.0], False), ([1e-9, 5.0], True), ([math.nan, 0.2], False),
     ([math.nan, 0.2, 0.1], True), ([1.0, 0.0, 1.0], True), ([math.inf, 2.0, 3.0], True)],
)  # fmt: skip
def test_any_course_of_the_error_can_be_drawn(was: Diagnosis, now: Diagnosis, errors: list, drawn: bool) -> None:
    validation = {"metric": "error rate", "update": list(range(1, len(errors) + 1)), "error": errors}
    for test in ({}, {"model": {"accuracy": 1.0}, "majority class, a": {"accuracy": 0.5}}, config()["test"]):
        page = training_page(config(validation=validation, test=test), was, now)
        assert ('id="learning"' in page) == drawn
        assert not re.findall(r'points="[^"]*(?:nan|inf)', page)
        assert ('id="test"' in page) == bool(test)


def test_names_from_data_are_text(was: Diagnosis, now: Diagnosis) -> None:
    test = {"model": {"accuracy": 0.5}, f"majority class, {HOSTILE}": {"accuracy": 0.5}}
    says = f"No better than guessing: accuracy 0.5 against 0.5 (majority class, {HOSTILE}); look at the data."
    found = config(kind="classification", test=test, assessment={"better": False, "says": says})
    page = training_page(found, was, now)
    assert "<script" not in page
    assert "majority class, &lt;script&gt;" in page


@pytest.mark.browser
@pytest.mark.parametrize("width", [1100, 420])
def test_in_a_browser(browser: Any, was: Diagnosis, now: Diagnosis, tmp_path: Path, width: int) -> None:
    found = copy.deepcopy(config())
    found["test"][f"majority class, {LONG}"] = {"accuracy": 0.5}
    (tmp_path / "report.html").write_text(training_page(found, was, now), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 900})
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("svg[role=img]").count() == 2
    page.locator("#next pre").click()
    assert page.evaluate("getSelection().toString().trim()") == "unvanish diagnose FOLDER --out diagnosis.html"
    assert said == []
    context.close()


def test_changes_are_tried_on_copies_where_the_training_came_to_nothing(tmp_path: Path) -> None:
    """A rate far too small: the plan of a diagnosis makes the loss fall, and stands on the page with its code."""
    settings = Settings(cell="gru", hidden=16, epochs=1, lr=1e-7, seed=1)
    trained = train.train_on(tone(), settings, out=tmp_path / "m", flow_every=None, budget=10.0)
    assert not trained.config["assessment"]["better"]
    assert "optimizer" in trained.config["plan"]
    page = (tmp_path / "m" / "report.html").read_text("utf-8")
    assert 'id="plan"' in page
    assert "learning_rate" in page
    assert "look at the reach" not in page
    assert train.Trained.load(tmp_path / "m").config["plan"] == trained.config["plan"]
    better = train.train_on(tone(), replace(settings, lr=1e-2, epochs=20), flow_every=None, budget=10.0)
    assert better.config["assessment"]["better"]
    assert "plan" not in better.config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": -1.0}, "0 or more"),
        ({"budget": math.nan}, "finite"),
        ({"budget": 1.0, "assessed": False}, "assessed"),
    ],
)
def test_a_budget_that_can_not_be_used_is_an_error(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        train.train_on(noise(), Settings(hidden=4, epochs=1), flow_every=None, **options)


def tone() -> Classification:
    """Slow or fast oscillations."""
    rng = np.random.default_rng(0)
    labels = list("ab" * 100)
    x = [np.sin(np.arange(20) * (0.3 if k == "a" else 1.2) + rng.uniform(0, 6))[:, None] for k in labels]
    return Classification(Sequences(x, labels, [str(k) for k in range(200)], ["value"]))
