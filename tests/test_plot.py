"""Every record draws itself, on Axes given or made, and shows itself in a notebook without trusting its names."""

import dataclasses
import math
import re
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.axes import Axes
from torch import nn

import unvanish as uv
from tests.report_records import comparison, run
from unvanish.draw import short
from unvanish.flow import LayerFlow
from unvanish.flow.notebook import card, course, verdict
from unvanish.train.records import GradientBreakdown


def records() -> dict[str, Any]:
    torch.manual_seed(0)
    lstm, x = uv.cures.chrono_(nn.LSTM(3, 8), 30), torch.randn(30, 4, 3)
    with uv.watch(lstm, partial=True) as flow:
        y, _ = lstm(x)
        y[-1].sum().backward()
    found = uv.diagnose(nn.LSTM(3, 8), x, budget=0, loss=lambda output: output[0][-1].square().mean())
    cured = found.prescriptions[0].apply(nn.LSTM(3, 8))
    return {
        "flow": uv.flow.Flow(flow.layers),
        "layer": flow["l0"],
        "map": uv.flow.adjoint_map(lstm, x),
        "few sources": uv.flow.adjoint_map(lstm, x, sources=[3, 29]),
        "terms": uv.flow.decompose(lstm, x),
        "gates": uv.flow.gate_statistics(lstm, x),
        "sources": uv.flow.source_gradients(lstm, x, error=torch.ones_like(y)),
        "lyapunov": uv.flow.lyapunov(lstm, x, n=2),
        "diagnosis": found,
        "verification": found.verify(cured),
    }


RECORDS = records()
TAGS = RECORDS["layer"]._repr_html_().count("<")


@pytest.mark.parametrize("name", list(RECORDS))
def test_draws_and_shows_itself(name: str) -> None:
    record, open_before = RECORDS[name], plt.get_fignums()
    _, ax = plt.subplots()
    assert record.plot(ax) is ax
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    plt.close()
    made = record.plot()
    assert isinstance(made, Axes)
    assert made.has_data()
    html = record._repr_html_()
    assert ("<svg" if name in ("flow", "layer") else "data:image/png;base64,") in html
    assert "overflow-wrap:anywhere" not in html
    assert plt.get_fignums() == open_before


def test_curves_hold_the_records_numbers() -> None:
    few, gates = RECORDS["few sources"], RECORDS["gates"]
    drawn = few.plot().lines[1].get_ydata()
    assert torch.allclose(torch.tensor(drawn), few.log_norms[1].median(1).values / torch.tensor(10.0).log())
    assert sum(RECORDS["gates"].plot().patches[0].get_data().values) == len(gates.log_carry)
    lines = uv.plot.subgradients(RECORDS["layer"]).lines
    assert lines[0].get_ydata().tolist() == RECORDS["layer"].dweight.tolist()
    assert len(lines) == 2
    one = uv.plot.adjoint_map(few, sample=2).lines[0].get_ydata()
    assert float(one[0]) == pytest.approx(float(few.log_norms[0, 0, 2]) / 2.302585093, rel=1e-6)


def test_powers_are_whole_and_time_constants_have_ticks() -> None:
    for name in ("diagnosis", "map", "few sources", "sources"):
        figure = RECORDS[name].plot().figure
        figure.canvas.draw()
        labels = [text.get_text() for text in figure.axes[-1].get_yticklabels()]
        assert len(labels) > 1
        assert all(re.fullmatch(r"\$10\^\{-?\d+\}\$|[\d.e-]+", label) for label in labels), labels
    gates = RECORDS["gates"]
    for narrow in (gates, dataclasses.replace(gates, log_carry=-1 / torch.linspace(1.14, 1.83, 8).double())):
        ax = narrow.plot()
        low, high = ax.get_xlim()
        assert sum(low <= tick <= high for tick in ax.get_xticks()) >= 3


def test_a_comparisons_breakdown_has_the_same_pictures() -> None:
    steps, rows = [0, 2, 4, 6], [[-1.0, -0.5, 0.0, None], [-3.0, -2.0, -1.0, 0.0]]
    share: dict[str, list[float | None]] = {"carry": [0.75, 0.75, 0.75, None], "candidate": [0.25] * 4}
    subgradient, tau = [-4.0, -2.0, None, 0.0], [2.0, 30.0, None, 4.0]
    found = GradientBreakdown(0, steps, share, share, [None] * 4, subgradient, [1.0] * 4, 3, tau, [4, 6], rows)
    assert uv.plot.terms(found).lines[0].get_ydata()[:3].tolist() == [0.75] * 3
    drawn = uv.plot.subgradients(found).lines
    assert drawn[0].get_ydata()[1] == pytest.approx(-2 / math.log(10))
    assert len(drawn) == 2
    assert sum(uv.plot.memory(found).patches[0].get_data().values) == 3
    (mesh,) = uv.plot.adjoint_map(found).collections
    assert mesh.get_array().count() == 7
    with pytest.raises(ValueError, match="medians over samples"):
        uv.plot.adjoint_map(found, sample=0)
    plain = dataclasses.replace(found, time_constants=None)
    with pytest.raises(ValueError, match="no gate that carries"):
        uv.plot.memory(plain)


