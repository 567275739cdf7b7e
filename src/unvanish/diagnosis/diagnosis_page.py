"""A diagnosis as a page to read, to print and to pass on."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from unvanish.draw.html_parts import Tone, card, code, listed, page, paragraph, section, table, top
from unvanish.draw.preview import Preview, PreviewCurve, before_and_after
from unvanish.draw.strips import Axes, Bar, Curve, Strip, bars, strips
from unvanish.draw.style import LN10, fraction

if TYPE_CHECKING:
    from unvanish.diagnosis.finding import Finding
    from unvanish.diagnosis.results import Diagnosis, LayerDiagnosis, Verification

DRAWN = 12
"""layers in the picture, the shortest reach first to be kept; all are in the table"""
SCALE = (-8.0, 2.0)
"""powers of ten of the picture, the same on every page unless a gradient grows by more"""
TICKS = (2.0, 0.0, -2.0, -4.0, -6.0, -8.0)
OF_REACH = ("reach_too_short", "healthy")
"""findings whose result is the gradient's reach"""
TONES: dict[str, Tone] = {"error": "bad", "warning": "some", "note": ""}
VERDICTS: dict[str, Tone] = {
    "healthy": "good", "vanishes": "some", "saturated": "some", "explodes": "bad", "chaotic": "bad", "dead": "bad",
    "undecided": "",
}  # fmt: skip
MEANS = {
    "fraction remaining": "‖∂E/∂s‖ this many steps before the error, divided by its value at the step of the error; "
    "s is the state that the cell remembers by (c for the LSTM).",
    "reach": "the largest number of steps over which at least 1 % of the gradient remains.",
    "half-life": "the number of steps in which the gradient halves.",
    "rate": "slope of the gradient's logarithm, in nats per step, with its 95 % interval over samples.",
}


def diagnosis_page(found: "Diagnosis") -> str:
    """The page of one diagnosis."""
    tag, tone = _status(found)
    return page(
        f"{found.model}: diagnosis by unvanish",
        top(f"Diagnosis of {found.model}", found.headline, tag, tone),
        pictures(found.layers),
        section("Findings", *(finding_card(f, found) for f in found.findings), name="findings"),
        plan_section(found),
        tried_section(found),
        layer_tables(found.layers),
        notes_and_words(found),
    )


def verification_page(proved: "Verification") -> str:
    """The page of a diagnosis before and after: the later one, with the earlier one drawn behind it."""
    was, now = proved.earlier, proved.later
    tag, tone = ("cured", "good") if proved.cured else ("not cured", "bad")
    return page(
        f"{now.model}: before and after, by unvanish",
        top(f"Diagnosis of {now.model}, before and after", f"After the change: {now.headline}", tag, tone),
        paragraph(f"Before the change: {was.headline}"),
        pictures(now.layers, was.layers),
        change(was, now, *_losses(was, now)),
        section("Findings now", *(finding_card(f, now) for f in now.findings), name="findings"),
        plan_section(now),
        tried_section(now),
        layer_tables(now.layers),
        notes_and_words(now),
    )


def change(was: "Diagnosis", now: "Diagnosis", *facts: list[str]) -> str:
    """The section that compares two diagnoses: findings, further facts (name, before, after), each layer."""
    codes = [
        ", ".join(dict.fromkeys(_status(d)[0] if f.code == "healthy" else f.code for f in d.findings))
        for d in (was, now)
    ]
    rows = [
        [
            name,
            _reach(was.layers.get(name)),
            _reach(d),
            was.layers[name].verdict if name in was.layers else "",
            d.verdict,
        ]
        for name, d in now.layers.items()
    ]
    return section(
        "Before and after",
        table(("", "before", "after"), [["findings", *codes], *facts], text=True),
        table(("layer", "reach before", "reach after", "verdict before", "verdict after"), rows),
        name="change",
    )


def diagnosis_preview(found: "Diagnosis") -> Preview:
    """The card of the page. Its large type is about the gradient only if no other fault was found."""
    drawn = _shortest_first(found.layers)
    fault = next((f for f in found.findings if f.severity != "note" and f.code not in OF_REACH), None)
    if fault is not None:
        result = fault.code.replace("_", " ")
    else:
        result = f"reach {_reach(drawn[0])}" if drawn else _status(found)[0]
    curves = [PreviewCurve(d.name, _decades(d.curve)) for d in drawn]
    return Preview(f"Diagnosis of {found.model}", result, found.headline.replace("`", ""), curves)


