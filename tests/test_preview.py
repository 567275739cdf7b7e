"""The card of a page: 1200 × 630 in both formats, and no name so long that it leaves the picture."""

import struct
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.functional import mse_loss

import unvanish as uv
from tests.report_records import HOSTILE, comparison, run
from tests.test_pages import LONG, Last, layer
from unvanish import report
from unvanish.diagnosis import Verification
from unvanish.diagnosis.diagnosis_page import diagnosis_preview, verification_preview
from unvanish.diagnosis.finding import Finding
from unvanish.draw.preview import HEIGHT, WIDTH, Preview, PreviewCurve, fitted, preview_figure, preview_files
from unvanish.flow import LayerFlow
from unvanish.flow.flow_page import flow_preview
from unvanish.report.html import comparison_preview

FALLING = [-0.2 * lag for lag in range(100)]


def both(page: Path) -> tuple[bytes, bytes]:
    return page.with_name(f"{page.stem}-card.png").read_bytes(), page.with_name(f"{page.stem}-card.svg").read_bytes()


@pytest.mark.parametrize("name", [*HOSTILE, LONG, "a b " * 400, "x" * 5000, "$", "", "∂" * 90])
def test_no_text_leaves_the_card(name: str) -> None:
    curves = [PreviewCurve(name, FALLING), PreviewCurve(name, [0.0]), PreviewCurve("", []), PreviewCurve(name, [None])]
    card = Preview(name, f"reach {name}", name, curves)
    figure = preview_figure(card)
    figure.canvas.draw()
    png, svg = preview_files(card)
    assert struct.unpack(">II", png[16:24]) == (WIDTH, HEIGHT)
    root = ElementTree.fromstring(svg)
    assert [float(root.get(side, "").removesuffix("pt")) * 96 / 72 for side in ("width", "height")] == [WIDTH, HEIGHT]
    assert {"script", "a", "image"}.isdisjoint(e.tag.rpartition("}")[2] for e in root.iter())
    texts = [
        *figure.texts,
        *(text for ax in figure.axes for text in [*ax.texts, ax.xaxis.label, *ax.get_yticklabels()]),
    ]
    places = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(places) > 3
    for place in places:
        assert place.x0 >= 0
        assert place.x1 <= WIDTH
        assert place.y0 >= 0
        assert place.y1 <= HEIGHT


def test_texts_are_broken_between_words_and_shortened_by_as_little_as_possible() -> None:
    def ten(text: str) -> bool:
        return len(text) <= 10

    assert fitted("one two three four", 2, ten) == "one two\nthree four"
    assert fitted("one two three four five", 2, ten) == "one two\nthree fou…"
    assert fitted("unbreakable words", 2, ten) == "unbreakab…"
    assert fitted("", 2, ten) == ""


def test_a_comparison_says_what_the_cure_did(tmp_path: Path) -> None:
    found = comparison(run("lstm", -0.5, 0.1), run("lstm-chrono", -0.001, 0.01, after=-0.01))
    plain, cured = found.tasks[0].runs
    card = comparison_preview(found)
    assert card.result == f"reach {plain.before.reach} → {cured.before.reach}"
    assert plain.before.reach < cured.before.reach
    report.write_comparison(found, tmp_path / "report.html")
    assert both(tmp_path / "report.html") == preview_files(card)
    alone = comparison(run("lstm", -0.5, 0.1))
    assert comparison_preview(alone).result == f"reach {plain.before.reach} of {plain.before.lag[-1]} steps"


def test_a_diagnosis_before_and_after(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = uv.diagnose(Last(), torch.randn(8, 40, 2), torch.randn(8, 1), loss=mse_loss, budget=0)
    was = replace(
        found,
        layers={"a": layer("a", 30), "b": layer("b", 9)},
        findings=(Finding("healthy", "note", "", "Nothing found.", "proof", "do"),),
    )
    now = replace(found, layers={"a": layer("a", 31), "b": layer("b", 59)})
    assert diagnosis_preview(was).result == "reach 9 of 59 steps"
    assert verification_preview(Verification(was, now)).result == "reach 9 → 59"
    fault = Finding("output_range", "error", "head", "The output stops at 1.", "proof", "do")
    assert diagnosis_preview(replace(was, findings=(fault,))).result == "output range"
    assert diagnosis_preview(replace(was, layers={})).result == "no fault found"
    Verification(was, now).to_html(tmp_path / "verified.html")
    was.to_html(tmp_path / "was.html")
    assert both(tmp_path / "verified.html")[0] != both(tmp_path / "was.html")[0]


def test_a_flow_is_about_the_layer_that_fades_soonest(tmp_path: Path) -> None:
    falling = 10.0 ** torch.arange(-9.0, 1.0, dtype=torch.float64)[:, None].expand(10, 2)
    slow = LayerFlow("slow", "gru", ("r", "z", "n"), torch.tensor([10, 10]), falling**0.1)
    fast = replace(slow, name="fast.reverse", dh=falling.flip(0))
    flow = uv.flow.Flow({"slow": slow, "fast.reverse": fast})
    assert flow_preview(flow).result == "reach 1 of 9 steps"
    assert [curve.name for curve in flow_preview(flow).curves] == ["fast.reverse", "slow"]
    flow.to_html(tmp_path / "flow.html")
    assert both(tmp_path / "flow.html") == preview_files(flow_preview(flow))
    at_its_end = replace(slow, name="at its end", dh=falling.flip(0))
    assert flow_preview(uv.flow.Flow({"slow": slow, "at its end": at_its_end})).result == "fades in no layer"
    assert flow_preview(uv.flow.Flow({"a": at_its_end, "f": fast})).result == "reach 1 of 9 steps"
    ordered = flow_preview(uv.flow.Flow({"a": at_its_end, "f": fast})).curves
    assert [curve.name for curve in ordered] == ["fast.reverse", "at its end"]
    two = torch.tensor([[1e-3, 1e-3], [1.0, 1.0]], dtype=torch.float64)
    short = replace(slow, name="short", lengths=torch.tensor([2, 2]), dh=two)
    assert flow_preview(uv.flow.Flow({"short": short, "f": fast})).curves[0].name == "fast.reverse"
    nothing = uv.flow.Flow({"slow": replace(slow, dh=torch.zeros(10, 2, dtype=torch.float64))})
    assert flow_preview(nothing).result == "no gradient"