@pytest.mark.parametrize("name", ['<script>alert("1")</script>', "שלום \u202eabc", "$x_{$", "_", "n" * 300])
@pytest.mark.parametrize("kind", ["layer", "flow", "diagnosis"])
def test_hostile_names_stay_names(name: str, kind: str) -> None:
    layer, found = RECORDS["layer"], RECORDS["diagnosis"]
    hostile = {
        "layer": dataclasses.replace(layer, name=name),
        "flow": uv.flow.Flow({name: dataclasses.replace(layer, name=name)}),
        "diagnosis": dataclasses.replace(found, layers={name: next(iter(found.values()))}),
    }[kind]
    html = hostile._repr_html_()
    assert html.count("<") == html.count(">") == (5 if kind == "diagnosis" else TAGS)
    assert escape(short(name)) in html or escape(repr(name)[1:-1]) in html


def test_what_can_not_be_drawn_is_an_error() -> None:
    with uv.watch(nn.Identity()) as flow:
        h = torch.zeros(2, 3, requires_grad=True)
        uv.mark(h * 1, "mine").sum().backward()
    with pytest.raises(ValueError, match="marked states"):
        uv.plot.subgradients(flow["mine"])
    gates = uv.flow.gate_statistics(nn.RNN(3, 4), torch.randn(5, 2, 3))
    with pytest.raises(TypeError, match="no picture of a GateStatistics"):
        gates.plot()
    assert gates._repr_html_() is None
    with pytest.raises(IndexError):
        uv.plot.adjoint_map(RECORDS["map"], sample=9)


def test_a_layers_card_counts_the_steps_on_the_gradients_way() -> None:
    falling = torch.tensor([1e-9, 1e-5, 1e-3, 0.05, 1.0], dtype=torch.float64)[:, None].expand(5, 2)
    forward = LayerFlow("l0", "gru", ("r", "z", "n"), torch.tensor([5, 5]), falling)
    back = dataclasses.replace(forward, name="l0.reverse", dh=falling.flip(0))
    for record, at in ((forward, 4), (back, 0)):
        found = course(record)
        assert (found.at, found.above) == (at, 1)
        assert found.way[-1] == pytest.approx(-9)
        assert f"reach 1 of 4 steps, peak 1 at t={at}; 10⁻⁹ of the peak remains" in repr(record)
    half = dataclasses.replace(forward, dh=torch.zeros(5, 2, dtype=torch.float64))
    assert "no gradient arrived" in repr(half)
    assert "no gradient arrived" in half._repr_html_()
    broken = dataclasses.replace(forward, problem="weights changed")
    assert "<td" in broken._repr_html_()
    assert "no: weights changed" in broken._repr_html_()


def test_a_watch_shows_what_it_did_not_record() -> None:
    lstm = nn.LSTM(2, 3)
    with uv.watch(lstm) as flow:
        uv.mark("no tensor", "mine")  # type: ignore[arg-type]
        lstm(torch.randn(4, 2, 2))[0].sum().backward()
    assert list(flow.skipped) == ["mine"]
    assert "mine: not recorded: " in flow._repr_html_()


def test_a_card_is_layer_by_lag_on_one_axis() -> None:
    falling = torch.tensor([1e-9, 1e-5, 1e-3, 0.05, 1.0], dtype=torch.float64)[:, None].expand(5, 2)
    forward = LayerFlow("l0", "gru", ("r", "z", "n"), torch.tensor([5, 5]), falling)
    back = dataclasses.replace(forward, name="l0.reverse", dh=falling.flip(0))
    grown = dataclasses.replace(forward, name="grown", dh=falling.flip(0))
    ones = torch.ones(2, 2, dtype=torch.float64)
    brief = dataclasses.replace(forward, name="brief", dh=ones, lengths=torch.tensor([2, 2]))
    records = {record.name: record for record in (forward, back, grown, brief)}
    assert [verdict(record, course(record)) for record in records.values()] == ["fades", "fades", "grows", "arrives"]
    assert verdict(dataclasses.replace(forward, problem="no"), course(forward)) == "not judged"
    assert course(back).way == course(forward).way
    html = card(records, {})
    both = [re.findall(r'fill-opacity="([^"]+)"', strip) for strip in re.findall(r'<svg width="420".*?</svg>', html)]
    assert both[0] == both[1] == ["0.90", "0.75", "0.56", "0.34", "0.00"]
    widths = [float(w) for w in re.findall(r'width="([^"]+)" height="14" fill="none"', html)]
    assert [round(width + 1) for width in widths] == [420, 420, 84, 168]
    curves = re.findall(r'<polyline points="([^"]+)"', html)
    assert float(curves[0].split(",")[0]) == 120
    assert float(curves[1].split(",")[0]) == 0
    assert "read in reverse, from the first step to the last" in html


