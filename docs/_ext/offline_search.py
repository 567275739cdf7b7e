"""Excerpts in the search results when the pages are opened as files.

Sphinx's search fetches each page that it found to show an excerpt, and a browser refuses to fetch from a `file:` page.
So the text of all pages is written into one script, which only the search page loads and which answers in place of
`fetch`.
"""

import json
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

SCRIPT = "page_texts.js"
ANSWER = """
const fetchFromServer = window.fetch;
window.fetch = (url, ...rest) =>
  url in PAGE_TEXTS ? Promise.resolve(new Response(PAGE_TEXTS[url])) : fetchFromServer(url, ...rest);
"""
VOID = {"br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class _Text(HTMLParser):
    """The text of a page's article, with a `<section id=...>` per section, which is what the search looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._open: list[str] = []
        self._article = self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            return
        found = dict(attrs)
        hidden = tag in ("script", "style", "button", "svg") or "headerlink" in (found.get("class") or "")
        kind = (
            "article" if found.get("role") == "main" else "hidden" if hidden else "section" if tag == "section" else ""
        )
        self._open.append(kind)
        self._article += kind == "article"
        self._hidden += kind == "hidden"
        if kind == "section" and self._article:
            self.parts.append(f'<section id="{escape(found.get("id") or "")}">')

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or not self._open:
            return
        kind = self._open.pop()
        if self._article:
            self.parts.append("</section>" if kind == "section" else " " if tag in ("dt", "td", "th") else "")
        self._article -= kind == "article"
        self._hidden -= kind == "hidden"

    def handle_data(self, data: str) -> None:
        if self._article and not self._hidden:
            self.parts.append(escape(data))


def _load(app: Any, pagename: str, templatename: str, context: Any, doctree: Any) -> None:
    if pagename == "search":
        app.add_js_file(SCRIPT)


def _write(app: Any, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    out, texts = Path(app.outdir), {}
    for name in sorted(app.env.found_docs):
        parser = _Text()
        parser.feed((out / f"{name}.html").read_text(encoding="utf-8"))
        texts[f"./{name}.html"] = f'<div role="main">{"".join(parser.parts)}</div>'
    code = json.dumps(texts, ensure_ascii=False).replace("</", "<\\/")
    (out / "_static" / SCRIPT).write_text(f"const PAGE_TEXTS = {code};\n{ANSWER}", encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Load the script on the search page, and write it once all pages are written."""
    app.connect("html-page-context", _load)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
