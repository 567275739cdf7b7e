"""The assessment of a training: whether the model beats guessing and, if it does not, where to look.

It uses the functions of a diagnosis: the best constant answer, the test of whether a loss is below it by more than
chance, the exact tests, and the measurement of the gradient's reach.
"""

from dataclasses import dataclass

from torch import Tensor

from unvanish.diagnosis import Diagnosis, diagnose
from unvanish.diagnosis.interventions.arm import judged
from unvanish.diagnosis.interventions.bar import best_constant
from unvanish.diagnosis.interventions.conclude import REACHES
from unvanish.diagnosis.interventions.inputs import reaching
from unvanish.diagnosis.interventions.material import GROUP, GROUPS, MOST, Rows
from unvanish.diagnosis.subject import Subject
from unvanish.train.configuration import OPTIMIZERS, TrainingConfiguration
from unvanish.train.models import SequenceModel
from unvanish.train.problems import DataProblem, Judgement
from unvanish.train.supervised import together
from unvanish.train.tasks.task import Split

STEPS = 500_000
"""steps, over all samples, on which the model is judged, and as many on which the constant is fitted, unless a few
samples alone have more"""
FOLLOWED = 50_000
"""steps, over all samples, used by the exact tests and the measurement"""
LEAST, FEW = 16, 4
"""samples that are judged and measured whatever their length"""
ENOUGH = GROUPS * GROUP
"""the number of test samples from which the test split alone decides"""
HIGHER = ("accuracy", "balanced accuracy")
"""metrics for which higher is better"""


@dataclass(frozen=True)
class Assessment:
    """One training, in a sentence."""

    better: bool
    """whether the model answers unseen samples better than the best constant, by more than chance, and no worse than
    the baselines"""
    says: str


def examine(problem: DataProblem, model: SequenceModel, seed: int) -> Diagnosis:
    """A diagnosis on samples of the training split that trains no copy: exact tests, and how far the gradient reaches
    in each layer."""
    few = problem.examples("train", max(FEW, min(ENOUGH, FOLLOWED // problem.length)))
    subject = _subject(problem, model, few)
    return diagnose(model, *subject.inputs, subject.target, loss=problem.loss, budget=0, seed=seed)


def remedied(problem: DataProblem, model: SequenceModel, training: TrainingConfiguration, budget: float) -> Diagnosis:
    """A diagnosis of the model before training that also tries changes on copies, for `budget` seconds, with the
    training's optimizer: which of them make the loss fall."""
    subject = _subject(problem, model, problem.examples("train", MOST))
    rate = {"lr": training.lr, "weight_decay": training.weight_decay}
    return diagnose(
        model, *subject.inputs, subject.target, loss=problem.loss, budget=budget, seed=training.seed,
        optimizer=lambda parameters: OPTIMIZERS[training.optimizer](parameters, **rate),
    )  # fmt: skip


def assess(
    problem: DataProblem, model: SequenceModel, diagnosis: Diagnosis, figures: Judgement, seed: int
) -> Assessment:
    """Judge a trained model on the test split, or where there is none on the validation split.

    Args:
        problem: what was learnt.
        model: as trained.
        diagnosis: of the model, by `examine`.
        figures: of the model and the baselines on the test split; empty where there is none.
        seed: of random numbers.
    """
    split: Split = "test" if figures else "validation"
    most = max(LEAST, min(MOST, STEPS // problem.length))
    held, train = problem.examples(split, most), problem.examples("train", most)
    if figures and len(held) < ENOUGH:  # the validation split chose the round, which biases little
        held += problem.examples("validation", most)
    rows = Rows(_subject(problem, model, [*held, *train]), len(held) + len(train), seed, judges=len(held))
    bar, _ = best_constant(rows, seed)
    if bar is None:  # no finite loss can be compared: the figures alone decide
        learns, losses = True, ""
    else:
        with rows.subject.rng(seed):
            found = judged(model, rows, bar, 1)
        learns = found.learns
        losses = f"loss {found.score.loss:.3g} on the {split} split, best constant answer {found.score.bar:.3g}"
    against = _against(figures)
    figure = losses if against is None else against.says
    if learns and (against is None or against.ahead):
        return Assessment(True, f"Better than guessing: {figure}.")
    if learns and against is not None:
        first = f"Better than a constant answer, but not than the baseline: {figure}"
    elif against is not None and against.ahead:
        first = f"No better than guessing by more than chance, on {len(held)} unseen samples: {figure}"
    else:
        first = f"No better than guessing: {figure}"
    return Assessment(False, f"{first}; {_where_to_look(diagnosis, model, rows, seed)}")


@dataclass(frozen=True)
class _Against:
    """The model's first metric compared with that of the best baseline."""

    ahead: bool
    says: str


def _against(figures: Judgement) -> _Against | None:
    if len(figures) < 2:
        return None
    metric, own = next(iter(figures["model"].items()))
    sign = 1 if metric in HIGHER else -1
    who = max((name for name in figures if name != "model"), key=lambda name: sign * figures[name][metric])
    best = figures[who][metric]
    return _Against(sign * own > sign * best, f"{metric} {own:.3g} against {best:.3g} ({who})")


def _where_to_look(found: Diagnosis, model: SequenceModel, rows: Rows, seed: int) -> str:
    """The result of the exact tests; otherwise how far the gradient reaches, and the consequence."""
    if not found.healthy:
        return f"{found.headline[0].lower()}{found.headline[1:].removesuffix('.')}."
    return _reach(found, reaching(rows, seed), every_step=model.read == "all")


def _reach(found: Diagnosis, first_steps: float, every_step: bool) -> str:
    """The gradient's reach in words, and the consequence.

    Args:
        found: with the measurement of each layer.
        first_steps: share of the gradient that arrives at the first steps along any path: see `reaching`.
        every_step: whether every step has a target of its own, so that much can be learnt with a short reach.
    """
    layers = [d for d in found.values() if d.verdict != "undecided"]
    if not layers:
        return "how far the gradient reaches could not be measured, so look at the data and the budget first."
    worst = min(layers, key=lambda d: d.reach / d.lag)
    if worst.reach < worst.lag and every_step:
        return (
            f"every step has its own target, and the gradient reaches back {worst.reach} of {worst.lag} steps from it: "
            "look at the data or the budget first."
        )
    if worst.reach < worst.lag and first_steps < REACHES:
        return (
            f"the gradient in {worst.name} reaches back {worst.reach} of {worst.lag} steps, so the model can't learn "
            "what depends on earlier ones: look at the reach first."
        )
    return f"the gradient reaches all {worst.lag + 1} steps, so look at the data or the budget."


def _subject(problem: DataProblem, model: SequenceModel, samples: list[tuple[Tensor, Tensor]]) -> Subject:
    device = next(model.parameters()).device
    x, lengths, y = together(samples)
    return Subject(model, (x.to(device), lengths), y.to(device), problem.loss)
