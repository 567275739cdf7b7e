"""The comparison's page as a reader meets it: played, scrubbed, dragged, switched, printed, read without script."""

from pathlib import Path

import pytest

from tests.report_records import HOSTILE, comparison, run, two_tasks
from unvanish import report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("page") / "report.html"
    report.write_comparison(two_tasks(), found)
    return found


class Page:
    """A page with what went wrong on it, and what it asked for."""

    def __init__(self, browser, path: Path, **options) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page, self.said, self.asked = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self.page

    def __exit__(self, kind, *_) -> None:
        self.context.close()
        if kind is None:
            assert self.said == []
            assert [url for url in self.asked if not url.startswith(("file:", "data:"))] == []

    def value(self, id: str) -> float:
        return float(self.page.locator(f"#{id}").input_value())


STILL = {"reduced_motion": "reduce"}


def slide(page, id: str, value: float) -> None:
    move = "(s, value) => { s.value = value; s.dispatchEvent(new Event('input')); }"
    page.locator(f"#{id}").evaluate(move, value)


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_lives_with_any_names(browser, tmp_path: Path, width: int, scheme: str) -> None:
    names = [*HOSTILE, "plain"]
    found = comparison(*(run(name, -0.1 * i, 0.1, after=-0.01) for i, name in enumerate(names)))
    report.write_comparison(found, tmp_path / "report.html")
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, **STILL}
    with Page(browser, tmp_path / "report.html", **options) as page:
        page.wait_for_selector("#rescue-plot svg")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("tbody td:first-child .key + bdi").all_inner_texts() == names
        for picture in ("hero", "learning", "product-plot", "bias-plot", "cell-plot", "training-plot", "update-plot"):
            assert page.locator(f"#{picture} svg[role=img]").get_attribute("aria-label"), picture
        page.select_option("#model", "4")
        assert page.locator("#product-live").inner_text().startswith("plain, ")


def test_it_is_small_and_soon_there(browser, path: Path) -> None:
    assert path.stat().st_size < 1.5e6
    with Page(browser, path, **STILL) as page:
        assert page.locator("#hero svg").count() == 1
        focusable = "a[href], button, input, select, [tabindex]"
        visible = f"[...document.querySelectorAll('{focusable}')].filter((e) => e.checkVisibility()).length"
        assert page.evaluate(visible) <= 40
        anchors = page.locator("nav a").evaluate_all("(links) => links.map((a) => a.getAttribute('href').slice(1))")
        assert len(anchors) == 9
        for anchor in anchors:
            assert page.locator(f"section#{anchor} h2").count() == 1


def test_the_gradient_walks_once_and_can_be_scrubbed(browser, path: Path) -> None:
    opened = Page(browser, path)
    from playwright.sync_api import expect

    with opened as page:
        expect(page.locator("#hero-out")).to_have_text("199 of 199", timeout=60000)
        expect(page.locator("#hero-play")).to_have_text("Play")
        assert opened.value("hero-lag") == 199
        numbers = page.locator("#hero text.strong:not(.named)").all_text_contents()
        assert numbers == ["10⁻⁴⁸", "10⁻³⁷", "10⁻⁴³", "0.45"]
        page.locator("#hero-lag").focus()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#hero-out").inner_text() == "198 of 199"
        box = page.locator("#hero .grab").bounding_box()
        page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 60)
        page.mouse.down()
        page.mouse.up()
        assert abs(opened.value("hero-lag") - 50) <= 2
        rows = page.evaluate(
            "[...document.querySelectorAll('#hero svg g g')].filter((g) => g.querySelector('.cell'))"
            ".map((g) => [...g.querySelectorAll('.cell')].map((c) => Number(c.getAttribute('opacity'))))"
        )
        assert len(rows) == 4
        rnn, *_, chrono = rows
        assert rnn[0] == chrono[0] == 1  # at the last step all are alike
        assert max(rnn[9:]) == 0
        assert min(chrono[:11]) > 0.9
        assert max(chrono[13:]) == 0  # where the gradient has not come yet


def test_it_respects_reduced_motion(browser, path: Path) -> None:
    opened = Page(browser, path, **STILL)
    with opened as page:
        assert opened.value("hero-lag") == 199
        assert page.locator("#hero-play").inner_text() == "Play"


