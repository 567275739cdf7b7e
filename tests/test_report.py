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
from unvanish import report
from unvanish.report import verdict
from unvanish.train.records import Comparison, Cured, GradientBreakdown, Reach, Run, TaskResult

HOSTILE = ["<script>alert(1)</script>\"'&", "</script><img src=x onerror=alert(1)>", "שלום ‮abc", "x" * 300]


def reach(slope: float, update: int = 0, length: int = 200) -> Reach:
    curve = [slope * lag for lag in range(length)]
    half = math.log(2) / -slope if slope < 0 else None
    last = max(lag for lag in range(length) if slope * lag > math.log(0.01))
    return Reach(
        update, list(range(length)), curve, [v - 1 for v in curve], [v + 1 for v in curve], slope, half, last, 0.01
    )


def breakdown(update: int) -> GradientBreakdown:
    steps = list(range(0, 200, 2))
    map_ = [[-0.1 * (k - t) if t <= k else None for t in steps] for k in (99, 149, 199)]
    share = {"carry": [0.9] * 100, "forget_gate": [0.1] * 99 + [None]}
    curve: list[float | None] = [-0.1 * t for t in steps]
    return GradientBreakdown(update, steps, share, curve, curve, [2.0, 30.0, None], [99, 149, 199], map_)


def run(title: str, slope: float, error: float, after: float | None = None) -> Run:
    solved = error < 0.01
    end = reach(slope if after is None else after, 100)
    return Run(
        "rnn", title, 10, [50, 100], [0.2, error], error, solved, 100 if solved else None, 1.0, reach(slope), [], end,
        [breakdown(0), breakdown(100)], [Cured("lstm-chrono", f"cured {title}", reach(-0.001))],
    )  # fmt: skip


def comparison(*runs: Run) -> Comparison:
    settings = {"steps": 100, "hidden": 4, "seed": 0}
    task = TaskResult(
        "adding", "Adding", "Add.", "a paper", 200, "mean squared error", 1 / 6, 0.01, settings, list(runs)
    )
    return Comparison([task], {"torch": "2"}, "unvanish compare")


def test_verdicts_say_what_the_records_say() -> None:
    both = comparison(run("RNN", -0.5, 0.167), run("cured", -0.001, 0.001)).tasks[0]
    assert verdict.survival(both).endswith("RNN: 10⁻⁴³; cured: 0.82.")
    shorter = replace(both, length=999)  # the samples that were measured may end before
    assert "199 steps earlier" in verdict.survival(shorter)
    assert "over 199 steps" in verdict.explanation(shorter)
    assert verdict.learning(both) == "After 100 updates cured solves it, RNN stays at chance."
    assert verdict.explanation(both) == "At the start the gradient of RNN vanishes over 199 steps."
    nobody = comparison(run("A", -0.5, 0.05), run("B", 0.0, 0.167)).tasks[0]
    assert verdict.learning(nobody) == "After 100 updates A learns part of it, B stays at chance."
    assert "B did not solve it although the gradient reaches" in verdict.explanation(nobody)
    first, second = verdict.advice(nobody)
    assert first.startswith("No model solved it")
    assert (
        '`layer = unvanish.cures.replace_(layer, "lstm")`, and call `unvanish.cures.chrono_(layer, max_lag=200)`'
        in second
    )
    assert second.endswith("0.82 then arrives at the first step, instead of 10⁻⁴³.")
    lucky = comparison(run("A", -0.5, 0.001, after=0.0)).tasks[0]
    assert "Still A (reach 9 → 199 steps) solves the task" in verdict.explanation(lucky)
    assert verdict.explanation(comparison(run("A", 0.0, 0.1)).tasks[0]).startswith("No model's gradient vanishes")
    wild = comparison(run("A", 0.1, 0.167), run("B", -0.5, 0.167)).tasks[0]
    assert verdict.explanation(wild) == (
        "At the start the gradient of B vanishes over 199 steps. "
        "At the start the gradient of A explodes over 199 steps."
    )
    assert verdict.explanation(replace(wild, runs=wild.runs[:1])).endswith("gradient of A explodes over 199 steps.")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "1"), (-1.0, "0.37"), (-1000.0, "10⁻⁴³⁴"), (50.0, "10²²"), (-math.inf, "exactly 0")]
)
def test_factors_in_words(value: float, text: str) -> None:
    assert verdict.power_of_ten(value) == text


def test_fate_does_not_depend_on_scale_and_knows_explosions() -> None:
    assert [verdict.fate(reach(s)) for s in (-0.1, 0.1)] == ["vanishes", "explodes"]
    assert {verdict.fate(reach(s)) for s in (-0.02, 0.0, 0.02)} == {"survives"}


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
    record.tasks[0].runs[0] = replace(record.tasks[0].runs[0], before=dead)
    written = report.save_figures(record, str(tmp_path))
    assert len(written) == 8  # both runs have one name, so one file of cures
    assert all(path.stat().st_size > 5000 for path in written)


