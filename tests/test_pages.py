"""Pages of a diagnosis and of a flow: true to the records, safe, small, and readable wherever they are opened."""

import math
import re
from dataclasses import replace
from html import escape, unescape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import unvanish as uv
from unvanish.diagnosis import Diagnosis, LayerDiagnosis, Verification
from unvanish.diagnosis.diagnosis_page import diagnosis_page, verification_page
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.interventions import Tried
from unvanish.diagnosis.plan import Plan, Prediction, Step
from unvanish.draw.strips import Axes, Bar, Curve, Strip, bars, strips
from unvanish.flow.flow_page import flow_page

HOSTILE = "<script>alert(1)</script>\"'&"
LONG = "a_module_name_without_any_abbreviations_" * 4
LIMIT = 1.5e6


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.fixture(scope="module")
def measured() -> Diagnosis:
    torch.manual_seed(0)
    return uv.diagnose(Last(), torch.randn(8, 40, 2), torch.randn(8, 1), loss=mse_loss, budget=0)


def layer(name: str, reach: int, lag: int = 59, verdict: Any = "vanishes") -> LayerDiagnosis:
    """One whose gradient is at 1 % at `reach`."""
    rate = math.log(0.01) / (reach + 0.5)
    curve = tuple(rate * step for step in range(lag + 1))
    return LayerDiagnosis(name, "lstm", verdict, "because", rate, (rate, rate), 1.5, reach, lag, {}, curve)


def finding(code: str, says: str, **other: str) -> Finding:
    return Finding(code, "error", "head", says, "1 of 2 moved.", other.get("do", "Change it."))


def full(found: Diagnosis, name: str = "rnn") -> Diagnosis:
    """Everything that a diagnosis can hold."""
    plan = Plan(
        (Step("start the forget gates at a bias of 4", "uv.cures.forget_bias_(model, 4)", lambda m: m),),
        Prediction(0.69, 0.2, 0.68, 300),
    )
    tried = (
        Tried("as it is", 300, 0.69, 0.68, False),
        Tried(name, 300, 0.2, 0.68, True),
        Tried("learning rate 1", 3, math.inf, 0.68, False, "the loss was NaN"),
    )
    found_codes = ("output_range", "depth", "reach_too_short")
    findings = tuple(finding(code, f"{code} of {name}.", do=plan.code) for code in found_codes)
    layers = {f"{name}.l{k}": layer(f"{name}.l{k}", 3 + 8 * k) for k in range(8)}
    notes = tuple(f"{name}.cell{k}: not measured: it is scripted" for k in range(30))
    return replace(found, findings=findings, layers=layers, plan=plan, tried=tried, notes=notes)


