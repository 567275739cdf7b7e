"""The race: first the unchanged model, then the candidates by successive halving, within a budget of seconds."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from unvanish.diagnosis.interventions.arm import CHUNK, Arm, next_judgement
from unvanish.diagnosis.interventions.bar import Bar, best_constant
from unvanish.diagnosis.interventions.candidates import AS_IS, Candidate
from unvanish.diagnosis.interventions.capacity import SHARE, Widths, done, longer, more_units, widths
from unvanish.diagnosis.interventions.chance import EARLY
from unvanish.diagnosis.interventions.material import Material
from unvanish.diagnosis.interventions.optimizers import Recipe
from unvanish.diagnosis.subject import Subject

Progress = Callable[[str], None]

LEAST = 60
"""updates of the unchanged model below which no conclusion is possible, so nothing is tried"""
MOST = 2000
"""the most updates of the unchanged model"""
OWN = 0.4
"""share of the budget for the unchanged model"""
SUSPECTED = 0.6
"""share of the remaining budget for the candidates that are suspects, before all others"""
ROUNDS = (0.4, 0.35, 0.25)
"""shares of the remaining budget for all candidates, for the better half, and for the better half of those"""
FITTING, LATER = 0.1, 0.1
"""shares of the budget for the best constant answer, and for what is asked after the race"""
TIMED, AFFORDABLE = 4, 0.05
"""updates of which the fastest is timed, and the share of the budget that one may take for another to be made"""
POINTLESS = 1e-3
"""a constant answer whose loss is below this share of the fresh model's is right for every sample"""


@dataclass
class Race:
    """The copies that ran, how far, and how the race ended."""

    as_is: Arm | None = None
    bar: Bar | None = None
    arms: list[Arm] = field(default_factory=list)
    """the candidates, in the order in which they were tried"""
    notes: list[str] = field(default_factory=list)
    seconds_per_update: float = float("nan")
    end: float = float("inf")
    """`time.perf_counter()` at which the budget is used up"""
    widths: Widths | None = None
    """copies with more units and matching narrow ones, if the model is narrow and nothing else made it learn well"""
    pointless: bool = False
    """whether a constant answer is right for every sample, so that there is nothing to learn from the input"""


def race(
    material: Material,
    recipe: Recipe,
    candidates: Callable[[Arm], list[Candidate]],
    early: Callable[[Arm], None],
    budget: float,
    seed: int,
    progress: Progress,
) -> Race:
    """Train the model as it is and, unless it clearly learns, the candidates.

    Everything but the numbers of updates is determined by the seed; they follow from the clock.

    Args:
        material: what is trained and judged on.
        recipe: the optimizer.
        candidates: from the copy that was trained as it is, those worth a trial, the most promising first.
        early: is called once with the copy as it is, after its first `EARLY` updates or fewer.
        budget: seconds, from the end of the first update on: what that one warms up (imports, kernels) is not counted.
        seed: of the order of samples, of dropout and of whatever the step draws.
        progress: is called with a sentence on what is being tried.
    """
    found = Race()
    cost, begun = _cost(material, recipe, seed, budget)
    found.end, end = begun + budget, begun + (1 - LATER) * budget
    if isinstance(cost, str):
        found.notes.append(f"no intervention: a copy could not be trained ({cost})")
        return found
    found.seconds_per_update = cost
    if cost * LEAST > end - time.perf_counter():
        found.notes.append(
            f"nothing was tried: one update takes {cost:.2g} s, and at least {LEAST} are needed; "
            f"budget={math.ceil(1.5 * cost * LEAST / OWN)} would allow it"
        )
        return found
    progress("the best constant answer")
    evaluations = max(12, min(150, int(FITTING * budget / cost)))
    found.bar, notes = best_constant(material, seed, evaluations, time.perf_counter() + FITTING * budget)
    found.notes += notes
    if found.bar is None:
        return found
    own = found.as_is = Arm(AS_IS, material, recipe, found.bar, seed)
    own.judge()
    if found.bar.mean <= POINTLESS * abs(own.best.score.loss) and _all_the_same(material.subject):
        found.pointless = True
        return found
    until = time.perf_counter() + OWN * (end - time.perf_counter())
    _run(own, until, min(EARLY, MOST), progress)
    early(own)
    _run(own, until, MOST, progress)
    _run(own, end, LEAST, progress)  # with fewer updates nothing could be concluded
    widen = None if own.untrainable or not material.unseen else more_units(material.subject.model, seed)
    if own.clear and widen is not None and not done(own):
        again, most = longer(own)
        whole = time.perf_counter() + SHARE * (end - time.perf_counter())
        # A copy that had fewer updates than the first would be judged before what that one has learnt since.
        found.widths = widths(again, [], widen, whole, most, progress, own.updates + 1)
    if own.clear or own.untrainable:
        return found
    entered = candidates(own)
    if own.updates < LEAST and not own.failed:
        found.notes.append(
            f"the budget allowed too few updates of the model as it is ({own.updates}) to compare with others: one "
            f"takes {cost:.2g} s, a judgement {own.judging:.2g} s; give a longer budget"
        )
        return found
    found.arms = [Arm(c, material, recipe, found.bar, seed) for c in entered]
    running, whole = list(found.arms), end
    if widen is not None:
        end -= SHARE * (end - time.perf_counter())
    if _suspects(running, own, end, progress):
        running = []
    for number, share in enumerate(ROUNDS):
        left = (end - time.perf_counter()) * share / sum(ROUNDS[number:])
        running = running[: int(max(left, 0.0) / (CHUNK * cost))]  # the most promising come first
        for arm in running:
            _run(arm, min(time.perf_counter() + left / len(running), end), max(own.updates, LEAST), progress)
        if not running or any(arm.clear for arm in running):
            break
        running = _better_half(running)
        if number == 0:
            combined = [Arm(c, material, recipe, found.bar, seed) for c in _combined(running)]
            found.arms += combined
            running += combined
    helped = not own.learns and any(arm.clear for arm in found.arms)
    if widen is not None and not own.failed and not helped:
        found.widths = widths(own, found.arms, widen, whole, MOST, progress)
    if not any(arm.learns for arm in found.arms):
        _run(own, whole, MOST, progress)
    found.arms = [arm for arm in found.arms if arm.judgements]
    return found


