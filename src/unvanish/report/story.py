"""The sentences of the page, each computed from the records that the picture beside it shows."""

from __future__ import annotations

from math import exp, log
from statistics import median
from typing import TYPE_CHECKING

from unvanish.draw import steps
from unvanish.report.wording import counted, fate, listed, outcome, power_of_ten, success

if TYPE_CHECKING:
    from unvanish.train.records import GradientBreakdown, Reach, Run, TaskResult


def headline(task: TaskResult) -> str:
    """The result in two sentences: how far a plain network's gradient reaches, and how far the task needs it."""
    plain, lag = forgetful(task), task.runs[0].before.lag[-1]
    if plain is None:
        return f"No model's gradient vanishes over the {lag} steps of this task."
    return f"A fresh {plain.title} forgets after {steps(plain.before.reach)}. The task spans {lag}."


def lead(task: TaskResult) -> str:
    """The outcome: the cure's reach, and which models solved the task from how many seeds."""
    solved = [counted(run) for run in task.runs if run.solved]
    failed = [run.title for run in task.runs if outcome(task, run) == "chance"]
    parts = []
    best = enduring(task)
    if best is not None:
        parts.append(f"The {best.title} keeps {share(best.before.log_norm[-1])} of its gradient over all of them.")
    parts.append(f"Solved by {listed(solved)}." if solved else "No model solved the task.")
    if failed:
        parts.append(f"At chance: {listed(failed)}.")
    return " ".join(parts)


def enduring(task: TaskResult) -> Run | None:
    """A run whose gradient survives: the cured version of the headline's run, else the first one."""
    kept, plain = [run for run in task.runs if fate(run.before) == "survives"], forgetful(task)
    cures = [run for run in kept if plain is not None and run.name.startswith(f"{plain.name}-")]
    return next(iter([*cures, *kept]), None)


def share(log_norm: float) -> str:
    """A fraction e^log_norm in per cent, far below that as a power of ten: "18 %", "10⁻⁴¹"."""
    return f"{100 * exp(log_norm):.0f} %" if log_norm > log(0.005) else power_of_ten(log_norm)


def forgetful(task: TaskResult) -> Run | None:
    """The run that the headline is about: the plain LSTM if its gradient vanishes, else the first that does."""
    lost = [run for run in task.runs if fate(run.before) == "vanishes"]
    return next((run for run in lost if run.name == "lstm"), lost[0] if lost else None)


def story(task: TaskResult, run: Run) -> dict[str, str]:
    """The sentences for the pictures of one run: the product of factors, training, the weight update, the rescue."""
    return {
        "product": product(run.before),
        "training": training(task, run),
        "update": " ".join((update(run.breakdown[0], "Before"), update(run.breakdown[1], "After"))),
        "rescue": rescue(run),
    }


def product(reach: Reach) -> str:
    """The rate as a factor per step."""
    lag, kept = reach.lag[-1], power_of_ten(reach.log_norm[-1])
    half = "" if reach.half_life is None else f", halving it every {reach.half_life:.3g} steps"
    return f"Over {lag} steps {kept} remains{half}. More than 1 % remains for {steps(reach.reach)}."


def training(task: TaskResult, run: Run) -> str:
    """How reach and error moved while the first trial was trained, and which of them moved first."""
    trial, lag = run.trials[0], run.before.lag[-1]
    moved = f"Reach {run.before.reach} before training, {run.after.reach} after it, of {lag} steps."
    if fate(run.before) != "vanishes":
        return f"{moved} {_ends(task, run)}"
    far = next((m.update for m in run.moments if m.reach >= lag / 2), None)
    pairs = zip(trial.curve_update, trial.curve_error, strict=True)
    better = next((update for update, error in pairs if error < task.chance / 2), None)
    if far is None:
        return f"{moved} It never passed half of the steps. {_ends(task, run)}"
    order = f"Reach passed half of the steps by update {far}"
    if better is not None:
        order += f", the error half of chance by update {better}"
    if not run.solved:
        return f"{moved} {order}. {_ends(task, run)}"
    kept = power_of_ten(run.before.log_norm[-1])
    note = task.note if run.title in task.note else ""
    return (
        f"{moved} {order}. It learns although only {kept} of the gradient arrives at the first step at the start: "
        f"training itself opened the gate that carries the state{_opened(run)}. {note}"
    ).rstrip()


def _opened(run: Run) -> str:
    """The growth of the gates' time constants, in words."""
    was, now = (_memory(found) for found in run.breakdown)
    return (
        ""
        if was is None or now is None
        else f" (time constant of the slowest tenth of units: {was:.3g} → {now:.3g} steps)"
    )


def _memory(found: GradientBreakdown) -> float | None:
    known = sorted(value for value in found.time_constants or [] if value is not None)
    return known[int(0.9 * (len(known) - 1))] if known else None


def _ends(task: TaskResult, run: Run) -> str:
    return {
        "solved": f"Solved from {success(run)} of the seeds (in brackets the 95 % interval of the rate).",
        "partly": f"Learnt in part: median {task.metric} {run.test_error:.3g}, chance {task.chance:.3g}.",
        "chance": "It stays at chance.",
    }[outcome(task, run)]


def update(found: GradientBreakdown, when: str) -> str:
    """The last steps that the weight's gradient consists of."""
    last = "the last step alone" if found.last_steps == 1 else f"the last {found.last_steps} steps"
    return f"{when} training, 99 % of the update comes from {last}."


def rescue(run: Run) -> str:
    """The smallest change of the biases and its effect; empty where there is none."""
    found = run.rescue
    if found is None:
        return ""
    change = [after - before for before, after in zip(found.before, found.after, strict=True)]
    opened = sum(abs(c) > 0.5 for c in change)
    norm = sum(c * c for c in change) ** 0.5
    middle = median(sorted(map(abs, change)))
    rest = " and leaves the others nearly as they were" if middle < 0.1 else ""
    return (
        f"The smallest change of the biases of gate {found.gate} (2-norm {norm:.3g}) after which a gradient survives "
        f"{found.lag} steps with S = {found.target:g} opens {opened} of {len(change)} units{rest}. "
        f"Reach {run.before.reach} → {found.reach.reach} steps, without any training."
    )


def alternatives(task: TaskResult) -> dict[str, str]:
    """Alternative texts of the pictures; each states the result."""
    lag = task.runs[0].before.lag[-1]
    kept = "; ".join(f"{run.title} {power_of_ten(run.before.log_norm[-1])}" for run in task.runs)
    errors = "; ".join(f"{run.title} {run.test_error:.3g}" for run in task.runs)
    return {
        "hero": f"The gradient walks back from the last step. Remaining after {lag} steps: {kept}.",
        "learning": f"Validation error over updates. At the end, on test samples: {errors}; chance {task.chance:.3g}.",
    }
