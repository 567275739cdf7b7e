"""From the race to findings and a plan. A cause is named only if the loss fell with its cure and not without it."""

import math

from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.interventions import candidates
from unvanish.diagnosis.interventions.arm import Arm
from unvanish.diagnosis.interventions.candidates import Kind
from unvanish.diagnosis.interventions.head import Head
from unvanish.diagnosis.interventions.optimizers import Recipe
from unvanish.diagnosis.interventions.race import Race
from unvanish.diagnosis.interventions.readout import Readout
from unvanish.diagnosis.interventions.score import ahead
from unvanish.diagnosis.plan import Plan, Prediction

Concluded = tuple[tuple[Finding, ...], Plan, tuple[str, ...]]

SIMPLER = 0.5
"""the share of the best candidate's gain with which a simpler change names the cause instead"""
TIMES = 2.0
"""times the unchanged model's gain that a candidate must exceed to name a cause"""
FAR = 0.4
"""of the bar: a candidate's gain below which a model that learns as it is, if little, is healthy"""
ORDER: tuple[Kind, ...] = ("input", "rate", "clip", "regularisation", "radius", "depth", "reach")
"""from the simplest change to the largest"""
REACHES = 0.01
"""share of the gradient at the first steps from which a short reach is no cause of memorising"""
SAMPLES, UPDATES, TRIED, EACH, ALL = 128, 300, 2, 60, 240
"""training samples, updates of the unchanged model, candidates, updates of each, and of all together, below which a
failure is weak evidence"""
HINT = 2.0
"""standard errors below the bar at which a copy may have begun to learn"""


def conclude(race: Race, recipe: Recipe, readout: Readout | None, head: Head | None, reaching: float) -> Concluded:
    """(findings, plan, notes).

    Args:
        race: the copies that were trained, and how it ended.
        recipe: the optimizer of the unchanged model.
        readout: what a linear read-out finds in the states of the unchanged copy, if that copy does not learn.
        head: the result of heads trained alone on these states, if the states contain the target.
        reaching: share of the gradient that reaches the first steps along any path, if the unchanged copy memorises.
    """
    own = race.as_is
    if own is None or not own.judgements:
        return (), Plan(), ()
    if race.pointless:
        return (_pointless(race),), Plan(), ()
    if own.untrainable:
        return (), Plan(), (f"no intervention: a copy could not be trained ({own.failed})",)
    if race.widths is not None and (wide := race.widths.proved) is not None:
        plan = _plan(wide, race.widths.narrow[0], recipe)
        return (_narrow(wide, race.widths.narrow, plan),), plan, ()
    winners = [arm for arm in race.arms if arm.learns and _much_better(arm, own)]
    if winners:
        chosen = _simplest(winners)
        if own.memorises and not own.learns and (chosen.candidate.kind == "rate" or reaching > REACHES):
            return (_too_few(own, chosen),), Plan(), ()
        if own.learns or recipe.given or chosen.candidate.kind != "rate":
            plan = _plan(chosen, own, recipe)
            return (_cause(chosen, own, plan),), plan, ()
        own = chosen  # no rate was given, so any at which it learns is the model as it is
    if own.learns:
        return (_healthy(own),), Plan(), _overfits(own)
    if head is not None and head.fails:
        return (_unread(own, head),), Plan(), ()
    if head is not None and head.drowned:
        chosen = candidates.unregularised(own.model, recipe)[0]
        plan = Plan(chosen.plan_steps(recipe))
        return (_drowned(own, head, plan),), plan, ()
    return _nothing(race, own, readout, head)


def _much_better(arm: Arm, own: Arm) -> bool:
    """Whether a candidate's success is more than the model has as it is; far more, where that learns too."""
    after, before = arm.best.score, own.best.score
    if not own.material.unseen:
        return not own.learns and after.gain > TIMES * before.gain
    if own.learns and (after.gain < TIMES**2 * before.gain or after.share < FAR):
        return False
    return after.gain > TIMES * before.gain and ahead(arm.best.losses, own.best.losses)


def _simplest(winners: list[Arm]) -> Arm:
    def rank(arm: Arm) -> tuple[bool, int]:
        kind = arm.candidate.kind
        return arm.candidate.lr is not None and kind != "rate", ORDER.index(kind)

    most = max(arm.best.score.gain for arm in winners)
    good = [arm for arm in winners if arm.best.score.gain >= SIMPLER * most]
    least = min(rank(arm) for arm in good)
    return max((arm for arm in good if rank(arm) == least), key=lambda arm: arm.best.score.gain)


