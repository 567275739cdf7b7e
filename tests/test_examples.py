"""Every script in examples/ runs as it stands, and what it shows holds."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"

Run = tuple[dict[str, Any], str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run one in an empty folder on one thread: (its globals, what it printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def _run(name: str) -> Run:
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__"), capsys.readouterr().out

    yield _run
    torch.set_num_threads(threads)


def test_my_lstm_forgets(run: Any) -> None:
    found, printed = run("my_lstm_forgets.py")
    assert float(found["left"][-1]) == 1.0
    assert float(found["left"][-101]) < 1e-15
    assert found["layer"].residual < 1e-5
    assert printed.count("of the gradient remains") == 5


def test_where_does_the_gradient_vanish(run: Any) -> None:
    found, _ = run("where_does_the_gradient_vanish.py")
    assert sum(found["shares"].values()) == pytest.approx(1, abs=0.1)
    assert max(found["shares"], key=found["shares"].get) == "carry"


def test_watch_a_training_loop(run: Any) -> None:
    found, _ = run("watch_a_training_loop.py")
    reach = found["reach"]
    assert max(reach[update] for update in (0, 50, 100)) < 15
    assert reach[300] == 29
    assert found["loss_of"](301).item() < 0.1


def test_cure_and_prove(run: Any) -> None:
    found, _ = run("cure_and_prove.py")
    (plain_left, plain_wrong), (cured_left, cured_wrong) = found["results"][False], found["results"][True]
    assert plain_left < 1e-15 < 1e-3 < cured_left
    assert cured_wrong < 0.5 < 0.75 < plain_wrong


def test_every_error_source(run: Any, tmp_path: Path) -> None:
    found, _ = run("every_error_source.py")
    assert max(found["reaches"]) < 20
    assert 0.1 < float(found["summed"][10] / found["summed"][90]) < 10
    assert (tmp_path / "adjoint-map.png").stat().st_size > 10_000


def test_hunt_a_nan(run: Any) -> None:
    _, printed = run("hunt_a_nan.py")
    assert re.search(r"l1: infinity first appears in the forward pass at step \d+, sample \d+, in gate h", printed)


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run("{path.name}")' in source for path in EXAMPLES.glob("*.py"))