def _suspects(running: list[Arm], own: Arm, end: float, progress: Progress) -> bool:
    """Train the suspects for as long as the model as it is, one after the other; whether one of them clearly learns."""
    suspects = [arm for arm in running if arm.candidate.suspect]
    until = time.perf_counter() + SUSPECTED * (end - time.perf_counter())
    for number, arm in enumerate(suspects):
        now = time.perf_counter()
        _run(arm, now + (until - now) / (len(suspects) - number), max(own.updates, LEAST), progress)
        if arm.clear:
            return True
    return False


def _all_the_same(subject: Subject) -> bool:
    """Whether every sample has the same target."""
    goals = [(goal, subject.axis(goal)) for goal in subject.goals]
    return bool(goals) and all(axis is not None and _same_along(goal, axis) for goal, axis in goals)


def _same_along(goal: Tensor, axis: int) -> bool:
    return goal.shape[axis] > 1 and bool((goal == goal.narrow(axis, 0, 1)).all())


def _run(arm: Arm, until: float, most: int, progress: Progress) -> None:
    """Train until the copy clearly learns, has failed, memorises, or the clock or the updates run out; the last
    judgement ends by then too, if it takes as long as the one before."""
    while not arm.failed and not arm.clear and arm.updates < most and time.perf_counter() + arm.judging < until:
        said = f", loss {arm.judgements[-1].score.loss:.3g}" if arm.judgements else ""
        progress(f"{arm.candidate.name}: {arm.updates} updates{said} (best constant answer: {arm.bar.mean:.3g})")
        arm.train(min(next_judgement(arm.updates), most) - arm.updates, until - arm.judging)
        arm.judge()
        if arm.memorises:
            break


def _cost(material: Material, recipe: Recipe, seed: int, budget: float) -> tuple[float | str, float]:
    """(seconds of an update or why it fails, moment at which the first update was done).

    The first update also warms up what is cached, and is not counted where others are affordable.
    """
    arm = Arm(AS_IS, material, recipe, None, seed)
    times: list[float] = []
    first = math.inf
    while len(times) < TIMED and not arm.failed and (not times or times[-1] < AFFORDABLE * budget):
        begun = time.perf_counter()
        arm.train(1)
        times.append(time.perf_counter() - begun)
        first = min(first, time.perf_counter())
    if arm.failed and not arm.updates and "NaN" not in arm.failed:
        return arm.failed, first
    return min(times), first


def _better_half(arms: list[Arm]) -> list[Arm]:
    """Those whose loss is lowest; the best learning rate and the best cure of reach always stay."""
    usable = [arm for arm in arms if not arm.failed and arm.judgements]
    ranked = sorted(usable, key=lambda arm: arm.best.score.loss)
    kept = ranked[: (len(ranked) + 1) // 2]
    for kind in ("rate", "reach"):
        best = next((arm for arm in ranked if arm.candidate.kind == kind), None)
        if best is not None and best not in kept:
            kept.append(best)
    return kept


def _combined(running: list[Arm]) -> list[Candidate]:
    """The best cure of reach with the best other learning rate."""
    cure = next((arm.candidate for arm in running if arm.candidate.kind == "reach"), None)
    rate = next((arm.candidate for arm in running if arm.candidate.kind == "rate" and arm.candidate.lr), None)
    if cure is None or rate is None or rate.lr is None or rate.adam:
        return []
    return [cure.with_rate(rate.lr)]
