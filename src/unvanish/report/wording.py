"""The result of a comparison in words: computed from the records, shared by the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unvanish.draw import LN10

if TYPE_CHECKING:
    from unvanish.train.records import Cured, Reach, Run, TaskResult

_CALLS = {
    "gru-chrono": "unvanish.cures.chrono_(layer, max_lag={length})",
    "lstm-chrono": "unvanish.cures.chrono_(layer, max_lag={length})",
    "lstm-forget1": "unvanish.cures.forget_bias_(layer, 1.0)",
    "rnn-orthogonal": "unvanish.cures.orthogonal_(layer)",
    "irnn": "unvanish.cures.identity_(layer)",
}

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(log_norm: float) -> str:
    """A factor e^log_norm in words: "10⁻⁴¹", "0.32", "exactly 0"."""
    if log_norm == -math.inf:
        return "exactly 0"
    if math.isnan(log_norm):
        return "unknown"
    exponent = log_norm / LN10
    if -2 < exponent < 3:
        return f"{10**exponent:.2g}"
    return f"10{str(round(exponent)).translate(_SUPERSCRIPT)}"


def fate(reach: Reach) -> str:
    """Whether the last step's gradient "vanishes", "survives" or "explodes" on its way to the first step.

    Relative to its size at lag 0, so that the scale of the loss does not matter: below `fraction` it has vanished,
    above the inverse it has exploded.
    """
    end = reach.log_norm[-1]
    if end < math.log(reach.fraction):
        return "vanishes"
    return "explodes" if end > -math.log(reach.fraction) else "survives"


def survival(task: TaskResult) -> str:
    """Which models' gradients survive the length of the task, before training."""
    lag = task.runs[0].before.lag[-1]
    parts = [f"{run.title}: {power_of_ten(run.before.log_norm[-1])}" for run in task.runs]
    return f"Fraction of the last step's gradient remaining {lag} steps earlier, before training: {'; '.join(parts)}."


def success(run: Run) -> str:
    """The number of trainings that solved the task, "3 of 3 (44 to 100 %)", with the 95 % interval of the rate."""
    low, high = run.success_interval
    return f"{run.successes} of {len(run.trials)} ({100 * low:.0f} to {100 * high:.0f} %)"


def learning(task: TaskResult) -> str:
    """Which models solve the task, learn part of it or stay at chance, and from how many seeds."""
    solved = [counted(run) for run in task.runs if run.solved]
    some = [counted(run) for run in task.runs if outcome(task, run) == "partly"]
    none = [counted(run) for run in task.runs if outcome(task, run) == "chance"]
    parts = []
    if solved:
        parts.append(f"{listed(solved)} {'solves' if len(solved) == 1 else 'solve'} the task")
    if some:
        parts.append(f"{listed(some)} {'learns' if len(some) == 1 else 'learn'} part of it")
    if none:
        parts.append(f"{listed(none)} {'stays' if len(none) == 1 else 'stay'} at chance")
    steps = task.settings["steps"]
    return f"After {steps} updates {', '.join(parts)}."


def counted(run: Run) -> str:
    """The title; with the number of seeds that solved the task, where seeds differ."""
    alike = run.successes in (0, len(run.trials))
    return run.title if alike else f"{run.title} ({run.successes} of {len(run.trials)} seeds)"


def explanation(task: TaskResult) -> str:
    """How reach and success are related, or that they disagree here."""
    kept, lost, exploding = (
        [run for run in task.runs if fate(run.before) == what] for what in ("survives", "vanishes", "explodes")
    )
    learnt_lost = [run for run in lost if run.solved]
    failed_kept = [run for run in kept if not run.solved]
    if not lost and not exploding:
        return "No model's gradient vanishes over this length: what separates them is something else."
    lag = task.runs[0].before.lag[-1]
    text = [
        f"At the start the gradient of {listed([run.title for run in runs])} {what} over {lag} steps."
        for runs, what in ((lost, "vanishes"), (exploding, "explodes"))
        if runs
    ]
    if learnt_lost:
        names = [f"{run.title} ({reached(run)})" for run in learnt_lost]
        verb = "solves" if len(names) == 1 else "solve"
        text.append(
            f"Still {listed(names)} {verb} the task: training itself moved the reach. "
            "A gradient that vanishes at the start makes learning slow and uncertain, not always impossible."
        )
    if failed_kept:
        names = listed([run.title for run in failed_kept])
        text.append(f"{names} did not solve it although the gradient reaches: reach is needed, not sufficient.")
    return " ".join(text)


