"""What a comparison measured: frozen data, as it stands in `results.json`. Drawn by `unvanish.report`."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 3
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
    """Why the error survives or dies in the recurrent layer, at one moment of training; medians over the batch.

    None stands where there is no number: a logarithm of zero, a share of no error.
    """

    update: int
    steps: list[int]
    """t of all curves below"""
    share: dict[str, list[float | None]]
    """path, in words → its signed share of the last step's error that comes back to step t; they sum to 1"""
    subgradient: list[float | None]
    """ln‖g_t‖, ∂E/∂W = Σ_t g_t"""
    partial_sums: list[float | None]
    """ln‖Σ_{s ≥ t} g_s‖"""
    time_constants: list[float | None] | None
    """steps, per unit: τ = 1 / −mean ln of the gate that carries the state; None for a plain RNN"""
    sources: list[int]
    """k of the map's rows"""
    map: list[list[float | None]]
    """ln‖∂E_k/∂s_t‖ of each source k and step t"""


@dataclass(frozen=True)
class Cured:
    """What a cure alone does, before any training: another recipe from the same seed."""

    name: str
    """the recipe, "lstm-chrono" """
    title: str
    reach: Reach


@dataclass(frozen=True)
class Run:
    """One model trained on one task."""

    name: str
    """as asked for: "rnn", "gru", "lstm", "lstm-chrono" """
    title: str
    parameters: int
    curve_update: list[int]
    curve_error: list[float]
    """validation error along training, in the task's metric"""
    test_error: float
    solved: bool
    solved_at: int | None
    """the first measured update from which validation stays below `solved_below`"""
    seconds: float
    before: Reach
    during: list[Reach]
    after: Reach
    breakdown: list[GradientBreakdown]
    """before and after training"""
    cures: list[Cured]
    """of a plain cell; none of a cured one"""


@dataclass(frozen=True)
class TaskResult:
    """All runs on one task, under one budget."""

    name: str
    title: str
    describe: str
    source: str
    length: int
    metric: str
    """"mean squared error", "error rate", ..."""
    chance: float
    """error of the best answer that ignores the input"""
    solved_below: float
    settings: dict[str, Any]
    """hidden, steps, batch, lr, seed, clip, optimizer"""
    runs: list[Run]


@dataclass(frozen=True)
class Comparison:
    """Everything `unvanish compare` found out."""

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
        from pydantic import TypeAdapter, ValidationError

        try:
            found = TypeAdapter(cls).validate_json(json.dumps(data), strict=True, extra="forbid")
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"results.json: {place}: {first['msg']}, got {str(first['input'])[:40]!r}") from error
        for place, task in enumerate(found.tasks):
            if not isinstance(task.settings.get("steps"), int):
                raise ValueError(f"results.json: tasks.{place}.settings.steps: expected a whole number")
        # They become parts of file names and of a page's identifiers.
        runs = [run for task in found.tasks for run in task.runs]
        for named in (*found.tasks, *runs, *(cured for run in runs for cured in run.cures)):
            if not re.fullmatch(r"[A-Za-z0-9-]+", named.name):
                raise ValueError(f"results.json: expected a name of letters, digits and hyphens, got {named.name!r}")
        return found
