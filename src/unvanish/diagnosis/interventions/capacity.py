"""More units for narrow layers: tried last, and against copies of the unchanged width that had as many updates."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from unvanish.cures.widen import can_widen, widen_
from unvanish.diagnosis.interventions.arm import Arm, next_judgement
from unvanish.diagnosis.interventions.candidates import AS_IS, Candidate
from unvanish.diagnosis.interventions.score import ahead
from unvanish.diagnosis.plan import Step
from unvanish.nn.modules import RecurrentModule
from unvanish.seeding import seeded

NARROW, WIDE = 8, 64
"""units up to which a layer is tried with more, and how many it gets"""
SHARE = 0.5
"""the share of the budget left after the unchanged copy that is used to try narrow models with more units"""
DONE = 0.9
"""gain of a copy that learns as it is, as a share of the bar, from which more units could do little"""
HALF = 0.5
"""of the loss of every copy of the unchanged width, below which one with more units must fall"""
SETTLED = 0.15
"""of the distance to the loss with more units: what the last third of a narrow copy's updates gains at most. At that
pace it would take twice its updates again to get there"""
LONGER, ENOUGH = 4, 400
"""how long the unchanged copy may continue once it was found to learn: this many times the updates until then, or this
many updates, whichever is more"""
LEAST = 60
"""updates of every narrow copy, below which widths are not compared"""


@dataclass(frozen=True)
class Widths:
    """Copies of two widths in the same training."""

    narrow: tuple[Arm, ...]
    """as it is, and the best other candidate if there is one"""
    wide: tuple[Arm, ...]
    """the same, with more units"""

    @property
    def proved(self) -> Arm | None:
        """The best copy with more units, if it learns what no narrow one does; see `exceeds`."""
        good = [arm for arm in self.wide if arm.learns and all(exceeds(arm, narrow) for narrow in self.narrow)]
        return min(good, key=lambda arm: arm.best.score.loss, default=None)


def exceeds(wide: Arm, narrow: Arm) -> bool:
    """Whether the wide copy's loss is far below the narrow one's, beyond chance, and the narrow one's had settled.

        L_wide ≤ ½ L_narrow   or, if the narrow copy does not learn,   bar − L_wide ≥ 2 (bar − L_narrow)
        L_narrow(⅔ of its updates) − L_narrow ≤ 0.15 (L_narrow(⅔ of its updates) − L_wide)

    A loss that is not positive has no half: then only the copies that do not learn are compared.
    """
    after, before = wide.best.score, narrow.best.score
    if not ahead(wide.best.losses, narrow.best.losses):
        return False
    far = after.loss <= HALF * before.loss and before.loss > 0
    if not far and (narrow.learns or after.gain * HALF < before.gain):
        return False
    earlier = min(j.score.loss for j in narrow.judgements if j.updates <= narrow.updates * 2 / 3)
    return earlier - before.loss <= SETTLED * (earlier - after.loss)


def more_units(model: nn.Module, seed: int) -> Step | None:
    """The change that gives recurrent layers `WIDE` units; None where none is narrow, or one can't be widened."""
    sizes = {path: m.hidden_size for path, m in model.named_modules() if isinstance(m, RecurrentModule)}
    if min(sizes.values(), default=WIDE) > NARROW or not can_widen(model, WIDE):
        return None

    def act(model: nn.Module) -> nn.Module:
        with seeded(seed):
            return widen_(model, WIDE)

    units = ", ".join(f"{path or 'the model'}: {size}" for path, size in sizes.items() if size < WIDE)
    return Step(
        f"give the recurrent layers {WIDE} units ({units}), behind the interface that the model knows; if you change "
        f"your own code instead, set hidden_size={WIDE} and let what reads the states take as many inputs",
        f"torch.manual_seed({seed})\nmodel = uv.cures.widen_(model, {WIDE})",
        act,
    )


def widths(
    own: Arm,
    arms: list[Arm],
    widen: Step,
    end: float,
    most: int,
    progress: Callable[[str], None],
    fewest: int = LEAST,
) -> Widths | None:
    """Train copies of both widths until `end`, those with more units for no more updates than any of the others.

    Args:
        own: the model as it is, trained for a while.
        arms: the other candidates.
        widen: the step that adds units.
        end: `time.perf_counter()`.
        most: updates of a copy.
        progress: is called with a sentence on what is being tried.
        fewest: updates of every narrow copy, below which widths are not compared.

    Returns:
        None where the time allowed too few updates, or a copy of the unchanged width has learnt almost all there is.
    """
    usable = [arm for arm in arms if not arm.failed and arm.judgements and arm.updates]
    best = min(usable, key=lambda arm: arm.best.score.loss, default=None)
    others = [] if best is None else [best]
    copies = 2 * (1 + len(others))
    narrow = [own, *others]
    for number, arm in enumerate(narrow):
        until = _share(end, copies - number)
        _train_on(arm, until, most if arm is own else own.updates, progress)
        if done(arm):
            return None
    least = min(arm.updates for arm in narrow)
    if least < max(fewest, LEAST):
        return None
    wide = []
    for number, arm in enumerate(narrow):
        one = _like(arm, widen)
        one.judge()
        _train_on(one, _share(end, len(narrow) - number), least, progress)
        wide.append(one)
        if done(one):
            break
    return Widths(tuple(narrow), tuple(wide))


def done(arm: Arm) -> bool:
    """Whether it has learnt almost all there is."""
    return arm.learns and arm.best.score.share >= DONE


def _share(end: float, copies: int) -> float:
    now = time.perf_counter()
    return now + (end - now) / copies


def _like(arm: Arm, widen: Step) -> Arm:
    """A fresh copy with more units, under the same changes and training."""
    old = arm.candidate
    name = f"{WIDE} units" if old.kind == AS_IS.kind else f"{WIDE} units, {old.name}"
    candidate: Candidate = replace(old, name=name, kind="capacity", steps=(widen, *old.steps))
    return Arm(candidate, arm.material, arm.recipe, arm.bar, arm.seed)


def longer(own: Arm) -> tuple[Arm, int]:
    """A new unchanged copy, and how many updates to train it after the point at which the first was found to learn."""
    arm = Arm(own.candidate, own.material, own.recipe, own.bar, own.seed)
    arm.judge()
    return arm, max(LONGER * own.updates, ENOUGH)


def _train_on(arm: Arm, until: float, most: int, progress: Callable[[str], None]) -> None:
    """Train until the updates or the clock run out, or the copy fails, memorises or has learnt all there is."""
    while not arm.failed and arm.updates < most and time.perf_counter() + arm.judging < until:
        progress(
            f"{arm.candidate.name}: {arm.updates} updates, loss {arm.judgements[-1].score.loss:.3g} (best constant "
            f"answer: {arm.bar.mean:.3g})"
        )
        arm.train(min(next_judgement(arm.updates), most) - arm.updates, until - arm.judging)
        arm.judge()
        if arm.memorises or done(arm):
            break
