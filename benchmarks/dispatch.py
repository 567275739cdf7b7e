"""Where torch's layer is faster than the engine: measured, and fitted as the rule of `unvanish.engine.cost`.

    python benchmarks/dispatch.py            # measures, fits, and checks the rule on shapes that it was not fitted to

A call of W = G·H·(I + H) weights over T steps of B samples costs, in the engine less in torch's layer,

    F + p·W − T·(s + g·B·W)

F the overhead of the engine's Python, p the cost of laying out a weight, s what torch spends on a step beside its
product, g what the engine gains on a multiply-add. The four are fitted per layer and mode by least squares of the
difference over torch's time, none of them negative. The LSTM's for training are printed, but not used: see
`unvanish.engine.cost`. Processor time on one thread, medians of interleaved pairs: other work on the machine disturbs
it little.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

import unvanish as uv
from unvanish.engine import cost

FITTED = [(T, B, n, H) for T in (1, 2, 4, 8, 16) for B in (1, 32) for n, H in ((16, 32), (64, 128), (128, 256))]
CHECKED = [(T, B, n, H) for T in (1, 3, 6, 12) for B in (1, 8, 64) for n, H in ((8, 64), (200, 200))]
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def call(layer: nn.Module, shape: tuple[int, int, int, int], training: bool) -> Callable[[], None]:
    T, B, n_in, H = shape
    x, error = torch.randn(T, B, n_in), torch.randn(T, B, H)

    def train() -> None:
        layer(x)[0].backward(error)

    def infer() -> None:
        with torch.no_grad():
            layer(x)

    return train if training else infer


def times(kind: str, shape: tuple[int, int, int, int], training: bool, budget: float) -> tuple[float, float]:
    """Microseconds of a call of (torch's layer, ours on the engine)."""
    torch.manual_seed(0)
    sides = [call(getattr(where, kind)(*shape[2:]), shape, training) for where in (nn, uv.nn)]

    def timed(f: Callable[[], None], n: int) -> float:
        start = time.process_time()
        for _ in range(n):
            f()
        return 1e6 * (time.process_time() - start) / n

    longest = max(timed(f, 3) for f in sides for _ in range(2))
    n = max(1, int(1e6 * budget / 10 / longest))
    both = [[timed(f, n) for f in sides] for _ in range(5)]
    theirs, ours = (statistics.median(side) for side in zip(*both, strict=True))
    return theirs, ours


def terms(kind: str, shape: tuple[int, int, int, int]) -> list[float]:
    T, B, n_in, H = shape
    W = GATES[kind] * H * (n_in + H)
    return [1.0, W, -T, -T * B * W]


def measured(shapes: list[tuple[int, int, int, int]], budget: float) -> Iterator[tuple[str, bool, list]]:
    for kind in GATES:
        for training in (False, True):
            yield kind, training, [(shape, *times(kind, shape, training, budget)) for shape in shapes]


def main() -> None:
    torch.set_num_threads(1)
    cost.CALLS.clear()
    rules = {}
    for kind, training, rows in measured(FITTED, 0.1):
        A = np.array([terms(kind, shape) for shape, _, _ in rows])
        theirs, ours = (np.array([row[k] for row in rows]) for k in (1, 2))
        found, _ = nnls(A / theirs[:, None], (ours - theirs) / theirs)
        rules[kind, training] = found
        print(f"({kind!r}, {training}): Call({', '.join(f'{v:.3g}' for v in found)}),", flush=True)
    chosen, lost = [], []
    for kind, training, rows in measured(CHECKED, 0.1):
        for shape, theirs, ours in rows:
            took = theirs if rules[kind, training] @ terms(kind, shape) > 0 else ours
            chosen.append(theirs / took)
            lost.append((min(theirs, ours) / took, f"{kind} {'train' if training else 'infer'} {shape}"))
    print(f"on other shapes, torch's time over that of the rule's choice: {statistics.geometric_mean(chosen):.2f}")
    print(f"lowest {min(chosen):.2f}; wrong by more than 5 %: {sum(v < 0.95 for v, _ in lost)} of {len(lost)}")
    for share, name in sorted(lost)[:10]:
        print(f"  {name}: {share:.2f} of the faster one's speed")


if __name__ == "__main__":
    main()