def reached(run: Run) -> str:
    """The change of reach over training."""
    return f"reach {run.before.reach} → {run.after.reach} steps"


def advice(task: TaskResult) -> list[str]:
    """Advice for a task like this, from the measurements."""
    best = min(task.runs, key=lambda run: run.test_error)
    out = []
    if best.solved:
        when = f" after {best.solved_at} updates" if best.solved_at is not None else ""
        seeds = f" from {best.successes} of {len(best.trials)} seeds" if len(best.trials) > 1 else ""
        out.append(
            f"Best here: {best.title}. It solved this task{seeds}{when}; median {scored(task, best.test_error)}."
        )
    else:
        out.append("No model solved it within the budget: give more `--steps`, or a cell with a longer carry.")
    for run in task.runs:
        if run.solved or fate(run.before) != "vanishes":
            continue
        cure = best_cure(run)
        if cure is None:
            out.append(f"{run.title}: its gradient vanishes all the same; take an LSTM or GRU with chrono biases.")
            continue
        was, now = (power_of_ten(r.log_norm[-1]) for r in (run.before, cure.reach))
        out.append(
            f"{run.title}: before training {call(task, run, cure)}. The fraction of the last step's gradient that "
            f"reaches the first step rises from {was} to {now}{_proof(task, cure)}."
        )
    return out


def best_cure(run: Run) -> Cured | None:
    """The first cure after which the gradient survives; else the one after which most of it remains."""
    kept = [cure for cure in run.cures if fate(cure.reach) == "survives"]
    return kept[0] if kept else max(run.cures, key=lambda cure: cure.reach.log_norm[-1], default=None)


def call(task: TaskResult, run: Run, cure: Cured) -> str:
    """The code that applies a cure, in a phrase; code is between backticks."""
    written = f"call `{_CALLS.get(cure.name, cure.name).format(length=task.length)}`"
    if cure.name == "irnn":
        return f'make it with `nonlinearity="relu"` and {written}'
    kind = cure.name.partition("-")[0]
    return (
        written
        if kind == run.name
        else f'replace it, `layer = unvanish.cures.replace_(layer, "{kind}")`, and {written}'
    )


def trained(task: TaskResult, cure: Cured) -> str:
    """The result of the cured model, where the comparison trained it too."""
    return next((outcome(task, run) for run in task.runs if run.name == cure.name), "not trained here")


def scored(task: TaskResult, error: float) -> str:
    """An error with its name: "error rate 0.12"."""
    return f"{task.metric} {error:.3g}"


def _proof(task: TaskResult, cure: Cured) -> str:
    how = {"solved": "solved the task", "partly": "learnt part of it", "chance": "stayed at chance"}
    found = trained(task, cure)
    return f" ({cure.title} was trained here, and {how[found]})" if found in how else ""


def at_chance(task: TaskResult, run: Run) -> bool:
    """Whether the error is within 10 % of that of the best constant answer."""
    return run.test_error > 0.9 * task.chance


def outcome(task: TaskResult, run: Run) -> str:
    """ "solved", "partly" or "chance"."""
    return "solved" if run.solved else "chance" if at_chance(task, run) else "partly"


def half_life(reach: Reach) -> str:
    """In steps; "∞" where the norm does not fade."""
    return "∞" if reach.half_life is None else f"{reach.half_life:.3g}"


def listed(names: Sequence[str]) -> str:
    """ "A, B and C"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