def words(page: str) -> str:
    """What a reader reads."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page[page.index("<main>") :])))


def test_the_page_says_what_the_diagnosis_says(measured: Diagnosis, tmp_path: Path) -> None:
    found = full(measured)
    found.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert f"<h1>{found.headline}</h1>" in page
    assert "3 findings" in page
    for f in found.findings:
        for said in (f"error: {f.code}", f.says, f.proof):
            assert said in words(page)
    assert escape(found.plan.code.rstrip()) in page
    assert page.count("<pre") == 1, "the findings refer to the plan instead of repeating its code"
    assert "0.69 as it is, 0.2 with the plan (best constant answer: 0.68)" in page
    for row in found.tried:
        assert f"{row.name}: loss {row.loss:.4g} after {row.updates} updates" in page
    for name, d in found.layers.items():
        assert f"{name}: at least 1 % of the gradient remains over {d.reach} of 59 steps" in page
        assert f"{d.verdict}, reach {d.reach} of 59 steps" in page


def test_notes_that_say_the_same_are_one(measured: Diagnosis) -> None:
    page = words(diagnosis_page(full(measured)))
    assert page.count("not measured: it is scripted") == 1
    assert "rnn.cell0, rnn.cell1, rnn.cell2" in page


def test_nothing_proved_is_not_called_healthy(measured: Diagnosis) -> None:
    assert measured.healthy
    page = diagnosis_page(measured)
    assert "no fault found" in page
    assert 'class="card good"' not in page
    assert 'id="plan"' not in page
    learns = replace(measured, tried=(Tried("as it is", 100, 0.1, 0.7, True),))
    assert 'class="card good"' in diagnosis_page(learns)


@pytest.mark.parametrize("name", [HOSTILE, LONG])
def test_any_name_is_text_and_nothing_is_fetched(measured: Diagnosis, name: str) -> None:
    found = full(measured, name)
    flow = uv.flow.Flow({name: record(T=30, name=name)})
    for page in (diagnosis_page(found), verification_page(Verification(found, found)), flow_page(flow)):
        assert "<script" not in page
        assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
        assert "url(" not in page
        assert "default-src 'none'" in page
        assert escape(name) in page


def test_a_page_stays_small_whatever_is_measured(measured: Diagnosis) -> None:
    layers = {f"l{k}": layer(f"l{k}", 40 * k, 20_000) for k in range(24)}
    page = diagnosis_page(replace(measured, layers=layers))
    assert len(page.encode()) < LIMIT
    assert page.count('<div class="strip') == 12
    assert "12 layers whose gradient reaches further: see the table." in page
    assert all(f"<td>{name}</td>" in page for name in layers)
    assert len(flow_page(uv.flow.Flow({f"l{k}": record(T=20_000, name=f"l{k}") for k in range(24)})).encode()) < LIMIT


def test_before_and_after(measured: Diagnosis, tmp_path: Path) -> None:
    was = full(measured)
    now = replace(
        measured,
        findings=(Finding("healthy", "note", "", "It learns.", "Loss 0.1.", ""),),
        layers={"rnn.l0": layer("rnn.l0", 59, verdict="healthy")},
        tried=(Tried("as it is", 100, 0.1, 0.68, True),),
    )
    Verification(was, now).to_html(tmp_path / "page.html")
    page = words((tmp_path / "page.html").read_text("utf-8"))
    assert "cured" in page
    assert f"Before the change: {was.headline}" in page
    assert "healthy, reach 3 → 59 of 59 steps" in page
    assert "0.69 (best constant answer: 0.68) 0.1 (best constant answer: 0.68)" in page
    assert verification_page(Verification(now, was)).count("not cured") == 1


AXES = Axes((0, 100), (-8, 2), "steps", [(0, "1"), (-2, "1 %")], -2)


def drawn(curve: Curve) -> list[tuple[float, float]]:
    page = strips([Strip("a", "b", "", "c", [curve])], AXES, "")
    points = re.search(r'class="curve \w+" points="([^"]+)"', page)
    assert points is not None
    return [(float(x), float(y)) for x, y in (p.split(",") for p in points[1].split())]


def test_curves_stand_where_their_numbers_say() -> None:
    points = drawn(Curve("n", "main", [0, 50, 100], [0, -3, -math.inf]))
    assert points == [(0, 20), (500, 50), (1000, 100)]
    assert drawn(Curve("n", "main", [0, 50, 100], [9, math.nan, -8])) == [(0, 0), (1000, 100)]


def test_a_peak_survives_the_thinning() -> None:
    values = [-4.0] * 100_001
    values[77_777] = 1.0
    points = drawn(Curve("n", "main", [k / 1000 for k in range(100_001)], values))
    assert len(points) < 700
    assert min(y for _, y in points) == 10


def test_losses_below_zero_or_not_finite_are_words_alone() -> None:
    fits, not_finite, negative = (Bar("a", "loss", v, 1.0, "") for v in (0.5, math.inf, -0.5))
    assert bars([fits, not_finite], "").count("<svg") == 2
    assert "<svg" not in bars([fits, negative], "")


def test_a_gradient_that_grows_extends_the_scale(measured: Diagnosis) -> None:
    grown = replace(layer("l0", 59), curve=tuple(math.log(10) * k for k in range(30)))
    page = diagnosis_page(replace(measured, layers={"l0": grown}))
    assert "10²⁹" in page
    assert "10²⁹" not in diagnosis_page(measured)


def contrast(a: str, b: str) -> float:
    """WCAG's ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_every_line_and_word_stands_out_from_what_is_behind_it() -> None:
    style = (files("unvanish.draw") / "page.css").read_text("utf-8")
    themes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{([^}]+)\}", style)]
    assert len(themes) == 3, "light, dark and print"
    for theme in themes:
        whole = {
            name: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:]) for name, value in theme.items()
        }
        for behind in ("paper", "panel"):
            for name in ("line", "second", "ghost", "good", "some", "bad"):
                assert contrast(whole[name], whole[behind]) >= 3, (name, behind)
            for name in ("ink", "soft"):
                assert contrast(whole[name], whole[behind]) >= 4.5, (name, behind)


