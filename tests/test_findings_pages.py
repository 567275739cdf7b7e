"""Every kind of finding has its page, and the message names it."""

from pathlib import Path

import pytest

from unvanish.diagnosis.finding import CODES, Finding

PAGES = Path(__file__).parent.parent / "docs" / "findings"


def test_every_code_has_its_page_and_the_reverse() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == {*CODES, "index"}


@pytest.mark.parametrize("code", CODES)
def test_a_page_says_what_it_means_how_it_is_proved_and_what_to_do(code: str) -> None:
    text = (PAGES / f"{code}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# `{code}`: ")
    for heading in ("What it means", "How it is proved", "What to do"):
        [line] = [line for line in text.splitlines() if line.startswith(f"**{heading}.**")]
        assert len(line) > 60 or code == "healthy"
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    assert f"[`{code}`]({code}.md)" in index
    assert f"\n{code}\n" in index.rpartition("toctree")[2]


def test_a_finding_names_a_page_that_is_there() -> None:
    finding = Finding("state_cut", "error", "", "says", "proof", "")
    assert str(finding).endswith("\n  more: findings/state_cut")
    assert (PAGES.parent / f"{finding.page}.md").is_file()
