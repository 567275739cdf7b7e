"""The entry point: from a subject and a budget to findings, a plan, and a table of the trials."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.interventions import candidates as candidates_of
from unvanish.diagnosis.interventions.arm import Arm
from unvanish.diagnosis.interventions.candidates import Candidate
from unvanish.diagnosis.interventions.chance import Features, features
from unvanish.diagnosis.interventions.conclude import REACHES, conclude
from unvanish.diagnosis.interventions.fewer_layers import of_depth
from unvanish.diagnosis.interventions.head import head
from unvanish.diagnosis.interventions.inputs import Fed, fed, reaching
from unvanish.diagnosis.interventions.material import material
from unvanish.diagnosis.interventions.optimizers import Recipe, recipe
from unvanish.diagnosis.interventions.race import Race, race
from unvanish.diagnosis.interventions.readout import read_out
from unvanish.diagnosis.plan import Plan
from unvanish.diagnosis.subject import Subject
from unvanish.extras import extra

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_LR = 3e-3
"""Adam's, where the user gives no optimizer"""


@dataclass(frozen=True)
class Tried:
    """One row of the table: a copy with one change, and its lowest loss."""

    name: str
    updates: int
    loss: float
    """the lowest on the samples that it was judged on"""
    bar: float
    """loss of the best constant answer on the same samples"""
    learns: bool
    """whether it was below the bar by more than chance"""
    failed: str = ""
    """why its training ended early"""


@dataclass(frozen=True)
class Outcome:
    """The result of the interventions."""

    findings: tuple[Finding, ...] = ()
    plan: Plan = Plan()  # noqa: RUF009 (frozen; nothing to do)
    notes: tuple[str, ...] = ()
    tried: tuple[Tried, ...] = ()
    features: Features | None = None
    """features of an unchanged copy's first updates; None if there was no such copy"""

    @property
    def chance(self) -> float | None:
        """The chance that a training learns within `chance.HORIZON` updates, from `features`; None without them."""
        return None if self.features is None else self.features.chance()

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per copy that was trained, in the order of trial."""
        with extra("report"):
            import pandas as pd

        return pd.DataFrame([vars(row) for row in self.tried])


def run(
    subject: Subject,
    *,
    budget: float,
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    exact: Iterable[Finding] = (),
    layers: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    seed: int = 0,
    lag: int | None = None,
) -> Outcome:
    """Train copies on the user's own loss, and report which change made it fall.

    The unchanged model comes first and ends the race as soon as it clearly learns. Otherwise other learning rates,
    cures of reach on all recurrent modules together, clipping, a smaller spectral radius, standardised inputs and
    training without regularisation are raced against it. Where recurrent layers have few units, and nothing else made
    the copy learn all there is, copies with more of them come last. All copies are judged on samples that they do not
    train on, against the best constant answer.

    The model, its gradients, its mode and the random numbers stay as they are.

    Args:
        subject: the model with its batch and loss, or its step.
        budget: seconds; 0: nothing is tried.
        optimizer: the user's: an instance, or a function parameters → optimizer; None: Adam.
        exact: what exact tests have proved. Where one is an error, no copy is trained: that comes first.
        layers: name → measurement of each recurrent layer, from which the lag is taken that the task needs.
        progress: is called with a sentence on what is being tried.
        seed: of everything that is drawn.
        lag: steps that the task needs; None: from `layers`, or else as many as the input has.

    Raises:
        TypeError, ValueError: `optimizer` is neither, or holds none of the model's parameters; budget is negative or
            not finite.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"budget: expected seconds as a number, got {type(budget).__name__}")
    if not (math.isfinite(budget) and budget >= 0):
        raise ValueError(f"budget: expected a finite number of seconds, 0 or more, got {budget}")
    proved = [f for f in exact if f.severity == "error"]
    if proved:
        # Before the optimizer is checked: its missing parameters may be exactly what was proved.
        codes = ", ".join(dict.fromkeys(f.code for f in proved))
        return Outcome(notes=(f"no copy was trained: first repair what is already proved ({codes})",))
    own, notes = recipe(optimizer, subject.model, DEFAULT_LR)
    if budget == 0:
        return Outcome(notes=("no copy was trained: budget=0 skips the interventions",))
    # Making a copy's new layers draws random numbers as well.
    with subject.rng(seed):
        return _run(subject, own, notes, budget, layers or {}, progress or _silent, seed, lag)


def _run(
    subject: Subject,
    own: Recipe,
    notes: tuple[str, ...],
    budget: float,
    layers: Mapping[str, Any],
    say: Callable[[str], None],
    seed: int,
    lag: int | None,
) -> Outcome:
    say("what the copies are trained and judged on")
    data, more = material(subject, seed)
    notes += more

    def entered(arm: Arm) -> list[Candidate]:
        return _candidates(arm, own, fed(data, seed), layers, lag, seed)

    readable = 0.0

    def early(arm: Arm) -> None:
        nonlocal readable
        found = read_out(arm, seed)
        readable = 0.0 if found is None else found.readable

    raced = race(data, own, entered, early, budget, seed, say)
    finished = raced.as_is
    reading = heads = None
    if finished is not None and finished.updates and not finished.learns and not finished.failed:
        say("a linear read-out of the states")
        reading = read_out(finished, seed)
        if reading is not None and reading.holds:
            say("the head alone")
            heads = head(finished, own, seed, raced.end)
    reach = reaching(data, seed) if finished is not None and finished.memorises else 0.0
    findings, plan, concluded = conclude(raced, own, reading, heads, reach)
    known = None if finished is None or not finished.updates else features(finished, readable, layers)
    return Outcome(findings, plan, (*notes, *raced.notes, *concluded), _table(raced), known)


def _candidates(
    arm: Arm, own: Recipe, inputs: dict[str, Fed], layers: Mapping[str, Any], lag: int | None, seed: int
) -> list[Candidate]:
    """Suspects first, then the most promising, since these get the rest of the budget."""
    model = arm.material.subject.model
    if lag is None:
        lag = max([int(d.lag) for d in layers.values()], default=0) or max(
            [f.steps for f in inputs.values()], default=0
        )
    regularisation = candidates_of.unregularised(model, own)
    found = candidates_of.of_input(model, inputs) + regularisation
    growth = candidates_of.of_growth(model)
    if arm.spikes:
        found += [*growth, candidates_of.clipped()]
    found += candidates_of.rates(own)
    found += of_depth(model)
    if lag > 1:
        reach = candidates_of.of_reach(model, lag, seed)
        faint = bool(reach) and reaching(arm.material, seed) < REACHES
        found += [replace(c, suspect=faint and number == 0) for number, c in enumerate(reach)]
    if not arm.spikes:
        found += growth
    last = [c for c in regularisation if not c.suspect]
    return sorted(found, key=lambda c: 0 if c.suspect else 2 if c in last else 1)


def _table(raced: Race) -> tuple[Tried, ...]:
    rows = []
    for arm in [] if raced.as_is is None else [raced.as_is, *raced.arms, *(raced.widths.wide if raced.widths else ())]:
        if arm.updates and arm.judgements:
            best = arm.best.score
            rows.append(Tried(arm.candidate.name, arm.updates, best.loss, best.bar, arm.learns, arm.failed))
    return tuple(rows)


def _silent(sentence: str) -> None:
    pass
