"""How fast unvanish's layers are compared with torch's on this machine: everyday shapes, interleaved in one process."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn.modules import rnn as torchs

from unvanish.nn.accelerate import accelerate
from unvanish.seeding import seeded

KINDS = {"RNN": torchs.RNN, "GRU": torchs.GRU, "LSTM": torchs.LSTM}
SHAPES = (
    (1, 1, 16, 32), (1, 32, 64, 128), (4, 8, 32, 64), (8, 1, 64, 128), (8, 64, 64, 128), (16, 32, 32, 64),
    (25, 4, 16, 32), (25, 64, 64, 128), (50, 1, 32, 64), (50, 16, 64, 128), (50, 32, 128, 256), (100, 1, 64, 128),
    (100, 8, 32, 64), (100, 32, 1, 64), (100, 32, 64, 128), (200, 4, 64, 128), (200, 16, 32, 64), (200, 32, 16, 32),
    (500, 1, 32, 64), (500, 8, 64, 128),
)  # fmt: skip
"""(T, B, I, H)"""
STEPS = 16
"""single steps of a stepped row, the state passed on from call to call"""
PAIRS = 3
"""the fewest pairs of measurements per row; the median is reported"""
SHORTEST = 2e-3
"""the least seconds for one side of a pair; shorter calls are repeated"""


@dataclass(frozen=True)
class Row:
    """One layer, shape and use."""

    kind: str
    """ "RNN", "GRU" or "LSTM" """
    shape: tuple[int, int, int, int]
    """(T, B, I, H); T = 1 for a stepped row"""
    train: bool
    """forward and backward with a gradient at every step; else forward without gradients"""
    low: bool
    """under autocast to bfloat16; else float32"""
    stepped: bool
    """one call per step instead of one per sequence"""

    def __str__(self) -> str:
        how = f"{'training' if self.train else 'inference'}, {'bfloat16' if self.low else 'float32'}"
        return f"{self.kind} {', '.join(map(str, self.shape))} {how}{', step by step' if self.stepped else ''}"


@dataclass(frozen=True)
class Timing:
    """The measurement of a row."""

    row: Row
    torchs: float | None
    """the median time of a call of torch's layer, in seconds; None where torch's layer can't run on this machine, as
    its LSTM under autocast to bfloat16 can't without AVX-512"""
    ratio: float | None
    """torch's time divided by ours, the median of the pairs; None likewise"""


def rows() -> list[Row]:
    """Every kind and shape, for training and inference, in float32 and under autocast, as whole sequences; those of one
    step also as a loop of calls."""
    found = []
    for kind, shape, train, low in product(KINDS, SHAPES, (True, False), (False, True)):
        found.append(Row(kind, shape, train, low, stepped=False))
        if shape[0] == 1:
            found.append(Row(kind, shape, train, low, stepped=True))
    return found


def compare_speed(
    rows: Iterable[Row], seconds: float = 120.0, tell: Callable[[Timing], None] | None = None
) -> list[Timing]:
    """Torch's time divided by ours for each row, for layers with the same weights, run alternately.

    Args:
        rows: what to time, see `rows`.
        seconds: time for all rows together; at least three pairs are measured per row, however slow it is.
        tell: called with each result.

    Raises:
        ValueError: seconds is not a positive number.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds: expected a positive number, got {seconds}")
    chosen, found = list(rows), []
    for row in chosen:
        found.append(_timed(row, seconds / len(chosen)))
        if tell is not None:
            tell(found[-1])
    return found


def geometric_mean(timings: Iterable[Timing]) -> float | None:
    """Of the ratios; None where there are none."""
    ratios = [t.ratio for t in timings if t.ratio is not None]
    return statistics.geometric_mean(ratios) if ratios else None


def _timed(row: Row, seconds: float) -> Timing:
    end = time.perf_counter() + seconds
    with seeded(0):
        sides = [_call(row, ours) for ours in (False, True)]
    try:
        sides[0]()
    except RuntimeError:
        sides[1]()
        return Timing(row, None, None)
    once = max(min(_seconds(side, 1) for _ in range(2)) for side in sides)
    repeats = max(1, math.ceil(SHORTEST / once))
    torchs, ratios = [], []
    while len(ratios) < PAIRS or time.perf_counter() < end:
        # The order alternates, since the second side finds the caches as the first has left them.
        order = (0, 1) if len(ratios) % 2 else (1, 0)
        took = {side: _seconds(sides[side], repeats) for side in order}
        torchs.append(took[0])
        ratios.append(took[0] / took[1])
    return Timing(row, statistics.median(torchs), statistics.median(ratios))


def _seconds(call: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _call(row: Row, ours: bool) -> Callable[[], None]:
    T, B, columns, H = row.shape
    layer: nn.Module = KINDS[row.kind](columns, H)
    if ours:
        accelerate(layer)
    x, error = torch.randn(T, B, columns), torch.randn(T, B, H)

    def output() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16) if row.low else nullcontext():
            if not row.stepped:
                return [layer(x)[0]]
            state: Any = None
            outputs = []
            for _ in range(STEPS):
                y, state = layer(x, state)
                outputs.append(y)
            return outputs

    def train() -> None:
        outputs = output()
        torch.autograd.backward(outputs, [error.to(y.dtype) for y in outputs])

    def infer() -> None:
        with torch.no_grad():
            output()

    return train if row.train else infer
