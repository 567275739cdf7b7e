"""The page about a training: the assessment, the gradient's reach before and after, findings, next steps."""

import math
from typing import Any

from unvanish.diagnosis import Diagnosis
from unvanish.diagnosis.diagnosis_page import (
    change,
    change_preview,
    finding_card,
    layer_tables,
    notes_and_words,
    pictures,
    plan_section,
    tried_section,
)
from unvanish.diagnosis.finding import Finding
from unvanish.draw.html_parts import Tone, card, code, page, paragraph, section, table, top
from unvanish.draw.preview import Preview
from unvanish.draw.strips import Axes, Curve, Strip, strips
from unvanish.train.models import RECIPES
from unvanish.train.tasks import TASKS

DECADES = 6
"""the most powers of ten of the validation error that are drawn"""


def training_page(config: dict[str, Any], was: Diagnosis, now: Diagnosis, tried: Diagnosis | None = None) -> str:
    """The page of one training.

    Args:
        config: of the trained model.
        was: the diagnosis of the model before training, in which no copy was trained.
        now: likewise, after training.
        tried: of the model before training, with copies that were trained; None: there were none.
    """
    found = config["assessment"]
    first, _, where_to_look = found["says"].removesuffix(".").partition("; ")
    where_to_look = f"{where_to_look[0].upper()}{where_to_look[1:]}." if where_to_look else ""
    if tried is not None and tried.plan:
        where_to_look = tried.headline  # what is proved takes the place of where to look
    tag: tuple[str, Tone] = (
        ("better than guessing", "good") if found["better"] else ("not better than guessing", "some")
    )
    return page(
        f"{_about(config)}: training by unvanish",
        top(_about(config), f"{first}.", *tag),
        paragraph(where_to_look),
        pictures(now.layers, was.layers),
        change(was, now, *_errors(config)),
        section("Learning", _learning(config), name="learning"),
        section("Test", _test(config["test"]), name="test"),
        section("Findings after training", *(_finding(f, now, found["better"]) for f in now.findings), name="findings"),
        *(() if tried is None else _changes(tried)),
        section("Next", *_next(config), name="next"),
        layer_tables(now.layers),
        notes_and_words(now),
    )


def _finding(finding: Finding, now: Diagnosis, better: bool) -> str:
    """As on a diagnosis's page; but for a trained model it does not matter that no copy was trained."""
    if finding.code != "healthy":
        return finding_card(finding, now)
    says = "No exact test found a fault in the trained model."
    return card("no fault found", "", says, [("Proof", finding.proof)], "good" if better else "")


def _changes(tried: Diagnosis) -> tuple[str, str, str]:
    """What changes to the model before training, tried on copies, have shown."""
    cards = (finding_card(f, tried) for f in tried.findings)
    return section("Changes tried on copies", *cards, name="changes"), plan_section(tried), tried_section(tried)


def _next(config: dict[str, Any]) -> tuple[str, str]:
    """How to use the folder that contains the page."""
    kind, data = config["kind"], {"task": "", "language": " --prompt TEXT"}.get(config["kind"], " --data FILE")
    if config["assessment"]["better"] and kind != "task":
        return paragraph("Apply the model; FOLDER is the folder that contains this page."), code(
            f"unvanish predict FOLDER{data}"
        )
    if config.get("plan"):
        return paragraph("Apply the plan before training, then train again."), ""
    return (
        paragraph(
            "No change that helps is known yet. A diagnosis tries changes on copies of the model and returns the one "
            "that makes the loss fall as code to copy; FOLDER is the folder that contains this page."
        ),
        code(f"unvanish diagnose FOLDER{'' if kind == 'task' else ' --data FILE'} --out diagnosis.html"),
    )


def training_preview(config: dict[str, Any], was: Diagnosis, now: Diagnosis) -> Preview:
    """The card of the page: "reach 9 → 199" of the layer whose gradient reached least before training."""
    found = config["assessment"]
    otherwise = "better than guessing" if found["better"] else "not better than guessing"
    says = f"{found['says'].removesuffix('.').partition('; ')[0]}."
    return change_preview(_about(config), was, now, otherwise, says)


def reaches(was: Diagnosis, now: Diagnosis) -> dict[str, dict[str, Any]]:
    """Layer → lag, and reach and half-life, in steps, before and after training: plain data for `config.json`."""
    return {
        name: {"lag": d.lag, "reach": [was[name].reach, d.reach], "half_life": [was[name].half_life, d.half_life]}
        for name, d in now.items()
        if name in was and d.lag > 0
    }


def _about(config: dict[str, Any]) -> str:
    cell = RECIPES[config["shape"]["cell"]].title
    if config["kind"] == "task":
        return f"{cell} trained on: {TASKS[config['task']['name']].title}, {config['task']['length']} steps"
    return f"{cell} trained for {config['kind']}"


def _errors(config: dict[str, Any]) -> list[list[str]]:
    found = config["validation"]
    if len(found["error"]) < 2:
        return []
    first, last = (f"{found['error'][k]:.4g} after {found['update'][k]} updates" for k in (0, -1))
    return [[f"validation, {found['metric']}", first, last]]


def _learning(config: dict[str, Any]) -> str:
    """The validation error over the updates; "" where fewer than two are positive numbers."""
    found, metric = config["validation"], config["validation"]["metric"]
    powers = [math.log10(e) if 0 < e < math.inf else -math.inf if e == 0 else math.nan for e in found["error"]]
    finite = [p for p in powers if math.isfinite(p)]
    if len(finite) < 2:
        return ""
    guide = min((who[metric] for name, who in config["test"].items() if name != "model" and metric in who), default=0)
    top_power = max(*finite, math.log10(guide) if guide > 0 else -math.inf)
    high = max(math.ceil(top_power), math.floor(min(finite)) + 1)
    low = max(math.floor(min(finite)), high - DECADES)
    axes = Axes(
        (0.0, float(found["update"][-1])),
        (float(low), float(high)),
        "optimizer updates",
        [(float(power), f"{10.0**power:g}") for power in range(high, low - 1, -1)],
        math.log10(guide) if guide > 0 else None,
    )
    best = min(range(len(powers)), key=lambda k: (math.isnan(powers[k]), powers[k]))
    lowest = f"lowest {found['error'][best]:.4g}, after {found['update'][best]} updates"
    says = f"Validation {metric}: {found['error'][0]:.4g} at first, {found['error'][-1]:.4g} at last; {lowest}."
    curve = Curve(f"validation {metric}", "main", found["update"], powers)
    line = " Dotted line: the best baseline on the test split." if guide > 0 else ""
    return strips(
        [Strip(metric, lowest, "", says, [curve])],
        axes,
        f"The error on the validation split, on a logarithmic axis.{line}",
    )


def _test(figures: dict[str, dict[str, float]]) -> str:
    heads = list(dict.fromkeys(metric for row in figures.values() for metric in row))
    rows = [[who, *(f"{row[m]:.4g}" if m in row else "" for m in heads)] for who, row in figures.items()]
    return table(("", *heads), rows)
