"""A comparison made up for tests of what is said and drawn of one."""

import math

from unvanish.train.records import (
    BiasReach,
    Comparison,
    Cured,
    GradientBreakdown,
    Reach,
    Rescue,
    Run,
    TaskResult,
    Trial,
)

HOSTILE = ["<script>alert(1)</script>\"'&", "</script><img src=x onerror=alert(1)>", "שלום ‮abc", "x" * 300]
PATHS = (
    "B · carry, diag(f)",
    "A · through the forget gate's weights",
    "C · through the input gate's weights",
    "D · through the candidate's weights",
    "O · through the output gate's weights",
)


def reach(slope: float, update: int = 0, length: int = 200) -> Reach:
    """A gradient that changes by `slope` nats per step."""
    curve = [slope * lag for lag in range(length)]
    half = math.log(2) / -slope if slope < 0 else None
    last = max(lag for lag in range(length) if slope * lag > math.log(0.01))
    low, high = [v - 1 for v in curve], [v + 1 for v in curve]
    return Reach(update, list(range(length)), curve, low, high, slope, half, last, 0.01)


def breakdown(update: int, slope: float = -0.1, paths: tuple[str, ...] = PATHS) -> GradientBreakdown:
    steps = list(range(0, 200, 2))
    map_ = [[slope * (k - t) if t <= k else None for t in steps] for k in (99, 149, 199)]
    share: dict[str, list[float | None]] = {path: [1 / len(paths)] * 99 + [None] for path in paths}
    kept: dict[str, list[float | None]] = {path: [slope - 2.0 * i] * 98 + [None] * 2 for i, path in enumerate(paths)}
    curve: list[float | None] = [slope * (199 - t) for t in steps]
    partial: list[float | None] = [0.0] * 100
    carry: list[float | None] = [slope] * 98 + [None] * 2
    return GradientBreakdown(
        update, steps, share, kept, carry, curve, partial, 9, [2.0, 30.0, None], [99, 149, 199], map_
    )  # fmt: skip


def trial(error: float, seed: int = 0) -> Trial:
    solved = error < 0.01
    return Trial(seed, [50, 100], [0.2, error], error, solved, 100 if solved else None, 1.0, [9, 199])


def run(
    title: str, slope: float, error: float, after: float | None = None, *, name: str = "rnn", **more: object
) -> Run:
    end = slope if after is None else after
    moments = [reach(slope + (end - slope) * i / 4, 25 * i) for i in range(5)]
    paths = PATHS if name.startswith("lstm") else ("carry, diag(z)", "through the weights of gate r")
    rescue = Rescue("f", 199, 0.5, 1e-30, [0.1, -0.2, 0.05], [6.0, -0.2, 0.1], reach(-0.003))
    values = {
        "trials": [trial(error, seed) for seed in range(3)],
        "moments": moments,
        "breakdown": [breakdown(0, slope, paths), breakdown(100, end, paths)],
        "cures": [Cured("lstm-chrono", f"cured {title}", reach(-0.001))],
        "rescue": rescue,
    }
    return Run(name, title, 10, **(values | more))  # type: ignore[arg-type]


def task(*runs: Run, name: str = "adding", title: str = "Adding") -> TaskResult:
    settings = {"steps": 100, "hidden": 4, "seed": 0}
    bias = [BiasReach(b, reach(-math.log1p(math.exp(-b)))) for b in (-1.0, 0.0, 2.0, 4.0)]
    return TaskResult(
        name,
        title,
        "Add.",
        "a paper",
        "A note on the GRU.",
        200,
        "mean squared error",
        1 / 6,
        0.01,
        settings,
        list(runs),
        bias,
    )


def comparison(*runs: Run) -> Comparison:
    return Comparison([task(*runs)], {"torch": "2"}, "unvanish compare")


def two_tasks() -> Comparison:
    """What a demo finds: plain cells that forget, a cured one that does not, one that learns to remember."""
    runs = (
        run("tanh-RNN", -0.55, 0.167, name="rnn", rescue=None),
        run("GRU", -0.43, 0.001, after=-0.002, name="gru"),
        run("LSTM", -0.5, 0.17, name="lstm"),
        run("chrono LSTM", -0.004, 0.001, name="lstm-chrono", cures=[]),
    )
    tasks = [task(*runs), task(*runs[::-1], name="digits-padded", title="Digits, then noise")]
    return Comparison(tasks, {"torch": "2"}, "unvanish compare")