def verification_preview(proved: "Verification") -> Preview:
    """The card of the page: the reach before and now in the layer whose gradient reached least before the change."""
    about, says = f"{proved.later.model}, before and after", f"After the change: {proved.later.headline}"
    return change_preview(about, proved.earlier, proved.later, "cured" if proved.cured else "not cured", says)


def change_preview(about: str, was: "Diagnosis", now: "Diagnosis", otherwise: str, says: str) -> Preview:
    """The card of two diagnoses: the reach of the layer whose gradient reached least in the first, then and now;
    `otherwise`, where no layer was measured in both."""
    says = says.replace("`", "")
    drawn = [d for d in _shortest_first(was.layers) if d.name in now.layers and len(now.layers[d.name].curve) > 1]
    if not drawn:
        return Preview(about, otherwise, says, ())
    d = drawn[0]
    later = now.layers[d.name]
    curves = (PreviewCurve("before", _decades(d.curve), pale=True), PreviewCurve(d.name, _decades(later.curve)))
    return Preview(about, before_and_after(d.reach, later.reach), says, curves)


def _shortest_first(layers: "Mapping[str, LayerDiagnosis]") -> "list[LayerDiagnosis]":
    """The layers with a curve, sorted by the fraction of the steps over which their gradient reaches."""
    return sorted((d for d in layers.values() if len(d.curve) > 1), key=lambda d: d.reach / max(d.lag, 1))


def _losses(was: "Diagnosis", now: "Diagnosis") -> list[list[str]]:
    said = [
        f"{d.tried[0].loss:.4g} (best constant answer: {d.tried[0].bar:.4g})" if d.tried else "" for d in (was, now)
    ]
    return [["lowest loss of a copy as it is", *said]] if any(said) else []


def _status(found: "Diagnosis") -> tuple[str, Tone]:
    """The state of the model in a word, which is "healthy" only where that was proved."""
    count = sum(f.severity != "note" for f in found.findings)
    if count:
        worst = found.findings[0].severity
        return f"{count} {'finding' if count == 1 else 'findings'}", TONES[worst]
    return ("learns", "good") if any(row.learns for row in found.tried) else ("no fault found", "")


def finding_card(finding: "Finding", found: "Diagnosis") -> str:
    """One finding with its proof and what to do."""
    healthy = finding.code == "healthy" and any(row.learns for row in found.tried)
    do = "Follow the plan below." if found.plan and finding.do == found.plan.code else finding.do
    tag = finding.code if finding.severity == "note" else f"{finding.severity}: {finding.code}"
    facts = [("Proof", finding.proof), ("To do", do)]
    return card(tag, finding.where, finding.says, facts, "good" if healthy else TONES[finding.severity])


def pictures(layers: "Mapping[str, LayerDiagnosis]", before: "Mapping[str, LayerDiagnosis] | None" = None) -> str:
    """The gradient of each layer over the lag, with the curve that it had before behind it."""
    drawn = [d for d in layers.values() if len(d.curve) > 1]
    if not drawn:
        return ""
    kept = {d.name for d in _shortest_first(layers)[:DRAWN]}
    rows = [_strip(d, (before or {}).get(d.name)) for d in drawn if d.name in kept]
    most = max(y for row in rows for curve in row.curves for y in curve.y if not math.isnan(y))
    high = SCALE[1] if most <= SCALE[1] else float(math.ceil(min(most, 300.0)))
    ticks = TICKS if high == SCALE[1] else (high, *((round(high / 2),) if high > 7 else ()), 0.0, SCALE[0])
    axes = Axes(
        (0.0, max(x for row in rows for curve in row.curves for x in curve.x)),
        (SCALE[0], high),
        "steps back from the error",
        [(power, fraction(power)) for power in ticks],
        -2.0,
    )
    left_out = [
        f" {number} {'layer' if number == 1 else 'layers'} {why}: see the table."
        for number, why in (
            (len(drawn) - len(rows), "whose gradient reaches further"),
            (len(layers) - len(drawn), "without a curve"),
        )
        if number
    ]
    return strips(
        rows,
        axes,
        "Fraction of the gradient remaining on its way back through time. Dotted line: 1 %; vertical line: the reach, "
        "the last step above 1 %. A short reach is a measurement, not a fault: it matters if the answer needs earlier "
        "steps and no other path (pooling, attention, skip connections) carries the gradient." + "".join(left_out),
    )


