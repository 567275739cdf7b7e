"""What the packages may know of each other, beyond the layers that lint-imports checks."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "unvanish"
PACKAGES = sorted(path.parent for path in SOURCE.glob("*/__init__.py"))


def private_imports(text: str, package: str) -> Iterator[str]:
    """`from unvanish.x import _y` where the importing file is not in x; compiled modules are no helpers."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "unvanish":
            of = [*node.module.split("."), ""][1]
            for name in node.names:
                hidden = name.name.startswith("_") or any(part.startswith("_") for part in node.module.split("."))
                if hidden and name.name != "_native" and of != package:
                    yield f"from {node.module} import {name.name}"


def test_no_private_helper_is_imported_across_packages() -> None:
    found = {
        f"{path.relative_to(SOURCE)}: {line}"
        for path in SOURCE.rglob("*.py")
        for line in private_imports(path.read_text(encoding="utf-8"), path.relative_to(SOURCE).parts[0])
    }
    assert found == set()


def test_a_private_import_across_packages_would_be_found() -> None:
    assert list(private_imports("from unvanish.flow.watch import _hidden", "report"))
    assert not list(private_imports("from unvanish.flow.watch import _hidden", "flow"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_says_what_belongs_in_it_and_what_does_not(package: Path) -> None:
    said = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    assert said is not None
    assert "\nBelongs here: " in said
    assert "\nDoes not: " in said


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_no_two_modules_have_one_name() -> None:
    # A command is named like the function that it calls.
    names = [path.name for path in SOURCE.rglob("*.py") if path.name != "__init__.py" and path.parent.name != "cli"]
    assert {name for name in names if names.count(name) > 1} == set()


def test_every_planted_bug_has_its_place() -> None:
    bugs = tomllib.loads((ROOT / "tests/mutations/planted.toml").read_text(encoding="utf-8"))["bug"]
    counts = {
        (bug["file"], bug["old"]): (ROOT / bug["file"]).read_text(encoding="utf-8").count(bug["old"]) for bug in bugs
    }
    assert {place for place, count in counts.items() if count != 1} == set()
