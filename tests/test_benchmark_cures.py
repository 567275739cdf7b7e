"""The benchmark of the cures: its grid, its file, its intervals, and one training of each kind of outcome."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cures.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))  # as Python does for a script
    spec = importlib.util.spec_from_file_location("benchmark_cures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


def test_grid_has_every_case_once_and_blocks_differ_in_everything(script: ModuleType) -> None:
    cases = script.grid()
    sizes = [script.TASKS, script.CELLS, script.CURES, script.LAGS, script.RATES, script.SEEDS]
    assert len(script.refusals()) == 34
    fitting = 1 - 34 / (len(script.CELLS) * len(script.CURES))
    assert len(set(cases)) == len(cases) == round(float(torch.tensor([len(s) for s in sizes]).prod()) * fitting)
    first, second = script.grid(1)[-1], script.grid(2)[-1]
    assert not set(first[:3]) & set(second[:3])


def test_a_line_that_was_cut_off_is_trained_again(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "found.csv"
    path.write_text(",".join(script.HEADER) + "\n" + "50,0.01,0,adding,LSTM,as it is,,0,8,49,2.1\n" + "50,0.01,0,add")
    assert [found["cure"] for found in script.read(path)] == ["as it is"]
    assert path.read_text().endswith(",2.1\n")


def test_what_is_read_is_what_was_found(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "found.csv"
    path.write_text(",".join(script.HEADER) + "\n")
    case = script.Case(50, 0.01, 0, "adding", "LSTM", "chrono_(T)")._asdict()
    found = [
        case | {"learnt_at": 75, "diverged": False, "reach_before": 8, "reach_after": 49, "seconds": 2.1},
        case | {"learnt_at": None, "diverged": True, "reach_before": 8, "reach_after": None, "seconds": 0.4},
    ]
    for one in found:
        script.write(path, one)
    assert script.read(path) == found


def test_intervals_are_wilsons(script: ModuleType) -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    wilson = sys.modules[script.report.__module__].wilson
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_outcomes(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[script.train.__module__], "UPDATES", 125)
    script.material.cache_clear()
    case = script.Case(12, 1e-2, 0, "noise-free", "GRU", "chrono_(T)")
    learnt = script.train(case)
    assert learnt["learnt_at"] is not None
    assert learnt["reach_before"] == 11
    assert not learnt["diverged"]
    assert "no recurrent matrix" in script.refusals()["IndRNN", "orthogonal_"]
    script.material.cache_clear()


def test_the_published_tables_are_those_of_the_published_trainings(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    script.report(script.read(script.PUBLISHED))
    shown = {line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    page = (SCRIPT.parent / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(shown) > 60
    assert shown <= set(page)
