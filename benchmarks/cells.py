"""Any cell in nn.Recurrent against a Python loop of the same step under autograd: a training step, interleaved.

    python benchmarks/cells.py                    # one and two threads, H = 64 and 128; about five minutes
    python benchmarks/cells.py --cells mgu slstm  # other cells of unvanish.cells.ZOO

The loop is what a user would write: x_t and the state through `linear`, the cell's step, the outputs stacked at the
end. Forward and backward in float32, with an error at every step; x needs no gradient. Medians of each side, in CPU
time of the process over all its threads (which other work on the machine hardly changes) and in wall time.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import unvanish as uv

CELLS = ("mgu", "peephole", "cifg", "janet", "leaky", "slstm", "ur_lstm", "star", "indrnn", "lif")
T, B, INPUT = 200, 32, 64


def loop(layer: uv.nn.Recurrent, x: Tensor) -> Tensor:
    """The layer's output as a Python loop under autograd makes it."""
    cell, w = layer.cell, layer.direction_weights(0, False)
    state = cell.start(x[0], (layer.hidden_size,) * len(cell.states))
    y = []
    for x_t in x:
        state = cell.advance(cell.project(x_t, w), state, w)
        y.append(state[0])
    return torch.stack(y)


def measure(sides: list[Callable[[], None]], repeats: int) -> list[tuple[float, float]]:
    """(CPU ms, wall ms) of each side, medians of interleaved runs."""
    for side in sides:
        side()
    taken: list[list[tuple[float, float]]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, into in zip(sides, taken, strict=True):
            cpu, wall = time.process_time(), time.perf_counter()
            side()
            into.append((1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)))
    return [(statistics.median(c for c, _ in runs), statistics.median(w for _, w in runs)) for runs in taken]


def compare(name: str, H: int, repeats: int) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    layer = uv.nn.Recurrent(uv.cells.ZOO[name](), INPUT, H)
    x, dy = torch.randn(T, B, INPUT), torch.randn(T, B, H)

    def step(output: Callable[[], Tensor]) -> None:
        for p in layer.parameters():
            p.grad = None
        output().backward(dy)

    with uv.engine.force("manual"):
        return measure([lambda: step(lambda: loop(layer, x)), lambda: step(lambda: layer(x)[0])], repeats)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=list(uv.cells.ZOO))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    print(
        f"{processor()}, {platform.system()}; Python {platform.python_version()}, torch {torch.__version__}, ", end=""
    )
    print(f"unvanish {uv.__version__}, {uv.engine.isa()}; T = {T}, B = {B}, I = {INPUT}, float32\n")
    print(
        "| cell | H | threads | loop, CPU ms | ours, CPU ms | CPU ratio | loop, wall ms | ours, wall ms | wall ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in given.cells:
        for H in given.hidden:
            for threads in given.threads:
                torch.set_num_threads(threads)
                (cpu, wall), (our_cpu, our_wall) = compare(name, H, given.repeats)
                ratios = cpu / our_cpu, wall / our_wall
                print(
                    f"| {name} | {H} | {threads} | {cpu:.1f} | {our_cpu:.1f} | {ratios[0]:.1f} "
                    f"| {wall:.1f} | {our_wall:.1f} | {ratios[1]:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
