"""What a flow says of itself, in print, in a notebook, on its page and on its card, for every kind of course."""

import math
import re
from dataclasses import replace
from html import unescape

import pytest
import torch

from unvanish.draw import fraction
from unvanish.flow import Flow, LayerFlow
from unvanish.flow.flow_page import flow_page, flow_preview
from unvanish.flow.notebook import card, course, in_words, verdict

inf, nan = math.inf, math.nan


def record(norms: list, name: str = "l0", **other) -> LayerFlow:
    """Of the norms over t, of one sample, or of several."""
    dh = torch.tensor(norms, dtype=torch.float64)
    dh = dh[:, None] if dh.dim() == 1 else dh
    lengths = other.pop("lengths", torch.full((dh.shape[1],), len(dh)))
    return LayerFlow(name, "gru", ("r", "z", "n"), lengths, dh, **other)


ONE = "Every recorded layer has one step, so no gradient travels through time."
NONE = "No gradient arrived in any recorded layer."
END = "No layer's gradient fades on its way: that of {} is largest at its end, step {}."
LEFT = "Of the gradient's peak in {}, {} further back in time."
BAD = "In l0 the gradient is NaN or infinite at t={}."
RAGGED = record([[1.0, 0.1], [2.0, 0.2], [0.0, 0.3]], lengths=torch.tensor([2, 3]))
WITH_CELL = record([1e-9, 1e-3, 1.0], dc=torch.tensor([[0.5], [0.7], [1.0]], dtype=torch.float64))
SAYS = "reach {}, peak {}; {} at the end of its way"
# the record, in print, verdict, (reach, at the far end) in the notebook, headline of the page, large type of the card
COURSES = {
    "one step": (record([2.0]), "2 at the only step", "travels no step", ("–", "–"), ONE, "one step"),
    "one step without gradient": (record([0.0]), "no gradient arrived", "no gradient", ("–", "–"), NONE, "no gradient"),
    "no gradient": (record([0.0] * 5), "no gradient arrived", "no gradient", ("–", "–"), NONE, "no gradient"),
    "no steps": (record([]), "no gradient arrived", "no gradient", ("–", "–"), NONE, "no gradient"),
    "no samples": (record([[]] * 3), "no gradient arrived", "no gradient", ("–", "–"), NONE, "no gradient"),
    "NaN": (
        record([nan] * 4),
        "the gradient is NaN or infinite at t=3",
        "not finite",
        ("–", "–"),
        BAD.format(3),
        "not finite",
    ),
    "NaN on its way": (
        record([1.0, nan, 2.0]),
        "the gradient is NaN or infinite at t=1",
        "not finite",
        ("–", "–"),
        BAD.format(1),
        "not finite",
    ),
    "infinite": (
        record([1.0, inf, 2.0]),
        "the gradient is NaN or infinite at t=1",
        "not finite",
        ("–", "–"),
        BAD.format(1),
        "not finite",
    ),
    "NaN in one sample": (
        record([[1.0, 1.0], [1.0, nan]]),
        "the gradient is NaN or infinite at t=1",
        "not finite",
        ("–", "–"),
        BAD.format(1),
        "not finite",
    ),
    "largest at the end": (
        record([4.0, 3, 2, 1]),
        "does not fade on its way; peak 4 at t=0, where it ends",
        "arrives",
        ("–", "its peak"),
        END.format("l0", 0),
        "fades in no layer",
    ),
    "at the end of its way alone": (
        record([0.0, 0.0, 3.0], "l0.reverse"),
        "3 at t=2 alone, where its way ends",
        "travels no step",
        ("–", "–"),
        END.format("l0.reverse", 2),
        "fades in no layer",
    ),
    "grows": (
        record([1e5, 1.0, 1e-3]),
        "does not fade on its way; peak 1e+05 at t=0, where it ends",
        "grows",
        ("–", "its peak"),
        END.format("l0", 0),
        "fades in no layer",
    ),
    "grows, then fades": (
        record([1e-3, 1.0, 1e-3]),
        SAYS.format("0 of 1 step", "1 at t=1", "10⁻³ of the peak remains"),
        "grows",
        ("0 of 1 step", "10⁻³ of the peak"),
        LEFT.format("l0", "10⁻³ remains 1 step"),
        "reach 0 of 1 step",
    ),
    "constant": (
        record([1.0] * 4),
        SAYS.format("3 of 3 steps", "1 at t=3", "all of the peak remains"),
        "arrives",
        ("3 of 3 steps", "all of the peak"),
        END.format("l0", 0),
        "fades in no layer",
    ),
    "whole": (
        record([0.5, 0.7, 1.0]),
        SAYS.format("2 of 2 steps", "1 at t=2", "50 % of the peak remains"),
        "arrives",
        ("2 of 2 steps", "50 % of the peak"),
        LEFT.format("l0", "50 % remains 2 steps"),
        "fades in no layer",
    ),
    "nearly constant": (
        record([0.9999, 1.0]),
        SAYS.format("1 of 1 step", "1 at t=1", "100 % of the peak remains"),
        "arrives",
        ("1 of 1 step", "100 % of the peak"),
        LEFT.format("l0", "100 % remains 1 step"),
        "fades in no layer",
    ),
    "below one percent": (
        record([0.0031, 1.0]),
        SAYS.format("0 of 1 step", "1 at t=1", "0.31 % of the peak remains"),
        "fades",
        ("0 of 1 step", "0.31 % of the peak"),
        LEFT.format("l0", "0.31 % remains 1 step"),
        "reach 0 of 1 step",
    ),
    "fades": (
        record([1e-9, 1e-3, 0.1, 1.0]),
        SAYS.format("1 of 3 steps", "1 at t=3", "10⁻⁹ of the peak remains"),
        "fades",
        ("1 of 3 steps", "10⁻⁹ of the peak"),
        LEFT.format("l0", "10⁻⁹ remains 3 steps"),
        "reach 1 of 3 steps",
    ),
    "fades to nothing": (
        record([0.0, 0.0, 1e-3, 1.0]),
        SAYS.format("0 of 3 steps", "1 at t=3", "nothing remains"),
        "fades",
        ("0 of 3 steps", "nothing"),
        LEFT.format("l0", "nothing is left 3 steps"),
        "reach 0 of 3 steps",
    ),
    "below float64's normal range": (
        record([1e-320, 1e-200, 1.0]),
        SAYS.format("0 of 2 steps", "1 at t=2", "10⁻³²⁰ of the peak remains"),
        "fades",
        ("0 of 2 steps", "10⁻³²⁰ of the peak"),
        LEFT.format("l0", "10⁻³²⁰ remains 2 steps"),
        "reach 0 of 2 steps",
    ),
    "read in reverse": (
        record([1.0, 1e-3, 1e-6], "l0.reverse"),
        SAYS.format("0 of 2 steps", "1 at t=0", "10⁻⁶ of the peak remains"),
        "fades",
        ("0 of 2 steps", "10⁻⁶ of the peak"),
        LEFT.format("l0.reverse", "10⁻⁶ remains 2 steps"),
        "reach 0 of 2 steps",
    ),
    "read in reverse, largest at the end": (
        record([1.0, 2.0, 3.0], "l0.reverse"),
        "does not fade on its way; peak 3 at t=2, where it ends",
        "arrives",
        ("–", "its peak"),
        END.format("l0.reverse", 2),
        "fades in no layer",
    ),
    "samples of several lengths": (
        RAGGED,
        SAYS.format("2 of 2 steps", "0.3 at t=2", "33 % of the peak remains"),
        "arrives",
        ("2 of 2 steps", "33 % of the peak"),
        LEFT.format("l0", "33 % remains 2 steps"),
        "fades in no layer",
    ),
    "with a cell state": (
        WITH_CELL,
        SAYS.format("2 of 2 steps", "1 at t=2", "50 % of the peak remains"),
        "arrives",
        ("2 of 2 steps", "50 % of the peak"),
        LEFT.format("l0", "50 % remains 2 steps"),
        "fades in no layer",
    ),
    "not valid": (
        record([0.1, 1.0], problem="weights changed"),
        SAYS.format("1 of 1 step", "1 at t=1", "10 % of the peak remains"),
        "not judged",
        ("1 of 1 step", "10 % of the peak"),
        "No record can be trusted; the reasons stand at the end of the page.",
        "not valid",
    ),
}