def record(T: int = 5, name: str = "l0") -> Any:
    """A real record, of T steps, under another name."""
    lstm = nn.LSTM(2, 3)
    with uv.watch(lstm) as flow:
        lstm(torch.randn(min(T, 50), 2, 2))[0][-1].sum().backward()
    made = flow["l0"]
    repeat = -(-T // len(made.dh))
    assert made.dc is not None
    return replace(made, name=name, dh=made.dh.repeat(repeat, 1)[:T], dc=made.dc.repeat(repeat, 1)[:T],
                   lengths=torch.full((2,), T))  # fmt: skip


def test_a_flow_page_says_what_remains_and_what_is_missing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"seen": nn.LSTM(2, 3), "unused": nn.GRU(2, 3)})
    with uv.watch(model) as flow:
        uv.mark(torch.ones(4), "dead end")
        model["seen"](torch.randn(30, 4, 2))[0][-1].sum().backward()
    flow.to_html(tmp_path / "flow.html")
    page = words((tmp_path / "flow.html").read_text("utf-8"))
    norms = flow["seen.l0"].dc
    assert norms is not None
    most = torch.stack([norms, flow["seen.l0"].dh]).median(2).values.amax(0)
    power = math.log10(float(most[0] / most.max()))
    assert -9 < power < -3
    shown = str(round(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    assert f"Of the gradient's peak in seen.l0, 10{shown} remains 29 steps further back in time." in page
    assert flow.skipped
    for name, why in flow.skipped.items():
        assert f"{name}: not recorded: {why}" in page


def test_a_flow_without_any_gradient_says_so() -> None:
    empty = record()
    nothing = replace(empty, dh=torch.zeros_like(empty.dh), dc=torch.zeros_like(empty.dh))
    page = words(flow_page(uv.flow.Flow({"l0": nothing})))
    assert "No gradient arrived in any recorded layer." in page
    assert "l0: no gradient arrived." in page


def test_layers_that_read_in_reverse_end_at_the_last_step() -> None:
    reverse = record(T=20, name="l0.reverse")
    peak = replace(reverse, dh=reverse.dh.flip(0), dc=None)
    page = words(flow_page(uv.flow.Flow({"l0.reverse": peak})))
    assert "in reversed layers from the first to the last" in page
    assert "of the peak at step 19" in page


@pytest.mark.browser
@pytest.mark.parametrize("width", [1100, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser(browser: Any, measured: Diagnosis, tmp_path: Path, width: int, scheme: str) -> None:
    """Nothing is wider than the screen, and a click takes the whole code, with or without scripts."""
    now = replace(measured, layers={"rnn.l0": layer("rnn.l0", 59, verdict="healthy")})
    pages = {
        "full": diagnosis_page(full(measured)),
        "long": diagnosis_page(full(measured, LONG)),
        "healthy": diagnosis_page(measured),
        "verified": verification_page(Verification(full(measured, LONG), now)),
        "flow": flow_page(uv.flow.Flow({name: record(T=30, name=name) for name in ("l0", "l0.reverse", LONG)})),
    }
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    for name, text in pages.items():
        path = tmp_path / f"{name}.html"
        path.write_text(text, encoding="utf-8")
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        for picture in page.locator("svg[role=img]").all():
            box = picture.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        ticks = page.evaluate(
            "[...document.querySelectorAll('.plot')].map(p => [...p.querySelectorAll('.tick')]"
            ".map(t => t.getBoundingClientRect()).map(b => [b.top, b.bottom]))"
        )
        assert all(below[0] >= above[1] - 1 for plot in ticks for above, below in pairwise(plot))
        focusable = "a[href], button, input, select, [tabindex]"
        assert page.locator(focusable).count() <= 40, name
        if "<pre" in text:
            page.locator("#plan pre").click()
            assert page.evaluate("getSelection().toString().trim()") == full(measured).plan.code.strip()
        page.emulate_media(media="print", color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.emulate_media(media="screen", color_scheme=scheme)
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


def test_contents_lead_to_every_section(measured: Diagnosis) -> None:
    page = diagnosis_page(full(measured))
    links = re.findall(r'<li><a href="#(\w+)">(.*?)</a></li>', page)
    assert links == re.findall(r'<section id="(\w+)">\n<h2>(.*?)</h2>', page)
    assert len(links) > 4
    assert page.index("<h1>") < page.index("<nav") < page.index("<figure>")
    fake = replace(measured, findings=(finding("depth", '<section id="x">\n<h2>fake</h2>'),))
    assert 'href="#x"' not in diagnosis_page(fake)