def test_dragging_shows_the_product_and_the_closed_form(browser, path: Path) -> None:
    opened = Page(browser, path, **STILL)
    with opened as page:
        page.select_option("#model", "2")
        slide(page, "product-lag", 4)
        assert page.locator("#product-live").inner_text() == "LSTM, 4 steps back: 0.61 × 0.61 × 0.61 × 0.61 = 0.14"
        page.locator("#product-plot").scroll_into_view_if_needed()
        box = page.locator("#product-plot .grab").bounding_box()
        page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20, steps=5)
        page.mouse.up()
        assert abs(opened.value("product-lag") - 100) <= 2
        assert page.locator("#product-plot .bar:not(.off)").count() == opened.value("product-lag")
        slide(page, "bias-b", 3)
        said = page.locator("#bias-live").inner_text()
        assert said.startswith("σ(4) = 0.98;")
        assert "σ(4)¹⁹⁹ = 0.027" in said
        assert "measured 0.027" in said


def test_arrow_term_and_curve_light_up_together(browser, path: Path) -> None:
    with Page(browser, path, **STILL) as page:
        page.select_option("#model", "2")
        lit = "[...document.querySelectorAll('#cell .lit')].map((e) => e.dataset.term + ' ' + e.tagName)"
        assert sorted(page.evaluate(lit)) == ["B mrow", "B path", "B path", "B text"]
        page.locator("#terms input").first.focus()
        page.keyboard.press("ArrowRight")
        assert sorted(page.evaluate(lit)) == ["A mrow", "A path", "A path", "A text"]
        page.locator("#math-O").hover()
        assert sorted(page.evaluate(lit)) == ["O mrow", "O path", "O path", "O text"]
        page.select_option("#model", "1")  # a GRU has other paths, and no drawing here
        assert page.locator("#cell-drawing").is_hidden()
        assert page.locator("#terms span").all_inner_texts() == ["carry, diag(z)", "through the weights of gate r"]


def test_training_plays_and_its_moments_are_reached_by_keyboard(browser, path: Path) -> None:
    from playwright.sync_api import expect

    opened = Page(browser, path, **STILL)
    with opened as page:
        page.select_option("#model", "1")
        slide(page, "training-at", 0)
        assert page.locator("#training-live").inner_text().startswith("GRU, update 0: reach 10 steps")
        page.locator("#training-play").click()
        expect(page.locator("#training-out")).to_have_text("update 100", timeout=60000)
        assert opened.value("training-at") == 4
        assert (
            "GRU, update 100: reach 199 steps, mean squared error 0.001" in page.locator("#training-live").inner_text()
        )
        page.locator("#training-at").focus()
        page.keyboard.press("ArrowLeft")
        assert opened.value("training-at") == 3
        assert page.locator("#moment-plot .ghost").count() == 1


def test_one_switch_changes_the_task_everywhere(browser, path: Path) -> None:
    with Page(browser, path, **STILL) as page:
        first = page.locator("#hero svg").get_attribute("aria-label")
        page.locator("input[name=task]").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("#hero svg").get_attribute("aria-label") != first
        assert page.locator("[data-task='0']:visible").count() == 0
        assert page.locator("section#learns tbody tr:visible td:first-child").all_inner_texts()[0] == "chrono LSTM"
        page.locator("input[name=when]").last.check(force=True)
        assert "after training" in page.locator("#update-plot svg").get_attribute("aria-label")


def test_axes_are_the_same_for_every_model_and_moment(browser, path: Path) -> None:
    with Page(browser, path, **STILL) as page:
        ticks = "[...document.querySelectorAll('#moment-plot .tick text')].map((t) => t.textContent)"
        seen = set()
        for model in range(4):
            page.select_option("#model", str(model))
            for moment in (0, 4):
                slide(page, "training-at", moment)
                seen.add(tuple(page.evaluate(ticks)))
        assert len(seen) == 1