def _plan(chosen: Arm, own: Arm, recipe: Recipe) -> Plan:
    after, before = chosen.best.score, own.best.score
    updates = max(own.updates, chosen.updates)
    return Plan(chosen.candidate.plan_steps(recipe), Prediction(before.loss, after.loss, after.bar, updates))


def _proof(arm: Arm) -> str:
    best, score = arm.best, arm.best.score
    on = "held-out samples" if arm.material.unseen else "the batch itself"
    error = "" if math.isnan(score.error) else f" ± {score.error:.2g}"
    shrunk = (
        ""
        if best.shrunk == 1 or not arm.learns
        else f", with its answers shrunk to {best.shrunk:.0%} of their distance from that constant"
    )
    failed = f"; then {arm.failed}" if arm.failed else ""
    name = arm.candidate.name
    return (
        f"{name[0].upper()}{name[1:]}: a copy's lowest loss on {on} was {score.loss:.4g} in {arm.updates} updates; the "
        f"best constant answer has {score.bar:.4g} (difference {score.gain:.3g}{error}{shrunk}){failed}."
    )


def _healthy(own: Arm) -> Finding:
    how = "" if own.candidate.kind == "as_is" else f" with Adam at {own.candidate.name}"
    says = f"The model learns as it is{how}: a copy answers unseen samples better than any constant does."
    if not own.material.unseen:
        says = f"The loss falls as it is{how}; whether the model learns or memorises can't be told from these samples."
    return Finding("healthy", "note", "", says, _proof(own), "Nothing to change.")


def _pointless(race: Race) -> Finding:
    assert race.as_is is not None and race.bar is not None  # noqa: PT018 (one condition)
    return Finding(
        "not_learnable_from_input",
        "warning",
        "target",
        "Every sample has the same target, so there is nothing to learn from the input.",
        f"One constant answer fits all samples: its loss is {race.bar.mean:.2g}, that of the model as it is "
        f"{race.as_is.best.score.loss:.3g}. No copy was trained.",
        "Check where the targets come from: the wrong column, a label that was overwritten, a mask that removes all "
        "others, or a batch of one class. Then diagnose a batch whose targets differ.",
    )


def _too_few(own: Arm, chosen: Arm) -> Finding:
    """The training samples are fitted, so optimisation works; another copy shows that there is something to learn."""
    return Finding(
        "healthy",
        "note",
        "",
        f"The model fits its training samples as it is, but {own.material.trained_on} are too few to generalise: train "
        f"on more. With {chosen.candidate.name} they are enough.",
        f"{_proof(own)} {_proof(chosen)}",
        "Nothing to change in the model; give it more samples, or regularise it.",
    )


def _overfits(own: Arm) -> tuple[str, ...]:
    if own.best.shrunk == 1 or own.material.trained_on is None:
        return ()
    return (
        f"a copy overfits its {own.material.trained_on} training samples: its answers to others are right in direction "
        "but too large; more samples will help",
    )


_SAYS: dict[Kind, tuple[str, str, str]] = {
    "rate": ("learning_rate", "The learning rate keeps the model from learning",
             "The learning rate slows the model down"),
    "clip": ("explodes", "Exploding gradients keep the model from learning", "Exploding gradients slow the model down"),
    "radius": ("explodes", "Recurrent matrices this large keep the model from learning",
               "Recurrent matrices this large slow the model down"),
    "depth": ("depth", "The number of layers keeps the model from learning",
              "The number of layers slows the model down"),
    "reach": ("reach_too_short", "The gradient does not reach far enough back in time for the model to learn",
              "A gradient that reaches further back in time would help"),
    "input": ("input_scale", "The scale of the input keeps the model from learning",
              "The scale of the input slows the model down"),
    "regularisation": ("regularised_away", "Regularisation keeps the model from learning",
                       "Regularisation slows the model down"),
}  # fmt: skip
"""code, what to say if the model does not learn as it is, and what to say if it does"""


def _cause(chosen: Arm, own: Arm, plan: Plan) -> Finding:
    code, ill, slow = _SAYS[chosen.candidate.kind]
    name = chosen.candidate.name
    name = name if name.startswith("without") else f"with {name}"
    if own.learns:
        severity, says = "warning", f"{slow}: the model learns as it is, but much better {name}."
    else:
        severity, says = "error", f"{ill}: the loss falls {name}, but not as it is."
    return Finding(code, severity, "", says, f"{_proof(own)} {_proof(chosen)}", plan.code)


