"""Where torch's layer is faster than the engine: measured, and fitted as the rule of `unvanish.engine.cost`.

    python benchmarks/dispatch.py            # measures, fits, and checks the rule on shapes that it was not fitted to
    python benchmarks/dispatch.py --low      # under autocast to bfloat16

A call of W = G·H·(I + H) weights over T steps of B samples costs, in the engine less in torch's layer,

    F + p·W − T·(s + q·W + g·B·W)

F the overhead of the engine's Python, p the cost of laying out a weight, s what torch spends on a step beside its
product, q what the engine gains on reading a weight at a step, g on a multiply-add. They are fitted per layer and mode
by least squares of the difference over torch's time, none of them negative, q = 0 in float32. In bfloat16 the
difference is taken over the slower one's time and g may be negative; there F is at least s, and rows in which the
engine is slower count twice, because a layer that became slower is worse than one that could be faster. The LSTM's for
training in float32 are printed, but not used: see `unvanish.engine.cost`. Processor time on one thread, medians of
interleaved pairs: other work on the machine disturbs it little. An LSTM in bfloat16 is measured on two threads as well,
which make torch's steps longer.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import nn

import unvanish as uv

Shape = tuple[int, int, int, int]
FITTED = [(T, B, n, H) for T in (1, 2, 4, 8, 16) for B in (1, 32) for n, H in ((16, 32), (64, 128), (128, 256))]
CHECKED = [(T, B, n, H) for T in (1, 3, 6, 12) for B in (1, 8, 64) for n, H in ((8, 64), (200, 200))]
LOW_SIZES = ((16, 32), (64, 128), (128, 256), (256, 512))
# The largest calls, of a second and more, say nothing that those before them don't.
FITTED_LOW = [
    (T, B, n, H) for T in (1, 4, 16, 64) for B in (1, 8, 32, 128) for n, H in LOW_SIZES if T * B * H * (n + H) < 5e8
]
CHECKED_LOW = [(T, B, n, H) for T in (1, 6, 40) for B in (2, 16, 64) for n, H in ((8, 64), (200, 200), (80, 400))]
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3, "LSTM_LOOP": 4}
"""LSTM_LOOP: an LSTM that torch runs step by step, as one with a projection to half its units"""


class Row(NamedTuple):
    kind: str
    training: bool
    threads: int
    shape: Shape
    torchs: float
    """microseconds in torch's layer"""
    ours: float

    @property
    def terms(self) -> list[float]:
        T, B, n_in, H = self.shape
        W = GATES[self.kind] * H * (n_in + outputs(self.kind, H))
        return [1.0, W, -T, -T * B * W / self.threads, -T * W / self.threads, -T * (self.threads > 1)]


def outputs(kind: str, H: int) -> int:
    return H // 2 if kind == "LSTM_LOOP" else H


def call(where: Any, kind: str, shape: Shape, training: bool, low: bool) -> Callable[[], None]:
    T, B, n_in, H = shape
    options = {"proj_size": H // 2} if kind == "LSTM_LOOP" else {}
    layer = getattr(where, kind.removesuffix("_LOOP"))(n_in, H, **options)
    x, error = torch.randn(T, B, n_in), torch.randn(T, B, outputs(kind, H))
    engine = where is uv.nn

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low), uv.engine.force("native") if engine else nullcontext():
            if training:
                y = layer(x)[0]
                y.backward(error.to(y.dtype))
            else:
                with torch.no_grad():
                    layer(x)

    return run


def times(kind: str, shape: Shape, training: bool, low: bool, budget: float = 0.1) -> tuple[float, float]:
    """Microseconds of a call of (torch's layer, ours on the engine)."""
    torch.manual_seed(0)
    sides = [call(where, kind, shape, training, low) for where in (nn, uv.nn)]
    # Of several threads, processor time would count the one that waits.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def timed(f: Callable[[], None], n: int) -> float:
        start = clock()
        for _ in range(n):
            f()
        return 1e6 * (clock() - start) / n

    longest = max(timed(f, 3) for f in sides for _ in range(2))
    n = max(1, int(1e6 * budget / 10 / longest))
    both = [[timed(f, n) for f in sides] for _ in range(5)]
    theirs, ours = (statistics.median(side) for side in zip(*both, strict=True))
    return theirs, ours


def measured(shapes: list[Shape], low: bool) -> Iterator[list[Row]]:
    """The rows of each layer and mode."""
    for kind in GATES:
        for training in (False, True):
            rows = []
            for threads in (1, 2) if low and kind == "LSTM" else (1,):
                torch.set_num_threads(threads)
                rows += [Row(kind, training, threads, shape, *times(kind, shape, training, low)) for shape in shapes]
            yield rows


def fitted(rows: list[Row], low: bool) -> np.ndarray:
    """The costs of a `cost.Call`."""
    A = np.array([row.terms for row in rows], dtype=float)
    torchs, ours = np.array([row.torchs for row in rows]), np.array([row.ours for row in rows])
    least = np.zeros(6)
    weight = 1 / torchs
    if low:
        weight = np.where(torchs < ours, 2, 1) / np.maximum(torchs, ours)
        least[3] = -np.inf
        A[:, 2] += 1  # the first column is now F − s
    else:
        A[:, 4] = 0
    scale = np.abs(A).max(axis=0)
    seen = scale > 0
    A, scale, costs = A[:, seen], scale[seen], np.zeros(6)
    found = lsq_linear(A * weight[:, None] / scale, (ours - torchs) * weight, bounds=(least[seen] * scale, np.inf))
    costs[seen] = found.x / scale
    if low:
        costs[0] += costs[2]
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--low", action="store_true", help="under autocast to bfloat16")
    low = parser.parse_args().low
    rules = {}
    for rows in measured(FITTED_LOW if low else FITTED, low):
        kind, training = rows[0][:2]
        rules[kind, training] = found = fitted(rows, low)
        print(f"({kind!r}, {training}): Call({', '.join(f'{v:.3g}' for v in found)}),", flush=True)
    chosen, lost = [], []
    for rows in measured(CHECKED_LOW if low else CHECKED, low):
        for row in rows:
            took = row.torchs if rules[row.kind, row.training] @ row.terms > 0 else row.ours
            chosen.append(row.torchs / took)
            name = f"{row.kind} {'train' if row.training else 'infer'} {row.shape}, threads: {row.threads}"
            lost.append((min(row.torchs, row.ours) / took, name))
    print(f"on other shapes, torch's time over that of the rule's choice: {statistics.geometric_mean(chosen):.2f}")
    print(f"lowest {min(chosen):.2f}; wrong by more than 5 %: {sum(v < 0.95 for v, _ in lost)} of {len(lost)}")
    for share, name in sorted(lost)[:10]:
        print(f"  {name}: {share:.2f} of the faster one's speed")


if __name__ == "__main__":
    main()
