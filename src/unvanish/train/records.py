"""The measurements of a comparison: frozen data, as saved in `results.json`. Drawn by `unvanish.report`."""

import json
import math
import re
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from unvanish.extras import extra

SCHEMA = 4
"""Version of the layout of `results.json`."""


@dataclass(frozen=True)
class Reach:
    """How one error source, at the last step T, travels back: ‖∂E_T/∂s_{T−ℓ}‖ over the lag ℓ, at one moment of
    training."""

    update: int
    """optimizer updates done when it was measured"""
    lag: list[int]
    log_norm: list[float]
    """ln(‖∂E_T/∂s_{T−ℓ}‖ / ‖∂E_T/∂s_T‖), median over the batch; natural logarithm; right far below float64's range"""
    low: list[float]
    """its 10th percentile over the batch"""
    high: list[float]
    """its 90th percentile"""
    rate: float
    """nats per step: the slope of log_norm over the lag"""
    half_life: float | None
    """steps: ln 2 / −rate; None where the norm does not decay"""
    reach: int
    """steps: the largest lag at which the norm is above `fraction` of its value at lag 0"""
    fraction: float


@dataclass(frozen=True)
class GradientBreakdown:
    """Why the gradient survives or dies in the recurrent layer, at one moment of training; medians over the batch.

    None marks a missing number: the logarithm of zero, or a share of no gradient.
    """

    update: int
    steps: list[int]
    """t of all curves below"""
    share: dict[str, list[float | None]]
    """path, in words → its signed share of the last step's gradient that arrives at step t; shares sum to 1"""
    kept: dict[str, list[float | None]]
    """path, in words → ln(‖term‖ / ‖δ_{t+1}‖): the fraction of the gradient that this path alone keeps in the step from
    t + 1 to t, δ the gradient of the state that serves as the cell's memory"""
    kept_in_all: list[float | None]
    """ln(‖Σ terms‖ / ‖δ_{t+1}‖)"""
    subgradient: list[float | None]
    """ln‖g_t‖, ∂E/∂W = Σ_t g_t"""
    partial_sums: list[float | None]
    """ln‖Σ_{s ≥ t} g_s‖"""
    last_steps: int
    """how many of the last steps hold 99 % of Σ_t ‖g_t‖: leaving out the others changes ∂E/∂W by at most 1 % of it"""
    time_constants: list[float | None] | None
    """steps, per unit: τ = 1 / −mean ln of the gate that carries the state; None for a plain RNN"""
    sources: list[int]
    """k of the map's rows"""
    map: list[list[float | None]]
    """ln‖∂E_k/∂s_t‖ of each source k and step t"""


@dataclass(frozen=True)
class Cured:
    """The effect of a cure alone, before any training: another recipe from the same seed."""

    name: str
    """the recipe, "lstm-chrono" """
    title: str
    reach: Reach


@dataclass(frozen=True)
class BiasReach:
    """A fresh LSTM whose forget biases are all set to one value."""

    bias: float
    reach: Reach


@dataclass(frozen=True)
class Rescue:
    """The smallest change of the carry gate's biases that lets a gradient survive, before any training."""

    gate: str
    lag: int
    target: float
    """the survival S(lag) asked for"""
    survival: float
    """before the change"""
    before: list[float]
    """the gate's bias, per unit, as stored in the layer, also for a gate that carries by 1 − γ"""
    after: list[float]
    reach: Reach
    """after the change"""


@dataclass(frozen=True)
class Trial:
    """One training of a model on a task, from one seed of weights, data and order."""

    seed: int
    curve_update: list[int]
    curve_error: list[float]
    """validation error along training, in the task's metric"""
    test_error: float
    solved: bool
    solved_at: int | None
    """the first measured update from which validation stays below `solved_below`"""
    seconds: float
    reach: list[int]
    """steps, before and after training"""


