"""A self-contained page from plain parts: opens offline, needs no script, follows the reader's light or dark theme."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Literal

Tone = Literal["good", "some", "bad", ""]
"""the colour of a tag or of a card's edge; the text beside it says the same"""


def page(title: str, *parts: str) -> str:
    """A whole HTML document around parts that are HTML already; parts that are "" are left out. After the first, the
    head, comes a table of contents of its sections."""
    style = (files("unvanish.draw") / "page.css").read_text("utf-8")
    head, *rest = (part for part in parts if part)
    named = re.findall(r'<section id="(\w+)">\n<h2>(.*?)</h2>', "\n".join(rest))
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading in named)
    contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if len(named) > 1 else ""
    body = "\n".join(part for part in (head, contents, *rest) if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def prose(text: str) -> str:
    """Text as HTML, escaped; text between backticks becomes code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def top(kicker: str, headline: str, tag: str = "", tone: Tone = "") -> str:
    """The head of the page: its subject, and the result in one sentence."""
    label = f' · <span class="tag {tone}">{escape(tag)}</span>' if tag else ""
    return f'<p class="kicker">{escape(kicker)}{label}</p>\n<h1>{prose(headline)}</h1>'


def section(title: str, *parts: str, name: str = "") -> str:
    """A heading and its content; "" if there is no content."""
    body = "\n".join(part for part in parts if part)
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{body}\n</section>' if body else ""


def paragraph(text: str, kind: Literal["", "note"] = "") -> str:
    """One paragraph; "" for no text."""
    return f"<p{' class=note' if kind else ''}>{prose(text)}</p>" if text else ""


def listed(items: Iterable[str], *, numbered: bool = False, kind: Literal["", "note"] = "") -> str:
    """A list; "" for no items."""
    body = "".join(f"<li>{prose(item)}</li>\n" for item in items)
    mark = "ol" if numbered else "ul"
    return f"<{mark}{' class=note' if kind else ''}>\n{body}</{mark}>" if body else ""


def code(text: str) -> str:
    """Code that one click selects as a whole."""
    return f'<pre tabindex="0" aria-label="code">{escape(text.rstrip())}</pre>'


def card(tag: str, where: str, title: str, facts: Sequence[tuple[str, str]], tone: Tone = "") -> str:
    """A statement with its facts: name → text, code where the text has several lines. Facts without text are left
    out."""
    place = f" · <code>{escape(where)}</code>" if where else ""
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{code(text) if len(text.splitlines()) > 1 else prose(text)}</dd>\n"
        for name, text in facts
        if text
    )
    return (
        f'<article class="card {tone}">\n<p class="kicker"><span class="tag">{escape(tag)}</span>{place}</p>\n'
        f"<h3>{prose(title)}</h3>\n<dl>\n{rows}</dl>\n</article>"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False) -> str:
    """A table that scrolls where it is too wide; "" without rows.

    Args:
        heads: the columns' headings; the first column names the row.
        rows: cells as plain text.
        text: whether the cells are sentences, which wrap, instead of numbers.
    """
    if not rows:
        return ""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    kind = ' class="text"' if text else ""
    hint = '<p class="note hint">The table scrolls sideways.</p>\n' if len(heads) > 3 else ""
    return (
        f'{hint}<div class="scroll" tabindex="0"><table{kind}>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
    )