def test_plots_take_and_return_axes() -> None:
    lstm = nn.LSTM(2, 3)
    with uv.watch(lstm) as flow:
        lstm(torch.randn(5, 2, 2))[0][-1].sum().backward()
    ax = flow.plot()
    assert len(ax.lines) == 2
    expected = flow["l0"].dh.quantile(0.5, dim=1)
    assert ax.lines[0].get_ydata() == pytest.approx(expected.tolist())
    assert uv.plot.flow(flow["l0"], ax) is ax
    assert len(ax.lines) == 4


def test_names_that_would_leave_the_folder_are_refused() -> None:
    data = comparison(run("plain", -0.1, 0.1)).to_json()
    data["tasks"][0]["name"] = "../../x"
    with pytest.raises(ValueError, match=r"got '\.\./\.\./x'"):
        Comparison.from_json(data)


def test_titles_are_no_formulas(tmp_path: Path) -> None:
    found = comparison(run("$\\frac{1}$", -0.1, 0.1), run("_hidden", -0.2, 0.1))
    assert len(report.save_figures(found, tmp_path)) == 8
    legend = uv.plot.learning(found.tasks[0]).get_legend()
    assert legend is not None
    assert any("hidden" in text.get_text() for text in legend.get_texts())


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


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_lives_in_a_browser(browser, tmp_path: Path, width: int, scheme: str) -> None:
    names = [*HOSTILE, "plain"]
    path = tmp_path / "report.html"
    report.write_comparison(comparison(*(run(name, -0.1 * i, 0.1, after=-0.01) for i, name in enumerate(names))), path)
    assert path.stat().st_size < 6e6
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#reach-adding .legend")
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("tbody td:first-child .key + bdi").all_inner_texts() == names
    before = page.evaluate("JSON.stringify(document.getElementById('reach-adding').data.map((t) => t.y))")
    page.locator("fieldset input").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("fieldset input").nth(1).is_checked()
    assert page.evaluate("document.getElementById('reach-adding').data.length") == 2 * len(names)
    assert page.evaluate("JSON.stringify(document.getElementById('reach-adding').data.map((t) => t.y))") != before
    for picture in ("share", "memory", "subgradient", "map"):
        assert page.evaluate(f"document.getElementById('{picture}-adding').data.length") >= 1
    page.locator("input[name=model-adding]").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("input[name=model-adding]").nth(1).is_checked()
    page.locator("input[name=cure-adding]").last.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("input[name=cure-adding]").nth(len(names) - 2).is_checked()
    for picture, curve, point, said_there in (
        ("reach", 9, 100, "of the error at lag 0"),
        ("learning", 0, 1, "mean squared error 0.1"),
        ("share", 0, 10, "0.900 of the error"),
        ("memory", 0, 0, "to 2.29 steps1 units"),
        ("subgradient", 0, 10, "step 20"),
        ("cures", 3, 100, "0.905 of the error at lag 0"),
    ):
        page.evaluate(f"Plotly.Fx.hover('{picture}-adding', [{{curveNumber: {curve}, pointNumber: {point}}}])")
        assert said_there in (page.locator(f"#{picture}-adding .hoverlayer").text_content() or ""), picture
    page.locator("#map-adding .nsewdrag").hover()  # the mouse itself, in the middle of three sources
    page.wait_for_selector("#map-adding .hoverlayer text")
    assert "source k 149, step t" in (page.locator("#map-adding .hoverlayer").text_content() or "")
    assert said == []
    page.close()


@pytest.mark.browser
def test_report_prints(browser, tmp_path: Path) -> None:
    """Paper: pictures as wide as the text, in light colours; of every choice only what was chosen."""
    path = tmp_path / "report.html"
    report.write_comparison(comparison(run("plain", -0.1, 0.1), run("cured", -0.001, 0.001)), path)
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    page.goto(path.as_uri())
    page.wait_for_selector("#reach-adding .legend")
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    for picture in ("reach", "share", "map", "cures"):
        drawn, box = (page.locator(f"#{picture}-adding{part}").bounding_box() for part in (" .main-svg >> nth=0", ""))
        assert (drawn["width"], drawn["height"]) == (box["width"], box["height"]), picture
        assert box["width"] < 680
    assert page.locator("label:visible").all_inner_texts() == ["before training", "cured", "before training", "cured"]
    assert page.locator(".modebar-container:visible").count() == 0
    assert page.evaluate("document.getElementById('reach-adding').layout.font.color") == "#1c1f24"
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.getElementById('reach-adding').layout.font.color") == "#e8eaee"
    page.close()
