"""The command line as a whole: help, defaults, interruption, what it imports and how it looks."""

import inspect
import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from tests.test_compare import call
from unvanish import engine, train
from unvanish.cli import app as app_module
from unvanish.cli.app import app
from unvanish.cli.installed import installed
from unvanish.cli.interrupt import Commands, ended_like_ctrl_c
from unvanish.cli.train import train as train_command


def test_tasks_and_doctor_say_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["tasks"], monkeypatch) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in train.TASKS)
    assert call(["doctor"], monkeypatch) == 0
    said = capsys.readouterr().out
    assert "native: runs" in said or "the extension is not built" in said
    assert "not used" in said or f"instruction set: {engine.isa()}" in said
    assert call(["tasks", "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["adding"]["default_length"] == train.TASKS["adding"].default_length
    assert call(["doctor", "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__
    assert torch.__version__ in said
    assert f"threads      {torch.get_num_threads()}\n" in said
    assert f"safetensors  {metadata.version('safetensors')}\n" in said


def test_an_optional_part_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2.8", "no-such-part>=1; extra == 'mnist'", "ruff; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    assert installed() == {
        "torch": metadata.version("torch"),
        "no-such-part": "not installed; pip install 'unvanish[mnist]'",
    }


@pytest.mark.parametrize(("said", "expected"), [("", "interrupted; nothing was written"), ("kept", "kept")])
@pytest.mark.parametrize("where", [(Commands, "make_context"), (train, "compare")])
def test_ctrl_c_ends_with_a_line_and_130(
    said: str,
    expected: str,
    where: tuple[Any, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt(said)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(*where, interrupted)
    assert call(["compare"], monkeypatch) == 130
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert expected in told or where[0] is Commands
    assert list(tmp_path.iterdir()) == []


def test_sigterm_ends_like_ctrl_c_and_other_handlers_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(*args: Any, **kwargs: Any) -> None:
        (kwargs["flows"] / "half").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "compare", ended)
    own: list[int] = []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert call(["compare"], monkeypatch) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, lambda number, frame: own.append(number))
    try:
        with ended_like_ctrl_c():
            os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:  # which would end all tests
        pytest.fail("the handler that stood before was not called")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert own == [signal.SIGTERM]


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "lightning", "matplotlib", "numpy", "pandas", "jinja2", "safetensors", "sklearn"]
    code = (
        "import sys; from unvanish.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    for arguments in (["--help"], ["compare", "--help"], ["diagnose", "--help"], ["train", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert "Usage: " in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"
    done = subprocess.run([sys.executable, "-c", code, "report", "gone"], capture_output=True, text=True)
    assert "FOLDER: gone has no results.json" in done.stderr
    assert done.stdout == "[]\n"


def test_measuring_and_curing_import_torch_alone() -> None:
    heavy = "jinja2 lightning matplotlib pandas pydantic rich safetensors sklearn typer"
    code = (
        "import sys, torch; before = set(sys.modules); import unvanish as uv\n"
        "uv.watch, uv.nn, uv.engine, uv.flow, uv.cures, uv.diagnose, uv.accelerate\n"
        f"print(*({{m.split('.')[0] for m in set(sys.modules) - before}} & set({heavy.split()})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_help_shows_all_of_what_it_says() -> None:
    """Rich takes what stands in square brackets for markup, and leaves it out."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    said = [option.help or "" for command in commands.values() for option in command.params]
    assert len(said) > 50
    assert [text for text in said if "[" in text] == []


def test_the_command_line_has_the_defaults_of_what_it_calls() -> None:
    """They stand twice, as nothing heavy is imported for --help."""
    for called, command in ((train.compare, app_module.compare), (train.Settings, train_command)):
        given = inspect.signature(command).parameters
        for name, parameter in inspect.signature(called).parameters.items():
            if name in given and name != "cells":
                assert given[name].default == parameter.default, name
    assert inspect.signature(app_module.compare).parameters["cells"].default == ",".join(train.DEFAULT_CELLS)
    assert {field.name for field in fields(train.Settings)} <= inspect.signature(train_command).parameters.keys()


def test_the_shell_completes_commands_and_options() -> None:
    script = Path(sys.executable).parent / "unvanish"
    for words, position, expected in (("unvanish co", 1, "compare"), ("unvanish compare --hid", 2, "--hidden")):
        environment = {
            **os.environ, "_UNVANISH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position),
        }  # fmt: skip
        done = subprocess.run([script], capture_output=True, text=True, env=environment)
        assert done.stdout.split() == [expected]


def test_a_mistake_of_ours_is_no_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves `main` as it is: Python prints the traceback and exits with 1."""
    monkeypatch.setattr("unvanish.train.environment", lambda: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        call(["doctor"], monkeypatch)


def test_colour_only_where_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train.compare(["adding"], ["rnn"], steps=2, hidden=4, batch=4, length=12, seeds=1)
    (tmp_path / "results.json").write_text(json.dumps(result.to_json()))
    monkeypatch.setenv("COLUMNS", "80")
    for variables, coloured in (
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ):
        with monkeypatch.context() as patch:
            for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TERM"):
                patch.delenv(name, raising=False)
            patch.setenv("TERM", "xterm-256color")
            for name, value in variables.items():
                patch.setenv(name, value)
            assert call(["report", str(tmp_path)], patch) == 0
        said = capsys.readouterr().out
        assert "tanh-RNN" in said
        assert ("\x1b[31m" in said) is coloured
    assert call(["report", str(tmp_path), "--quiet"], monkeypatch) == 0
    assert capsys.readouterr().out == ""