def _strip(d: "LayerDiagnosis", was: "LayerDiagnosis | None") -> Strip:
    curves = [Curve("fraction of the gradient remaining", "main", range(len(d.curve)), _decades(d.curve))]
    if was is not None and len(was.curve) > 1:
        curves.insert(0, Curve("before", "ghost", range(len(was.curve)), _decades(was.curve)))
    reach = _reach(d) if was is None else f"{was.reach} → {_reach(d)}"
    end = fraction(_decades(d.curve)[-1])
    says = f"{d.name}: at least 1 % of the gradient remains over {d.reach} of {d.lag} steps, {end} at the last."
    return Strip(f"{d.name} ({d.cell})", f"{d.verdict}, reach {reach}", VERDICTS[d.verdict], says, curves, d.reach)


def _reach(d: "LayerDiagnosis | None") -> str:
    return "" if d is None or d.lag < 1 else f"{d.reach} of {d.lag} steps"


def _decades(curve: tuple[float, ...]) -> list[float]:
    return [value / LN10 for value in curve]


def plan_section(found: "Diagnosis") -> str:
    """The plan with its code; "" where there is none."""
    if not found.plan:
        return ""
    return section(
        "Plan",
        listed((f"{step.says[0].upper()}{step.says[1:]}." for step in found.plan.steps), numbered=True),
        paragraph(f"Predicted {found.plan.predicted}." if found.plan.predicted else ""),
        '<p class="note screen">A click on the code selects all of it.</p>',
        code(found.plan.code),
        name="plan",
    )


def tried_section(found: "Diagnosis") -> str:
    """The copies that were trained; "" where none was."""
    rows = []
    for row in found.tried:
        ended = f"; ended early: {row.failed}" if row.failed else ""
        result = f"loss {row.loss:.4g} after {row.updates} updates{', learns' * row.learns}{ended}"
        rows.append(Bar(row.name, result, row.loss, row.bar, "good" if row.learns else ""))
    picture = bars(
        rows,
        "Lowest loss of each copy on the samples on which it was judged. The vertical line is the best answer that "
        "ignores the input; a copy learns if its loss is lower by more than chance.",
    )
    words = found.chance_in_words
    chance = paragraph(f"{words[0].upper()}{words[1:]}.") if words else ""
    return section("Copies that were trained", picture, chance, name="tried") if rows else ""


def layer_tables(layers: "Mapping[str, LayerDiagnosis]") -> str:
    """The section with the measurement of each layer, in numbers and in words."""
    rows = [
        [name, d.cell, d.verdict, _reach(d), "" if d.half_life is None else f"{d.half_life:.3g} steps", _rate(d)]
        for name, d in layers.items()
    ]
    return section(
        "Layers",
        table(("layer", "cell", "verdict", "reach", "half-life", "rate (nats per step)"), rows),
        table(("layer", "what was measured"), [[name, d.cause] for name, d in layers.items()], text=True),
        name="layers",
    )


def _rate(d: "LayerDiagnosis") -> str:
    return d.rate_in_words.replace(" nats per step", "")


def notes_and_words(found: "Diagnosis") -> str:
    """The sections at the end: what could not be tested, and a glossary."""
    words = listed((f"{name}: {text}" for name, text in MEANS.items()), kind="note") if found.layers else ""
    return section("Notes", listed(_joined(found.notes), kind="note"), name="notes") + section(
        "What the words mean", words, name="words"
    )


def _joined(notes: tuple[str, ...]) -> list[str]:
    """Notes that say the same about several modules, merged into one."""
    names: dict[str, list[str]] = {}
    for note in notes:
        name, colon, text = note.partition(": ")
        names.setdefault(text if colon else note, []).append(name if colon else "")
    return [f"{', '.join(who)}: {text}" if any(who) else text for text, who in names.items()]
