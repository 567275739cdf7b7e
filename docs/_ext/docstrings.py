"""Our docstrings as Sphinx reads them.

In the source a docstring is plain text: `code` in single backticks, an equation or example indented or one line each,
symbols such as h_t, |λ| or chrono_ as they stand. Sphinx takes a docstring for reStructuredText, where most of these
mean something. This turns the first into the second, before napoleon reads the sections (Args, Returns, Raises).
"""

import re
from typing import Any

SECTIONS = {"Args:", "Returns:", "Raises:", "Warns:", "Yields:"}
"""Headings that napoleon reads, whose entries are indented."""

_SPAN = re.compile(r"`([^`]+)`")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_SPECIAL = re.compile(r"\\|\*(?!\*)|\||(?<=\w)_(?!\w)")
_EQUATION = re.compile(r"^\S.*? (=|←|→|≤) ")


def convert(lines: list[str]) -> list[str]:
    """reStructuredText of a docstring."""
    out: list[str] = []
    section = False
    for block in _blocks(lines):
        first = block[0]
        if first.strip() in SECTIONS and not first.startswith(" "):
            section = True
        elif not first.startswith(" "):
            section = False
        if first.lstrip().startswith(">>>"):
            out += [*block, ""]
        elif first.startswith(" ") and not section:
            out += ["::", "", *block, ""]
        elif not section and not first.startswith("-") and len(block) > 1 and all(map(_EQUATION.match, block)):
            out += ["::", "", *("    " + line for line in block), ""]
        else:
            out += [*map(inline, block), ""]
    return out


def inline(line: str) -> str:
    """One line of prose."""
    parts = _SPAN.split(line)
    return "".join(_code(part) if i % 2 else _SPECIAL.sub(r"\\\g<0>", part) for i, part in enumerate(parts))


def _code(text: str) -> str:
    if _NAME.fullmatch(text):
        return f":py:obj:`{text}`"
    # The space keeps what follows, as in `h`s, from running into the quotes; it is not shown.
    return f"``{text}``\\ "


def _blocks(lines: list[str]) -> list[list[str]]:
    """Paragraphs; what is indented below a paragraph, without an empty line between, belongs to it."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    merged: list[list[str]] = []
    for block in filter(None, blocks):
        # An indented code block may hold empty lines.
        if merged and block[0].startswith(" ") and merged[-1][0].startswith(" ") and not _in_section(merged):
            merged[-1] += ["", *block]
        else:
            merged.append(block)
    return merged


def _in_section(blocks: list[list[str]]) -> bool:
    heads = [block[0].strip() for block in blocks if not block[0].startswith(" ")]
    return bool(heads) and heads[-1] in SECTIONS


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = convert(lines)
    if what in ("attribute", "data", "property"):
        # Else napoleon takes what stands before the first colon for the attribute's type; an empty comment stops it.
        lines[:0] = ["..", ""]


def setup(app: Any) -> dict[str, bool]:
    """Listen before napoleon does."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True}
