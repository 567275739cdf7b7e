"""Every code block of README and documentation that no build of the pages executes runs here, or is held to what it
names: a block that breaks turns this red. `make docs` executes the others, the code cells.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from unvanish.cli.app import app, main

ROOT = Path(__file__).parent.parent


class Block(NamedTuple):
    page: str
    language: str
    text: str


def blocks() -> list[Block]:
    """Fenced blocks that are no MyST directive."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    fence = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
    return [
        Block(str(page.relative_to(ROOT)), match[2].strip(), match[3])
        for page in pages
        if "_build" not in page.parts
        for match in fence.finditer(page.read_text(encoding="utf-8"))
        if not match[2].startswith("{")
    ]


def commands(block: Block) -> list[list[str]]:
    """Each line of a shell block as arguments; without comments, environment and what follows &&."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))]


BLOCKS = blocks()
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [words for block in BLOCKS if block.language == "sh" for words in commands(block)]
OURS = [words for words in SHELL if "unvanish" in words]


def test_blocks_are_found_and_of_kinds_that_are_checked() -> None:
    assert {block.language for block in BLOCKS} == {"python", "sh", "text", "yaml"}
    assert len(PYTHON) >= 3
    assert len(OURS) >= 10


class Reader(nn.Module):
    """A user's model, for blocks that speak of one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0][:, -1]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_python(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "model": Reader(),
        "x": torch.randn(4, 20, 3),
        "y": torch.randn(4, 8),
        "loss_fn": nn.functional.mse_loss,
    }
    monkeypatch.chdir(tmp_path)
    # A page sets it; it is not to outlive the page.
    with torch._dynamo.config.patch(allow_rnn=False):
        exec(compile(block.text, block.page, "exec"), names)
    if "flow.png" in block.text:
        assert (tmp_path / "flow.png").stat().st_size > 10_000


def test_files_that_pages_name_are_there() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]
    named = {
        (str(page.relative_to(ROOT)), name)
        for page in pages
        if "_build" not in page.parts
        for name in re.findall(r"\b(?:src|csrc|tests|benchmarks|examples|docs)/[\w/.-]*\w", page.read_text("utf-8"))
        if "NAME" not in name
    }
    assert len(named) > 20
    assert {(page, name) for page, name in named if not (ROOT / name).exists()} == set()


def test_yaml() -> None:
    for block in BLOCKS:
        if block.language == "yaml":
            assert "jobs" in yaml.safe_load(block.text)


def test_shell_names_what_there_is() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    options = set(re.findall(r"UNVANISH_\w+", (ROOT / "CMakeLists.txt").read_text()))
    for words in SHELL:
        if "unvanish" in words:
            continue
        match words:
            case ["make", *named]:
                assert targets >= set(named)
            case ["git", "clone", *_] | ["cd", *_]:
                pass
            case ["pip", "install", *rest] | [".venv/bin/pip", "install", *rest]:
                assert rest[:2] == ["-c", "constraints.txt"]
                assert rest[2:] in (["."], [".[lab]"])
                assert (ROOT / "constraints.txt").is_file()
            case ["cmake", *rest]:
                assert {word[2:].partition("=")[0] for word in rest if word.startswith("-D")} <= options
            case [program, *_] if program.startswith("build/"):
                assert "add_executable(stress" in (ROOT / "CMakeLists.txt").read_text()
            case _:
                pytest.fail(f"nothing checks {shlex.join(words)}")


@pytest.mark.parametrize("words", OURS, ids=shlex.join)
def test_options_of_our_commands_parse(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser
    from typer.main import get_command

    before, [command, *arguments] = words[: words.index("unvanish")], words[words.index("unvanish") + 1 :]
    if before and Path(before[0]).name == "torchrun":
        get_args_parser().parse_args([*before[1:], "unvanish"])
    else:
        assert before in ([], ["srun"])
    context = get_command(app).make_context("unvanish", [command, *arguments])  # type: ignore[attr-defined]
    with context:
        found = context.command.get_command(context, command)  # type: ignore[attr-defined]
        assert found is not None, f"there is no command {command}"
        with found.make_context(command, list(arguments), parent=context):
            pass


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the pages speak of, small."""
    rng = np.random.default_rng(0)
    steps = pd.DataFrame(rng.normal(size=(60, 12)), columns=[f"t{i}" for i in range(12)])
    steps.to_csv(tmp_path / "new.csv", index=False)
    steps.assign(fault=rng.integers(2, size=60)).to_csv(tmp_path / "sensors.csv", index=False)
    machine, day = np.repeat(np.arange(40), 6), np.tile(np.arange(6), 40)
    readings = {"machine": machine, "day": day, "load": rng.normal(size=240), "fault": machine % 2}
    pd.DataFrame(readings).to_parquet(tmp_path / "sensors.parquet")
    pd.DataFrame({"day": range(500), "sold": rng.normal(size=500)}).to_csv(tmp_path / "sales.csv", index=False)
    reviews = {"review": ["so fine", "so dull"] * 20, "label": ["pos", "neg"] * 20}
    pd.DataFrame(reviews).to_csv(tmp_path / "reviews.csv", index=False)
    series = "\n".join(f"{','.join(map(str, rng.normal(size=8)))}:{k % 2}" for k in range(20))
    (tmp_path / "JapaneseVowels_TRAIN.ts").write_text(
        f"@problemName vowels\n@univariate true\n@classLabel true 0 1\n@data\n{series}\n"
    )
    (tmp_path / "book.txt").write_text("Call me what you like. " * 400)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["unvanish", *arguments])
    main()


def test_train_and_predict_on_small_files(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands of docs/howto/cluster.md, each for two updates, on one process."""
    page = [words for b in BLOCKS if b.page == "docs/howto/cluster.md" for words in commands(b)]
    trained = 0
    for words in page:
        if words[:2] == ["unvanish", "train"] and "--devices" not in words:
            trained += 1
            run(monkeypatch, *words[1:], "--steps", "2", "--every", "2", "--hidden", "4", "--out", f"model{trained}")
            assert (data / f"model{trained}" / "config.json").is_file()
            if "book.txt" in words:
                book = f"model{trained}"
    assert trained >= 7
    for words in page:
        if words[:2] == ["unvanish", "predict"]:
            capsys.readouterr()
            run(monkeypatch, "predict", book if "--prompt" in words else "model1", *words[3:])
            said = capsys.readouterr().out
            assert said.startswith("Call me" if "--prompt" in words else "sequence,prediction")


def test_a_shell_line_that_fails_in_a_page_fails_its_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONSTARTUP", str(ROOT / "docs" / "_ext" / "kernel_startup.py"))

    def build(*lines: str) -> str:
        cells = [nbformat.v4.new_code_cell(line) for line in lines]
        book = nbformat.v4.new_notebook(cells=cells)
        nbclient.NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
        return book.cells[-1].outputs[0].text

    assert build("word = 'said'", "! echo {word} aloud; echo code $?") == "said aloud\ncode 0\n"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="exit code 3"):
        build("!exit 3")
