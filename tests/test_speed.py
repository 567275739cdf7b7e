"""`unvanish bench` times the right calls; how fast they are no test says."""

import json
import math
import re

import pytest
import torch
from typer.testing import CliRunner

from unvanish.cli.app import app
from unvanish.nn import speed


def test_rows_are_sixty_layers_in_every_use() -> None:
    rows = speed.rows()
    assert len({(r.kind, r.shape) for r in rows}) == 60
    assert len(set(rows)) == len(rows)
    assert {(r.train, r.low, r.stepped) for r in rows} == {
        (a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)
    }


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("stepped", [True, False])
def test_both_sides_run_the_same_layer(train: bool, low: bool, stepped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    monkeypatch.setattr(speed, "STEPS", 3)
    for ours in (False, True):
        torch.manual_seed(0)
        seen = []
        row = speed.Row("GRU", (1 if stepped else 4, 2, 3, 5), train, low, stepped)
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output, seen=seen: seen.append(
                (output[0], torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
            )
        )
        with handle:
            speed._call(row, ours)()
        assert len(seen) == (3 if stepped else 1)
        assert all((grad, rounded) == (train, low) for _, grad, rounded in seen)
        outputs.append(torch.cat([y for y, *_ in seen]))
    tolerance = 2e-2 if low else 1e-5
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)


def test_a_ratio_is_torchs_time_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])

    def call(row: speed.Row, ours: bool):
        def run() -> None:
            clock[0] += 1.0 if ours else 3.0

        return run

    monkeypatch.setattr(speed, "_call", call)
    told: list[speed.Timing] = []
    (found,) = speed.compare_speed(speed.rows()[:1], 1e-3, told.append)
    assert (found.torchs, found.ratio) == (3.0, 3.0)
    assert told == [found]
    assert speed.geometric_mean([found, speed.Timing(found.row, 1.0, 1 / 3)]) == pytest.approx(1.0)


def test_where_torchs_layer_cannot_run_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = speed._call

    def call(row: speed.Row, ours: bool):
        def refuse() -> None:
            raise RuntimeError("could not create a primitive descriptor")

        return refuse if row.low and row.kind == "LSTM" and not ours else plain(row, ours)

    monkeypatch.setattr(speed, "_call", call)
    monkeypatch.setattr(speed, "SHAPES", ((1, 1, 2, 3),))
    monkeypatch.setattr(speed, "SHORTEST", 0.0)
    text = CliRunner().invoke(app, ["bench", "--seconds", "0.001"])
    assert text.exit_code == 0
    words = " ".join(text.stdout.split())
    assert "only ours runs" in words
    assert "Not timed: 4 rows in which torch's layer raises an error here, ours does not." in words
    rows = json.loads(CliRunner().invoke(app, ["bench", "--seconds", "0.001", "--json"]).stdout)
    assert {r["ratio"] is None for r in rows if r["kind"] == "LSTM" and r["low"]} == {True}


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf])
def test_seconds_are_a_positive_number(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds: expected a positive number"):
        speed.compare_speed(speed.rows(), seconds)


def test_the_command_says_what_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SHAPES", ((1, 1, 2, 3), (2, 1, 2, 3)))
    monkeypatch.setattr(speed, "SHORTEST", 0.0)
    text = CliRunner().invoke(app, ["bench", "--seconds", "0.001"])
    assert text.exit_code == 0
    words = text.stdout.replace("\n", " ")
    assert re.search(r"accelerate makes float32 training this many times as fast: RNN .*; in bfloat16: RNN .*\.", words)
    rows = json.loads(CliRunner().invoke(app, ["bench", "--seconds", "0.001", "--json"]).stdout)
    assert len(rows) == len(speed.rows())
    assert all(row["ratio"] > 0 for row in rows if row["ratio"] is not None)