def cells(html: str) -> list[str]:
    """Of the table's first row."""
    row = re.search(r"<tbody><tr>(.*?)</tr>", html)
    assert row is not None
    return [unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row[1])]


@pytest.mark.parametrize("name", COURSES)
def test_every_course_reads_as_plain_english(name: str) -> None:
    layer, words, judged, (reach, rest), headline, large = COURSES[name]
    flow = Flow({layer.name: layer})
    assert in_words(layer) == words
    assert repr(flow).endswith(f"median over samples: {words}")
    assert verdict(layer, course(layer)) == judged
    _, _, *shown = cells(card(flow.layers, {}))
    assert shown == [reach, rest, judged, "no: weights changed" if layer.problem else "yes"]
    page = unescape(flow_page(flow))
    assert f"<h1>{headline}</h1>" in page
    assert flow_preview(flow)[1:3] == (large, headline)
    spoken = re.findall(r'aria-label="([^"]*)"', card(flow.layers, {}) + page)
    for text in (words, headline, *spoken):
        assert not re.search(r"\bnan\b|\binf\b|None|of 0 steps|1e\+02|\b1 steps| 0 of the|^reach$", text), text


def test_layers_that_can_not_be_judged_do_not_hide_one_that_can() -> None:
    fades, bad = COURSES["fades"][0], replace(COURSES["fades to nothing"][0], name="bad", problem="weights changed")
    flow = Flow({"bad": bad, "l0": fades, "one": record([1.0], "one"), "none": record([0.0] * 4, "none")})
    assert f"<h1>{COURSES['fades'][4]}</h1>" in unescape(flow_page(flow))
    assert [curve.name for curve in flow_preview(flow).curves] == ["l0", "one"]
    assert flow_preview(Flow({})).result == "no gradient"


@pytest.mark.parametrize(
    ("power", "words"),
    [
        (0, "1"),
        (math.log10(0.996), "100 %"),
        (math.log10(0.33), "33 %"),
        (-1, "10 %"),
        (math.log10(0.099), "9.9 %"),
        (-2, "1 %"),
        (math.log10(0.0031), "0.31 %"),
        (-3, "10⁻³"),
        (-320.4, "10⁻³²⁰"),
        (math.log10(2.5), "250 %"),
        (1, "10¹"),
        (2, "10²"),
        (-inf, "exactly 0"),
        (inf, "infinite"),
        (nan, "unknown"),
    ],
)
def test_a_fraction_in_words(power: float, words: str) -> None:
    assert fraction(power) == words
