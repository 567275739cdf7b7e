"""The report is true in words, safe with hostile names, and alive in a browser."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

import unvanish as uv
from tests.report_records import HOSTILE, comparison, reach, run, trial, two_tasks
from unvanish import report
from unvanish.draw import LINES
from unvanish.report import story, wording
from unvanish.report.html import LIFT, lighter
from unvanish.report.still_picture import still
from unvanish.train.records import Comparison, wilson


def test_verdicts_say_what_the_records_say() -> None:
    both = comparison(run("RNN", -0.5, 0.167), run("cured", -0.001, 0.001)).tasks[0]
    assert wording.survival(both).endswith("RNN: 10⁻⁴³; cured: 0.82.")
    shorter = replace(both, length=999)  # the samples that were measured may end before
    assert "199 steps earlier" in wording.survival(shorter)
    assert "over 199 steps" in wording.explanation(shorter)
    assert wording.learning(both) == "After 100 updates cured solves the task, RNN stays at chance."
    assert wording.explanation(both) == "At the start the gradient of RNN vanishes over 199 steps."
    nobody = comparison(run("A", -0.5, 0.05), run("B", 0.0, 0.167)).tasks[0]
    assert wording.learning(nobody) == "After 100 updates A learns part of it, B stays at chance."
    assert "B did not solve it although the gradient reaches" in wording.explanation(nobody)
    first, second = wording.advice(nobody)
    assert first.startswith("No model solved it")
    assert (
        '`layer = unvanish.cures.replace_(layer, "lstm")`, and call `unvanish.cures.chrono_(layer, max_lag=200)`'
        in second
    )
    assert second.endswith("reaches the first step rises from 10⁻⁴³ to 0.82.")
    lucky = comparison(run("A", -0.5, 0.001, after=0.0)).tasks[0]
    assert "Still A (reach 9 → 199 steps) solves the task" in wording.explanation(lucky)
    assert wording.explanation(comparison(run("A", 0.0, 0.1)).tasks[0]).startswith("No model's gradient vanishes")
    wild = comparison(run("A", 0.1, 0.167), run("B", -0.5, 0.167)).tasks[0]
    assert wording.explanation(wild) == (
        "At the start the gradient of B vanishes over 199 steps. "
        "At the start the gradient of A explodes over 199 steps."
    )
    assert wording.explanation(replace(wild, runs=wild.runs[:1])).endswith("gradient of A explodes over 199 steps.")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "1"), (-1.0, "0.37"), (-1000.0, "10⁻⁴³⁴"), (50.0, "10²²"), (-math.inf, "exactly 0")]
)
def test_factors_in_words(value: float, text: str) -> None:
    assert wording.power_of_ten(value) == text


def test_fate_does_not_depend_on_scale_and_knows_explosions() -> None:
    assert [wording.fate(reach(s)) for s in (-0.1, 0.1)] == ["vanishes", "explodes"]
    assert {wording.fate(reach(s)) for s in (-0.02, 0.0, 0.02)} == {"survives"}


@pytest.mark.parametrize("width", [80, 60, 50])
@pytest.mark.parametrize("name", HOSTILE)
def test_tables_fit_the_terminal_and_cut_no_number(name: str, width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print_comparison(comparison(run(name, -0.5, 0.000123, after=-0.001)), console)
    said = console.export_text()
    assert max(map(cell_len, said.splitlines())) <= width
    assert "0.000123" in said
    assert "9 → 199" in said
    assert ("-0.500" in said) is (width == 80)


def test_figures_are_written(tmp_path: Path) -> None:
    record = comparison(run("RNN", -0.5, 0.167), run(HOSTILE[0], 0.0, 0.001))
    dead = replace(record.tasks[0].runs[0].before, log_norm=[0.0] + [-math.inf] * 199)
    record.tasks[0].runs[0] = replace(record.tasks[0].runs[0], moments=[dead, dead])
    written = report.save_figures(record, str(tmp_path))
    assert len(written) == 8  # both runs have one name, so one file of cures
    assert all(path.stat().st_size > 5000 for path in written)


def test_plots_take_and_return_axes() -> None:
    lstm = nn.LSTM(2, 3)
    with uv.watch(lstm) as flow:
        lstm(torch.randn(5, 2, 2))[0][-1].sum().backward()
    ax = flow.plot()
    assert len(ax.lines) == 3, "h, c and 1 % of the largest"
    expected = flow["l0"].dh.quantile(0.5, dim=1)
    assert ax.lines[0].get_ydata() == pytest.approx(expected.tolist())
    assert uv.plot.flow(flow["l0"], ax) is ax
    assert len(ax.lines) == 6


def test_names_that_would_leave_the_folder_are_refused() -> None:
    data = comparison(run("plain", -0.1, 0.1)).to_json()
    data["tasks"][0]["name"] = "../../x"
    with pytest.raises(ValueError, match=r"got '\.\./\.\./x'"):
        Comparison.from_json(data)


def test_titles_are_no_formulas(tmp_path: Path) -> None:
    found = comparison(run("$\\frac{1}$", -0.1, 0.1), run("_hidden", -0.2, 0.1))
    assert len(report.save_figures(found, tmp_path)) == 8
    ax = uv.plot.learning(found.tasks[0])
    ax.figure.canvas.draw()
    assert any("hidden" in text.get_text() for text in ax.texts)


def test_an_error_of_zero_stays_in_the_picture() -> None:
    for last, scale in ((0.0, "linear"), (0.02, "log"), (0.001, "log")):
        task = comparison(run("A", -0.1, last)).tasks[0]
        assert uv.plot.learning(task).get_yscale() == scale
    rates = replace(task, chance=0.9, solved_below=0.2, runs=[run("A", -0.1, 0.15)])
    ax = uv.plot.learning(rates)
    assert ax.get_yscale() == "linear"
    assert ax.get_ylim()[0] == 0


def test_code_in_advice_is_code_and_nothing_else(tmp_path: Path) -> None:
    hostile = comparison(run("`<script>x</script>`", -0.5, 0.167))
    report.write_comparison(hostile, str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<code>unvanish.cures.chrono_(layer, max_lag=200)</code>" in page
    assert "<code>&lt;script&gt;x&lt;/script&gt;</code>" in page
    assert "<script>x" not in page


def test_success_is_counted_over_seeds_with_wilsons_interval() -> None:
    assert wilson(3, 3) == pytest.approx((0.4385, 1.0), abs=1e-3)
    assert wilson(0, 3) == pytest.approx((0.0, 0.5615), abs=1e-3)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    with pytest.raises(ValueError, match="0 ≤ k ≤ n"):
        wilson(4, 3)
    mixed = run("A", -0.5, 0.167, trials=[trial(0.001), trial(0.1, 1), trial(0.17, 2)])
    assert wording.success(mixed) == "1 of 3 (6 to 79 %)"
    assert not mixed.solved
    assert mixed.test_error == 0.1
    assert wording.learning(comparison(mixed).tasks[0]) == "After 100 updates A (1 of 3 seeds) learns part of it."


def test_the_story_says_what_the_records_say() -> None:
    task = two_tasks().tasks[0]
    rnn, gru, lstm, chrono = task.runs
    assert story.headline(task) == "A fresh LSTM forgets after 9 steps. The task spans 199."
    assert story.lead(task) == (
        "The chrono LSTM keeps 45 % of its gradient over all of them. Solved by GRU and chrono LSTM. "
        "At chance: tanh-RNN and LSTM."
    )
    assert story.forgetful(replace(task, runs=[chrono])) is None
    assert story.headline(replace(task, runs=[chrono])).startswith("No model's gradient vanishes")
    said = story.training(task, gru)
    assert said.startswith("Reach 10 before training, 199 after it, of 199 steps. Reach passed half of the steps by")
    assert "although only 10⁻³⁷ of the gradient arrives at the first step" in said
    assert said.endswith("A note on the GRU.")
    assert "A note" not in story.training(task, replace(gru, title="another"))
    assert story.training(task, lstm).endswith("It never passed half of the steps. It stays at chance.")
    assert (
        story.update(lstm.breakdown[0], "Before") == "Before training, 99 % of the update comes from the last 9 steps."
    )
    assert "opens 1 of 3 units" in story.rescue(lstm)
    assert story.rescue(rnn) == ""


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_line_has_contrast_on_light_and_dark_ground() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for style in LINES:
        assert min(contrast(style.colour, ground) for ground in ("#ffffff", "#f6f7f9")) >= 3
        assert min(contrast(lighter(style.colour, LIFT), ground) for ground in ("#14171c", "#0b0e14")) >= 3


def test_the_still_picture_states_the_result(tmp_path: Path) -> None:
    task = two_tasks().tasks[0]
    picture = str(still(task))
    assert picture.count("<polyline") == 4
    assert "Remaining after 199 steps: tanh-RNN 10⁻⁴⁸; GRU 10⁻³⁷; LSTM 10⁻⁴³; chrono LSTM 0.45." in picture
    dead = replace(reach(-0.5), log_norm=[0.0] + [-math.inf] * 199)
    hostile = run(HOSTILE[0], -0.5, 0.1, moments=[dead, dead])
    assert "<script>" not in str(still(replace(task, runs=[hostile])))


@pytest.mark.parametrize("left_out", ["tasks", "runs"])
def test_results_of_nothing_are_refused(left_out: str) -> None:
    data = comparison(run("plain", -0.1, 0.1)).to_json()
    (data if left_out == "tasks" else data["tasks"][0])[left_out] = []
    with pytest.raises(ValueError, match="expected one task at least, and one run at least of each"):
        Comparison.from_json(data)


def test_records_that_lack_a_moment_are_refused() -> None:
    data = comparison(run("plain", -0.1, 0.1)).to_json()
    data["tasks"][0]["runs"][0]["moments"].pop()
    assert Comparison.from_json(data).tasks
    data["tasks"][0]["runs"][0]["moments"] = data["tasks"][0]["runs"][0]["moments"][:1]
    with pytest.raises(ValueError, match="and the gradient over the lag of 'rnn'"):
        Comparison.from_json(data)