def _narrow(wide: Arm, narrow: tuple[Arm, ...], plan: Plan) -> Finding:
    """More units make the loss fall, and neither more updates nor the best other candidate do without them."""
    name, learns = wide.candidate.name, any(arm.learns for arm in narrow)
    others = [f"{'' if arm is narrow[0] else 'with '}{arm.candidate.name}" for arm in narrow]
    fell = f"falls far below the level at which it settles {' and '.join(others)}"
    fell = fell if learns else f"falls, but not {' or '.join(others)}"
    says = f"The recurrent layers have too few units for what they must remember: with {name} the loss {fell}."
    proof = " ".join(_proof(arm) for arm in (*narrow, wide))
    return Finding("needs_more_capacity", "warning" if learns else "error", "", says, proof, plan.code)


def _unread(own: Arm, head: Head) -> Finding:
    tries = ", ".join(f"{arm.best.score.loss:.4g}" for arm in head.own)
    alone = (
        "The model's own head, trained alone on the same states without dropout, from the values that it had before "
        f"and after training, reaches a loss of {tries}; the best constant answer has {own.bar.mean:.4g}."
        if head.own
        else "Nothing that can be trained lies between these states and the loss."
    )
    return Finding(
        "readout",
        "error",
        head.where,
        f"The states of {head.where or 'the model'} contain the target, but the head or the loss does not use it.",
        f"{_proof(own)} {_linear(head)} {alone}",
        "Check everything between the states and the loss: which step and axis the head reads, its last activation, "
        "the loss's reduction, and the target's shape.",
    )


def _drowned(own: Arm, head: Head, plan: Plan) -> Finding:
    """The states are the same, so the two heads differ only in dropout."""
    assert head.dropout is not None
    alone, dropped = head.own[-1], head.dropout
    return Finding(
        "regularised_away",
        "error",
        head.where,
        "Dropout keeps the model from learning: without it the head learns from the same states, with it it does not.",
        f"{_proof(own)} {_linear(head)} The model's own head, trained alone on these states, reaches a loss of "
        f"{alone.best.score.loss:.4g} in {alone.updates} updates without dropout, and {dropped.best.score.loss:.4g} "
        f"in {dropped.updates} with it.",
        plan.code,
    )


def _linear(head: Head) -> str:
    return (
        f"A linear layer, trained alone on the states of {head.where or 'the model'}, explains "
        f"{head.linear.readable:.0%} (± {head.linear.error:.0%}) of the target's variance on held-out samples after "
        f"{head.linear.updates} updates."
    )


def _nothing(race: Race, own: Arm, readout: Readout | None, head: Head | None) -> Concluded:
    everyone = [own, *race.arms, *(() if race.widths is None else race.widths.wide)]
    tried = [arm for arm in race.arms if arm.updates >= EACH]
    others = sum(arm.updates for arm in race.arms)
    trained_on = own.material.trained_on
    hints = [a.candidate.name for a in everyone if a.best.score.gain > HINT * a.best.score.error and a.best.updates]
    thin = [
        what
        for what, applies in (
            ("no samples could be held out", not own.material.unseen),
            (f"the budget allowed only {own.updates} updates", own.updates < UPDATES and not own.memorises),
            (f"other candidates had too few updates ({others} in all)", len(tried) < TRIED or others < ALL),
            (f"training stopped ({own.failed})", bool(own.failed)),
            (f"some copies may have begun to learn ({', '.join(hints)})", bool(hints)),
        )
        if applies
    ]
    if trained_on is not None and trained_on < SAMPLES:
        thin.append(f"there were only {trained_on} samples to train on")
    if head is not None:
        alone = head.own[-1]
        thin.append(
            f"its states contain the target, and its head, trained alone on them at a learning rate of "
            f"{alone.recipe.lr:g}, reaches a loss of {alone.best.score.loss:.4g}: train longer, or at other rates"
        )
    elif readout is not None and readout.readable > max(0.05, HINT * readout.error):
        thin.append("a linear read-out does find some of the target in the states")
    if thin:
        why = "; ".join(thin)
        return (), Plan(), (f"Nothing is proved: no copy beat the best constant answer, but {why}. {_proof(own)}",)
    more = ""
    if any(arm.memorises for arm in everyone):
        more = f" The copies only memorised their {trained_on} training samples; far more samples could change that."
    names = ", ".join(arm.candidate.name for arm in tried)
    finding = Finding(
        "not_learnable_from_input",
        "warning",
        "",
        "Nothing that was tried predicts the targets of unseen samples better than a constant: check that inputs and "
        f"targets belong together, and that the input contains the answer.{more}",
        f"{_proof(own)} No better with: {names}.",
        "Check how inputs and targets are paired (shuffling, sorting, an offset by one); then try a simpler target, "
        "or more samples.",
    )
    return (finding,), Plan(), ()
