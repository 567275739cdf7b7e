"""The main job, small: it measures what it says, and its command leaves a whole folder or none."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unvanish import flow, train
from unvanish.cli import main
from unvanish.train.configuration import TrainingConfiguration
from unvanish.train.fit import evaluate, fit
from unvanish.train.gradient_breakdown import break_down, ending_together, steps_holding
from unvanish.train.gradient_reach import measure
from unvanish.train.memory import GATES, estimated
from unvanish.train.models import RECIPES, REMEDIES, recipe
from unvanish.train.records import SCHEMA
from unvanish.train.tasks import make_task
from unvanish.train.tasks.reber import SYMBOLS

SMALL = ["--steps", "3", "--hidden", "4", "--batch", "4", "--seeds", "1"]


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from unvanish.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True, cwd=cwd
    )


def test_measures_the_law_of_an_orthogonal_network() -> None:
    torch.manual_seed(0)
    task = make_task("adding", 30)
    model = recipe("rnn").build(task, 8)
    with torch.no_grad():
        for p in model.recurrent.parameters():
            p.zero_()
        q, _ = torch.linalg.qr(torch.randn(8, 8))
        model.recurrent.weight_hh_l0.copy_(0.5 * q)
    reach = measure(model, task, 0, fraction=0.01)
    assert reach.rate == pytest.approx(math.log(0.5), rel=1e-6)
    assert reach.half_life == pytest.approx(1.0, rel=1e-6)
    assert reach.log_norm == pytest.approx([lag * math.log(0.5) for lag in range(30)], rel=1e-5)
    assert reach.reach == 6


def test_measures_where_the_answers_end() -> None:
    for name, length, end in (("copy", 5, 25), ("embedded-reber", 30, None)):
        task = make_task(name, length)
        x, y = ending_together(task, 32)
        assert len(y) == len(x) > 1
        assert (x.abs().sum(2) > 0).all()
        if end is None:
            assert set(y.tolist()) == {SYMBOLS.index("E")}
        else:
            assert torch.equal(y, task.samples("validation", range(32))[1][:, -1])
        reach = measure(recipe("lstm").build(task, 4), task, 0)
        assert len(reach.log_norm) == x.shape[1] == (end or x.shape[1])
        assert all(map(math.isfinite, reach.log_norm))


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_builds_and_learns_something(name: str) -> None:
    torch.manual_seed(0)
    task = make_task("digits")
    model = recipe(name).build(task, 16)
    before = evaluate(model, task)
    progress = fit(model, task, TrainingConfiguration(40, 32, 1e-2, 1.0, 0))
    assert progress.update[-1] == 40
    assert len(progress.error) == 20
    after = evaluate(model, task)
    assert after < 0.95 or before > after


def test_the_same_seed_gives_the_same_comparison() -> None:
    options = {"steps": 4, "hidden": 4, "batch": 4, "length": 12, "seeds": 2}
    one, two = (train.compare(["adding"], ["rnn", "lstm-chrono"], **options, seed=5) for _ in range(2))
    for a, b in zip(one.tasks[0].runs, two.tasks[0].runs, strict=True):
        assert a.moments == b.moments
        assert [replace(t, seconds=0) for t in a.trials] == [replace(t, seconds=0) for t in b.trials]
    plain, cured = one.tasks[0].runs
    assert tuple(cure.name for cure in plain.cures) == REMEDIES["rnn"]
    assert cured.cures == []
    alone = train.compare(["adding"], ["rnn-orthogonal"], **options, seed=5)
    assert plain.cures[1].reach == alone.tasks[0].runs[0].before
    other = train.compare(["adding"], ["rnn"], **options, seed=6)
    assert other.tasks[0].runs[0].test_error != one.tasks[0].runs[0].test_error
    assert train.Comparison.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_images_keep_their_length_beside_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int | None]] = []
    monkeypatch.setattr(
        sys.modules["unvanish.train.compare"],
        "make_task",
        lambda name, length, seed: seen.append((name, length)) or make_task("adding", 5),
    )
    train.compare(["adding", "digits", "mnist"], ["rnn"], length=12, steps=1, hidden=2, batch=2, seeds=1)
    assert seen == [("adding", 12), ("digits", None), ("mnist", None)]


def test_the_shortest_task_can_be_cured() -> None:
    assert recipe("gru-chrono").build(make_task("copy", 1), 2).recurrent.hidden_size == 2


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="tasks: expected at least one name, got none"):
        train.compare([], ["rnn"])
    with pytest.raises(ValueError, match="cells: expected at least one name, got none"):
        train.compare(["adding"], [])


def test_memory_is_estimated_from_the_weights_up() -> None:
    task = make_task("adding", 30)
    model = recipe("lstm").build(task, 16)
    weights = sum(p.numel() for p in model.parameters())
    assert estimated(task.inputs, 16, task.outputs, 0, 0) == 4 * 4 * weights
    states, _ = model.recurrent(torch.zeros(5, 30, task.inputs))
    kept = states.numel() * (GATES + 1)  # h, and what the kernels keep of gates and c
    assert 1 <= (estimated(task.inputs, 16, task.outputs, 30, 5) - 16 * weights) / (4 * kept) <= 3


def test_an_explosion_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("adding", 10)
    model = recipe("rnn").build(task, 4)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(ArithmeticError, match="the training loss became nan at update 0"):
        fit(model, task, TrainingConfiguration(2, 4, 1e-2, 1.0, 0))


def test_an_explosion_in_a_comparison_names_the_model() -> None:
    options: dict[str, Any] = {"length": 50, "steps": 3, "hidden": 8, "batch": 4, "seeds": 1}
    with pytest.raises(ArithmeticError, match=r"adding, irnn: the loss became (nan|inf) at update 1; try a smaller lr"):
        train.compare(["adding"], ["irnn"], lr=1e10, **options)


def test_command_writes_report_figures_results_and_flows(tmp_path: Path) -> None:
    done = command(
        "compare",
        "--task",
        "adding",
        "--length",
        "12",
        "--cells",
        "rnn,lstm-chrono",
        *SMALL,
        "--out",
        "out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "tanh-RNN" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.html", "results.json", "adding-learning.png", "adding-learning.svg", "adding-rnn.flow"} <= names
    result = train.Comparison.from_json(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert [run.name for run in result.tasks[0].runs] == ["rnn", "lstm-chrono"]
    assert flow.load(tmp_path / "out" / "adding-lstm-chrono.flow")["recurrent.l0"].valid
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = command(
        "compare",
        "--task",
        "adding",
        "--length",
        "12",
        "--cells",
        "rnn",
        *SMALL,
        "--out",
        "out",
        "--json",
        cwd=tmp_path,
    )
    assert json.loads(again.stdout)["tasks"][0]["runs"][0]["name"] == "rnn"
    assert not (tmp_path / "out" / "adding-lstm-chrono.flow").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nope"], "task: expected one of adding, copy"),
        (["--cells", "nope"], "cells: expected one of rnn"),
        (["--cells", ","], "--cells: expected names"),
        (["--length", "1"], "length: expected at least 2"),
        (["--task", "digits", "--length", "65"], "length: an image of digits has 64 pixels"),
        (["--task", "mnist", "--task", "digits", "--length", "65"], "length: an image of mnist has 784 pixels"),
        (["--task", "adding", "--task", "adding"], "tasks: expected each name once, got 'adding' 2 times"),
        (["--cells", "gru,lstm,gru"], "cells: expected each name once, got 'gru' 2 times"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--seed", "9223372036854775808"], "seed: expected 0 or more, and less than 2^63"),
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["--steps", "0"], "steps: expected a positive number"),
        (["--lr", "-1"], "lr: expected a positive number"),
        (["--lr", "nan"], "lr: expected a positive number"),
        (["--hidden", "0"], "hidden: expected at least 1"),
        (["--hidden", "1000000"], "hidden 1000000, batch 32, length 200: needs about"),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["--nonsense"], "No such option"),
        (["--out", "file"], "is a file"),
        (["--out", "mine"], "holds files that are not from an earlier run"),
        (["--out", "file/below"], "can't be written"),
    ],
)
def test_a_wrong_command_is_told_what_is_wrong_and_writes_nothing(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unvanish", "compare", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"file", "mine"}
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def call(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["unvanish", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_report_is_made_again_from_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train.compare(["adding"], ["rnn"], steps=2, hidden=4, batch=4, length=12, seeds=1)
    (tmp_path / "results.json").write_text(json.dumps(result.to_json()))
    assert call(["report", str(tmp_path)], monkeypatch) == 0
    assert (tmp_path / "report.html").stat().st_size > 1e5
    assert (tmp_path / "adding-learning.png").exists()
    for content, message in (
        ("{", "not JSON"),
        ('{"schema": 99}', f"expected schema {SCHEMA}"),
        ("[]", f"expected schema {SCHEMA}"),
    ):
        (tmp_path / "results.json").write_text(content)
        assert call(["report", str(tmp_path)], monkeypatch) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    (tmp_path / "odd" / "results.json").mkdir(parents=True)
    for folder, message in (
        ("none", "FOLDER: {} has no results.json; name a folder that `unvanish compare` wrote"),
        ("results.json", "FOLDER: {} has no results.json; name a folder that `unvanish compare` wrote"),
        ("odd", "FOLDER: {}/results.json can't be read: Is a directory"),
    ):
        assert call(["report", str(tmp_path / folder)], monkeypatch) == 2
        assert message.format(tmp_path / folder) in " ".join(capsys.readouterr().err.split())


def test_what_a_run_measures() -> None:
    said: list[str] = []
    options: dict[str, Any] = {"length": 30, "steps": 40, "hidden": 8, "batch": 8}
    result = train.compare(["adding"], ["rnn", "lstm", "janet"], seeds=2, say=said.append, **options)
    task = result.tasks[0]
    rnn, lstm, janet = task.runs
    for run in task.runs:
        assert [trial.seed for trial in run.trials] == [0, 1]
        assert run.trials[0].curve_error != run.trials[1].curve_error
        assert [moment.update for moment in run.moments] == list(range(0, 41, 2))
        assert run.trials[0].reach == [run.moments[0].reach, run.moments[-1].reach]
    assert rnn.rescue is None
    assert lstm.rescue is not None
    assert lstm.rescue.survival < lstm.rescue.target
    assert lstm.rescue.reach.reach > lstm.before.reach
    assert all(b >= a for a, b in zip(lstm.rescue.before, lstm.rescue.after, strict=True))
    assert janet.rescue is not None
    biases = [found.bias for found in task.forget_bias]
    assert biases == sorted(biases)
    reaches = [found.reach.reach for found in task.forget_bias]
    assert reaches[0] < reaches[-1] == 29
    assert {"adding lstm: training 2 of 2, seed 1", "adding lstm: cures and rescue, before any training"} <= set(said)


def test_paths_keep_what_their_terms_keep() -> None:
    """With W_h = 0 only the carry brings anything back: σ(b_f) per step."""
    task = make_task("adding", 20)
    model = recipe("lstm").build(task, 4)
    with torch.no_grad():
        for p in model.recurrent.parameters():
            p.zero_()
    found = break_down(model, task, 0, 8)
    carry = found.kept["B · carry, diag(f)"]
    assert carry[:17] == pytest.approx([math.log(0.5)] * 17, rel=1e-4)
    assert carry[-2:] == [None, None]
    assert found.kept_in_all[:17] == pytest.approx([math.log(0.5)] * 17, rel=1e-4)
    assert all(v is None for v in found.kept["O · through the output gate's weights"])


def test_the_steps_that_hold_a_share_are_counted_from_the_end() -> None:
    halves = torch.tensor([0.125, 0.125, 0.25, 0.5], dtype=torch.float64)
    assert [steps_holding(halves, share) for share in (0.5, 0.51, 0.75, 0.99)] == [1, 2, 2, 4]
    assert steps_holding(torch.zeros(3, dtype=torch.float64), 0.99) == 0
