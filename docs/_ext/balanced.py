"""Pages that run code are dealt out evenly to the processes that read them.

Sphinx gives each process a run of pages in the order of their names, and the slowest pages are neighbours.
"""

from pathlib import Path
from typing import Any

from sphinx.util.parallel import make_chunks

COMMAND = 5
"""A command costs as much as this many other cells: it starts Python and imports torch and Lightning."""


def deal(app: Any, env: Any, docnames: list[str]) -> None:
    """The most expensive pages first, one to each chunk in turn."""
    room = [len(chunk) for chunk in make_chunks(docnames, app.parallel)]
    chunks: list[list[str]] = [[] for _ in room]
    for name in sorted(docnames, key=lambda name: -_cost(Path(env.doc2path(name)))):
        free = [i for i, chunk in enumerate(chunks) if len(chunk) < room[i]]
        chunks[min(free, key=lambda i: len(chunks[i]))].append(name)
    docnames[:] = [name for chunk in chunks for name in chunk]


def _cost(page: Path) -> int:
    text = page.read_text(encoding="utf-8")
    return text.count("{code-cell}") + COMMAND * text.count("\n!unvanish")


def setup(app: Any) -> dict[str, bool]:
    """Reorder the pages before they are read."""
    app.connect("env-before-read-docs", deal)
    return {"parallel_read_safe": True}