def test_paper_has_all_models_and_light_colours(browser, path: Path) -> None:
    with Page(browser, path, color_scheme="dark", **STILL) as page:
        page.emulate_media(media="print")
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert page.locator("fieldset label:visible").all_inner_texts() == ["Adding, 200 steps", "before training"]
        assert page.locator(".controls:visible, nav:visible").count() == 0
        assert page.locator("#training .all-models:visible li").count() == 4
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert (
            page.evaluate("getComputedStyle(document.querySelector('.night')).backgroundColor") == "rgb(255, 255, 255)"
        )
        assert page.locator("#hero svg").bounding_box()["width"] <= 680
        page.evaluate("window.dispatchEvent(new Event('afterprint'))")


def test_without_script_the_result_is_still_there(browser, path: Path) -> None:
    with Page(browser, path, java_script_enabled=False) as page:
        assert page.locator("noscript svg").count() == 2
        assert page.locator("noscript svg").first.is_visible()
        assert page.locator("h1:visible").count() == 2
        assert page.locator(".needs-script:visible").count() == 0
        assert page.locator(".all-models:visible li").count() > 20


def test_a_table_that_is_too_wide_says_so(browser, path: Path) -> None:
    with Page(browser, path, viewport={"width": 420, "height": 900}, **STILL) as page:
        table = page.locator("#learns .scroll:visible")
        assert "wider" in table.get_attribute("class").split()
        assert "scroll sideways" in table.evaluate("(e) => getComputedStyle(e, '::after').content")


CONTRAST = """() => {
  const luminance = (c) => {
    const [r, g, b] = c.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const numbers = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const found = {};
  const lines = ".curve, .bound, .thread, .cell-edge, .playhead, .head, .bar, .domain";
  for (const e of document.querySelectorAll(`svg :is(${lines})`)) {
    if (!e.checkVisibility()) continue;
    const style = getComputedStyle(e), colour = numbers(e.classList.contains("bar") ? style.fill : style.stroke);
    let solid = colour[3] ?? 1, behind = null;
    for (let n = e; n && n.tagName !== "HTML"; n = n.parentElement) {
      solid *= Number(getComputedStyle(n).opacity);
      const paint = numbers(getComputedStyle(n).backgroundColor);
      if (!behind && paint.length && (paint[3] ?? 1) > 0) behind = paint.slice(0, 3);
    }
    const seen = colour.slice(0, 3).map((v, i) => solid * v + (1 - solid) * behind[i]);
    const [low, high] = [luminance(seen), luminance(behind)].sort((a, b) => a - b);
    const name = `${e.getAttribute("class")} in ${e.closest("[id]").id}`, ratio = (high + 0.05) / (low + 0.05);
    found[name] = Math.min(ratio, found[name] ?? Infinity);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_drawn_line_stands_out(browser, path: Path, scheme: str) -> None:
    with Page(browser, path, color_scheme=scheme, **STILL) as page:
        page.wait_for_selector("#rescue-plot svg")
        found = page.evaluate(CONTRAST)
        assert len(found) > 20
        assert {name: ratio for name, ratio in found.items() if ratio < 3} == {}


def test_the_paths_stand_in_the_order_of_the_equation(browser, path: Path) -> None:
    with Page(browser, path, **STILL) as page:
        page.select_option("#model", "2")
        buttons = [text[0] for text in page.locator("#terms span").all_inner_texts()]
        terms = page.locator("#cell math .term").evaluate_all("(terms) => terms.map((t) => t.dataset.term)")
        assert terms == ["B", "A", "C", "D", "O"]
        assert buttons == [term for term in terms if term in buttons]


@pytest.mark.parametrize("width", [1280, 420])
def test_words_in_the_first_picture_do_not_meet(browser, path: Path, width: int) -> None:
    with Page(browser, path, viewport={"width": width, "height": 900}, **STILL) as page:
        boxes = page.locator("#hero svg text").evaluate_all(
            "(texts) => texts.filter((t) => t.textContent).map((t) => [t.textContent, t.getBoundingClientRect()])"
            ".map(([text, b]) => [text, b.left, b.right, b.top, b.bottom])"
        )
        frame = page.locator("#hero").bounding_box()
        for place, (text, left, right, top, bottom) in enumerate(boxes):
            assert left >= frame["x"] - 1, text
            assert right <= frame["x"] + frame["width"] + 1, text
            for other, left2, right2, top2, bottom2 in boxes[place + 1 :]:
                apart = right <= left2 or right2 <= left or bottom <= top2 + 4 or bottom2 <= top + 4
                assert apart, (text, other)