@dataclass(frozen=True)
class Run:
    """One model trained on one task, from several seeds."""

    name: str
    """as asked for: "rnn", "gru", "lstm", "lstm-chrono" """
    title: str
    parameters: int
    trials: list[Trial]
    moments: list[Reach]
    """the first trial's moments: before, during and after training"""
    breakdown: list[GradientBreakdown]
    """of the first trial, before and after training"""
    cures: list[Cured]
    """of a plain cell; none of a cured one"""
    rescue: Rescue | None
    """None where no gate carries the state, or the states' reaction to their biases kept S from the target"""

    @property
    def before(self) -> Reach:
        """The first trial's reach before training."""
        return self.moments[0]

    @property
    def after(self) -> Reach:
        """The first trial's reach after training."""
        return self.moments[-1]

    @property
    def test_error(self) -> float:
        """Median over the trials."""
        return median(trial.test_error for trial in self.trials)

    @property
    def successes(self) -> int:
        """Trials that solved the task."""
        return sum(trial.solved for trial in self.trials)

    @property
    def solved(self) -> bool:
        """Whether more than half of the trials solved the task."""
        return 2 * self.successes > len(self.trials)

    @property
    def solved_at(self) -> int | None:
        """Median over the trials that solved it, of the update from which they did; None: none."""
        found = [trial.solved_at for trial in self.trials if trial.solved and trial.solved_at is not None]
        return round(median(found)) if found else None

    @property
    def success_interval(self) -> tuple[float, float]:
        """95 % interval of the success rate."""
        return wilson(self.successes, len(self.trials))


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a rate p̂ = k/n, by Wilson 1927: (p̂ + z²/2n ± z √(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n).

    Raises:
        ValueError: there is no trial, or there are more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes, trials: expected 0 ≤ k ≤ n and n ≥ 1, got {successes} and {trials}")
    rate, square = successes / trials, z * z / trials
    middle = rate + square / 2
    half = z * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


@dataclass(frozen=True)
class TaskResult:
    """All runs on one task, under one budget."""

    name: str
    title: str
    describe: str
    source: str
    note: str
    """a caution on what a short first reach means for this task; "" where nothing is known"""
    length: int
    metric: str
    """"mean squared error", "error rate", ..."""
    chance: float
    """error of the best answer that ignores the input"""
    solved_below: float
    settings: dict[str, Any]
    """hidden, steps, batch, lr, seed, clip, optimizer"""
    runs: list[Run]
    forget_bias: list[BiasReach]
    """the effect of the forget bias alone on a fresh LSTM on this task"""


@dataclass(frozen=True)
class Comparison:
    """The complete result of `unvanish compare`."""

    tasks: list[TaskResult]
    environment: dict[str, str]
    """versions, processor, threads"""
    command: str
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Comparison":
        """The inverse of `to_json`.

        Raises:
            ValueError: not a comparison, or of another schema version.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"results.json: expected schema {SCHEMA}, got {found!r}; made by another version of unvanish?"
            )
        with extra("lab"):
            from pydantic import TypeAdapter, ValidationError

        try:
            found = TypeAdapter(cls).validate_json(json.dumps(data), strict=True, extra="forbid")
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"results.json: {place}: {first['msg']}, got {str(first['input'])[:40]!r}") from error
        if not found.tasks or not all(task.runs for task in found.tasks):
            raise ValueError("results.json: expected one task at least, and one run at least of each")
        for place, task in enumerate(found.tasks):
            if not isinstance(task.settings.get("steps"), int):
                raise ValueError(f"results.json: tasks.{place}.settings.steps: expected a whole number")
            for run in task.runs:
                if not run.trials or len(run.moments) < 2 or len(run.breakdown) != 2 or not run.before.lag:
                    raise ValueError(
                        f"results.json: tasks.{place}: expected trials, moments, two breakdowns and the gradient over "
                        f"the lag of {run.name!r}"
                    )
        # They become parts of file names and of a page's identifiers.
        runs = [run for task in found.tasks for run in task.runs]
        for named in (*found.tasks, *runs, *(cured for run in runs for cured in run.cures)):
            if not re.fullmatch(r"[A-Za-z0-9_-]+", named.name):
                raise ValueError(
                    f"results.json: expected a name of letters, digits, hyphens and underscores, got {named.name!r}"
                )
        return found