def test_gradients_over_the_lag_share_a_few_axes() -> None:
    found = comparison(run("lstm", -0.5, 0.1, after=-0.001), run("gru", -0.02, 0.1))
    before, after = (uv.plot.reach(found.tasks[0], moment=moment) for moment in ("before", "after"))
    assert before.get_ylim() == after.get_ylim() == (-60, 2)
    for slope, low in ((0.0, -8), (-0.18, -8), (-0.3, -20), (-1.0, -60), (-9.0, -60), (-math.inf, -60)):
        curve = torch.tensor([0.0, *(slope * lag for lag in range(1, 101))])
        assert uv.plot.decay({"a": curve}).get_ylim() == (low, 2)
    grows = uv.plot.decay({"a": torch.arange(20.0)})
    assert grows.get_ylim() == (-8, 9)
    for ax in (before, grows, RECORDS["diagnosis"].plot()):
        assert -2 in [line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1]
        assert " 1 %" in [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("steps", [5, 30, 2000])
def test_time_constants_lie_on_an_axis_that_the_length_alone_decides(steps: int) -> None:
    for layer in (nn.LSTM(3, 8), uv.cures.chrono_(nn.GRU(3, 8), 30)):
        ax = uv.flow.gate_statistics(layer, torch.randn(steps, 1, 3)).plot()
        assert ax.get_xlim() == (1, max(100, 10 * steps))
        assert ax.get_xscale() == "log"
        assert steps in ax.lines[0].get_xdata()


def test_every_line_is_named_at_its_end() -> None:
    many = uv.flow.lyapunov(nn.LSTM(3, 16), torch.randn(8, 2, 3), n=30)
    drawn = {"flow": 2, "few sources": 2, "terms": 5, "sources": 3, "lyapunov": 2, "diagnosis": 1, "verification": 2}
    pictures = {name: (RECORDS[name].plot(), number) for name, number in drawn.items()}
    pictures["subgradients"] = uv.plot.subgradients(RECORDS["layer"]), 2
    pictures["many"] = many.plot(), 17
    for name, (ax, number) in pictures.items():
        ax.figure.canvas.draw()
        ends = [text for text in ax.texts if text.get_gid() == "unvanish-line-end"]
        assert len(ends) == number, name
        assert ax.get_legend() is None
        boxes = sorted((text.get_window_extent() for text in ends), key=lambda box: box.y0)
        assert all(ax.bbox.y0 <= (box.y0 + box.y1) / 2 <= ax.bbox.y1 for box in boxes), name
        assert all(below.y1 <= above.y0 + 3 for below, above in pairwise(boxes)), name
        assert all(box.x1 <= ax.figure.bbox.x1 for box in boxes), name
        colours = {line.get_label(): line.get_color() for line in ax.lines}
        assert all(colours[text.get_text()] == text.get_color() for text in ends)
    names = [text.get_text() for text in pictures["many"][0].texts]
    assert {"λ1", "λ30"} <= set(names)


def test_a_layer_alone_has_a_line_at_one_percent_of_its_largest_norm() -> None:
    layer = RECORDS["layer"]
    largest = max(float(v.median(1).values.max()) for v in (layer.dh, layer.dc))
    levels = [line.get_ydata()[0] for line in layer.plot().lines if len(line.get_xdata()) == 2]
    assert levels == [pytest.approx(0.01 * largest, rel=0.05)]


def test_colours_of_a_map_mean_the_same_on_every_map() -> None:
    spans = set()
    for scale in (1.0, 60.0):
        found = dataclasses.replace(RECORDS["map"], log_norms=RECORDS["map"].log_norms * scale)
        (mesh,) = found.plot().collections
        low, high = mesh.get_clim()
        spans.add(high - low)
        assert high >= mesh.get_array().max() > high - 1
    assert spans == {16}
