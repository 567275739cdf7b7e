"""`--packages-table FILE` writes what test_packages.py measured into the page, between its two marks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributions.transforms import ComposeTransform, Transform

INVERSES = {kind: kind.inv for kind in (Transform, ComposeTransform)}
ROWS = pytest.StashKey[list[dict[str, str]]]()
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--packages-table", metavar="FILE", help="page whose table is replaced by what was measured")


@pytest.fixture(autouse=True)
def transforms_as_torch_made_them() -> Iterator[None]:
    """torchrl replaces `Transform.inv` when it is imported, in a way that later torch versions do not fit: the
    distributions of other packages fail beside it."""
    yield
    for kind, inverse in INVERSES.items():
        kind.inv = inverse  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def packages_table(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    return request.config.stash.setdefault(ROWS, [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows, path = session.config.stash.get(ROWS, []), session.config.getoption("--packages-table", None)
    if not path or not rows:
        return
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    page = Path(path)
    head, rest = page.read_text().split(BEGIN)
    page.write_text("\n".join([head + BEGIN, "", *lines, "", END + rest.split(END)[1]]))
