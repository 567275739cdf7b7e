"""What a comparison says, in words: computed from the records, shared by the terminal and the page."""

import math
from collections.abc import Sequence

from unvanish.draw import LN10
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
    """What becomes of the last step's error at the first step: "vanishes", "survives" or "explodes".

    Relative to its size at lag 0, so that no scale of the loss matters: below `fraction` it has vanished, above its
    inverse exploded.
    """
    end = reach.log_norm[-1]
    if end < math.log(reach.fraction):
        return "vanishes"
    return "explodes" if end > -math.log(reach.fraction) else "survives"


def survival(task: TaskResult) -> str:
    """Whose gradient survives the length of the task, before training."""
    lag = task.runs[0].before.lag[-1]
    parts = [f"{run.title}: {power_of_ten(run.before.log_norm[-1])}" for run in task.runs]
    return f"Fraction of the last step's error that remains {lag} steps earlier, before training: {'; '.join(parts)}."


def learning(task: TaskResult) -> str:
    """Who solves the task, who learns something, who stays at chance."""
    solved = [run.title for run in task.runs if run.solved]
    some = [run.title for run in task.runs if not run.solved and not at_chance(task, run)]
    none = [run.title for run in task.runs if not run.solved and at_chance(task, run)]
    parts = []
    if solved:
        parts.append(f"{_and(solved)} {'solves' if len(solved) == 1 else 'solve'} it")
    if some:
        parts.append(f"{_and(some)} {'learns' if len(some) == 1 else 'learn'} part of it")
    if none:
        parts.append(f"{_and(none)} {'stays' if len(none) == 1 else 'stay'} at chance")
    steps = task.settings["steps"]
    return f"After {steps} updates {', '.join(parts)}."


def explanation(task: TaskResult) -> str:
    """What ties the two together, or that they do not agree here."""
    kept, lost, exploding = (
        [run for run in task.runs if fate(run.before) == what] for what in ("survives", "vanishes", "explodes")
    )
    learnt_lost = [run for run in lost if run.solved]
    failed_kept = [run for run in kept if not run.solved]
    if not lost and not exploding:
        return "No model's gradient vanishes over this length: what separates them is something else."
    lag = task.runs[0].before.lag[-1]
    text = [
        f"At the start the gradient of {_and([run.title for run in runs])} {what} over {lag} steps."
        for runs, what in ((lost, "vanishes"), (exploding, "explodes"))
        if runs
    ]
    if learnt_lost:
        names = [f"{run.title} ({reached(run)})" for run in learnt_lost]
        verb = "solves" if len(names) == 1 else "solve"
        text.append(
            f"Still {_and(names)} {verb} the task: training itself moved the reach. "
            "A gradient that vanishes at the start makes learning slow and uncertain, not always impossible."
        )
    if failed_kept:
        names = _and([run.title for run in failed_kept])
        text.append(f"{names} did not solve it although the gradient reaches: reach is needed, not sufficient.")
    return " ".join(text)


def reached(run: Run) -> str:
    """The change of reach over training."""
    return f"reach {run.before.reach} → {run.after.reach} steps"


def advice(task: TaskResult) -> list[str]:
    """What to do with a task like this, from what was measured."""
    best = min(task.runs, key=lambda run: run.test_error)
    out = []
    if best.solved:
        when = f" after {best.solved_at} updates" if best.solved_at is not None else ""
        out.append(f"Use {best.title}: it solved this task{when} with a {task.metric} of {best.test_error:.3g}.")
    else:
        out.append("No model solved it within the budget: give more --steps, or a cell with a longer carry.")
    for run in task.runs:
        if run.solved or fate(run.before) != "vanishes":
            continue
        cure = best_cure(run)
        if cure is None:
            out.append(f"{run.title}: its gradient vanishes all the same; take an LSTM or GRU with chrono biases.")
            continue
        was, now = (power_of_ten(r.log_norm[-1]) for r in (run.before, cure.reach))
        out.append(
            f"{run.title}: before training {call(task, run, cure)}: of the last step's error {now} then arrives at the "
            f"first step, instead of {was}{_proof(task, cure)}."
        )
    return out


def best_cure(run: Run) -> Cured | None:
    """The first cure after which the gradient survives; without one, that which leaves most."""
    kept = [cure for cure in run.cures if fate(cure.reach) == "survives"]
    return kept[0] if kept else max(run.cures, key=lambda cure: cure.reach.log_norm[-1], default=None)


def call(task: TaskResult, run: Run, cure: Cured) -> str:
    """What to write to get a cure; code stands between backticks."""
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
    """How the cured model did, where the comparison trained it too."""
    return next((outcome(task, run) for run in task.runs if run.name == cure.name), "not trained here")


def _proof(task: TaskResult, cure: Cured) -> str:
    how = {"solved": "solved the task", "partly": "learnt part of it", "chance": "stayed at chance"}
    found = trained(task, cure)
    return f" ({cure.title} was trained here, and {how[found]})" if found in how else ""


def at_chance(task: TaskResult, run: Run) -> bool:
    """Whether the error is within 10 % of what the best constant answer has."""
    return run.test_error > 0.9 * task.chance


def outcome(task: TaskResult, run: Run) -> str:
    """ "solved", "partly" or "chance"."""
    return "solved" if run.solved else "chance" if at_chance(task, run) else "partly"


def half_life(reach: Reach) -> str:
    """In steps; "∞" where the norm does not fade."""
    return "∞" if reach.half_life is None else f"{reach.half_life:.3g}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
