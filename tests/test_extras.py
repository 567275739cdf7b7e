"""What needs an extra says so in one sentence with the command; everything else runs without any."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from unvanish.extras import EXTRAS, MissingExtraError, extra

ROOT = Path(__file__).parent.parent

WITHOUT = """
import json, sys
from importlib.machinery import PathFinder

BLOCKED = set(sys.argv.pop(1).split(","))
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in BLOCKED else find_spec(name, *rest)
"""
"""Ahead of a program: these packages are as if they were not installed."""

CORE = """
import torch, unvanish as uv
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 1)
    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])

model, x, y = Model(), torch.randn(8, 12, 2), torch.randn(8, 1)
with uv.watch(model) as flow:
    nn.functional.mse_loss(model(x), y).backward()
flow.plot().figure.savefig("flow.png")
flow.save("a.flow")
uv.plot.flow(flow)
uv.plot.memory(uv.flow.gate_statistics(model.lstm, x))
uv.plot.terms(uv.flow.decompose(model.lstm, x))
uv.audit(model, x, y, loss=nn.functional.mse_loss)
found = uv.diagnose(model, x, y, loss=nn.functional.mse_loss, budget=0)
found.to_html("page.html")
uv.cures.chrono_(model, max_lag=12)
uv.restore(uv.accelerate(model))
uv.nn.Recurrent(uv.cells.ZOO["janet"](), 2, 4)(torch.randn(5, 3, 2))
from unvanish.report.following import Following
from unvanish.report.live import LiveServer
"""

NEEDS = {
    "pandas": [
        "flow.to_dataframe()",
        "flow['lstm.l0'].to_dataframe()",
        "found.to_dataframe()",
        "uv.audit(model, x, y, loss=nn.functional.mse_loss).to_dataframe()",
        "uv.flow.decompose(model.lstm, x).to_dataframe()",
        "uv.flow.gate_statistics(model.lstm, x).to_dataframe()",
        "uv.flow.lyapunov(model.lstm, x, n=1).to_dataframe()",
        "uv.flow.adjoint_map(model.lstm, x).to_dataframe()",
        "uv.flow.source_gradients(model.lstm, x, error=torch.randn(12, 8, 4)).to_dataframe()",
    ],
    "rich": ["uv.report.print_comparison"],
    "lightning": ["uv.flow.GradientFlow", "uv.train.compare", "uv.train.TASKS"],
}
"""What is missing → what needs it."""


def run(blocked: set[str], code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code, ",".join(sorted(blocked)), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def everything() -> set[str]:
    return {module for packages in EXTRAS.values() for module in packages} | {"scipy"}


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, packages in EXTRAS.items():
        declared = {re.split(r"[^\w-]", needed)[0] for needed in project["optional-dependencies"][name]}
        assert declared - {"unvanish"} == set(packages.values())
    core = {re.split(r"[^\w-]", needed)[0] for needed in project["dependencies"]}
    assert core == {"jinja2", "matplotlib", "numpy", "safetensors", "torch"}


def test_the_core_runs_without_any_extra_and_what_needs_one_names_it(tmp_path: Path) -> None:
    code = CORE + (
        "said = {}\n"
        "for needed in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        eval(needed)\n"
        "    except uv.extras.MissingExtraError as error:\n"
        "        said[needed] = str(error)\n"
        "print(json.dumps(said))\n"
    ).replace("uv.extras.", "__import__('unvanish.extras').extras.")
    entries = [needed for group in NEEDS.values() for needed in group]
    done = run(everything(), code, tmp_path, json.dumps(entries))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert set(said) == set(entries)
    for missing, group in NEEDS.items():
        name = next(name for name, packages in EXTRAS.items() if missing in packages)
        for entry in group:
            assert said[entry] == f"{missing} is not installed; run: pip install 'unvanish[{name}]'"
    assert (tmp_path / "flow.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("blocked", "arguments", "sentence"),
    [
        ("typer", ["doctor"], "typer is not installed; run: pip install 'unvanish[report]'"),
        ("rich", ["--help"], "rich is not installed; run: pip install 'unvanish[report]'"),
        *(
            ("lightning", words, "lightning is not installed; run: pip install 'unvanish[lab]'")
            for words in (
                ["compare", "--out", "new"],
                ["tasks"],
                ["train", "--task", "adding", "--out", "new"],
                ["predict", "model", "--data", "a.csv"],
                ["export", "model", "m.onnx"],
                ["report", "folder"],
                ["diagnose", "folder"],
            )
        ),
    ],
)
def test_a_command_that_lacks_its_extra_says_so(
    blocked: str, arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "results.json").write_text("{}")
    (tmp_path / "folder" / "config.json").write_text("{}")
    done = run({blocked}, "from unvanish.cli import main\nmain()\n", tmp_path, *arguments)
    assert (done.returncode, done.stderr.split()) == (2, f"error: {sentence}".split())
    assert not (tmp_path / "new").exists()


def test_only_a_missing_package_of_the_extra_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as other, extra("lab"):
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(other.value, MissingExtraError)


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "matplotlib", "lightning", "pandas", "scipy"}
    code = f"import sys, unvanish; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
