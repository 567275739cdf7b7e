"""Our layers against torch's, interleaved in one process: medians, ratios, and the share of the machine's FMA peak.

    python benchmarks/layers.py                  # both allocator settings, all rows; about twenty minutes on two cores
    python benchmarks/layers.py --rows lstm      # only rows whose name contains "lstm"
    python benchmarks/layers.py --isas           # our kernels of each instruction set that runs here against each other
    python benchmarks/layers.py --memory         # peak memory of a training step, and checkpoint_every at T = 100,000

"default" is torch as shipped. "keep" sets glibc's MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_, so
that freed memory stays mapped: much of torch's deficit is page faults on fresh memory, not kernels. Both run in a
process of their own. Each call makes its outputs afresh, as a user gets them. The peak is that of multiply-adds on
registers, on all threads at once.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unvanish as uv
from unvanish import _native

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
SHAPES = {
    "LSTM": [
        (1000, 32, 1, 128), (1000, 32, 64, 128), (1000, 32, 128, 256), (500, 32, 256, 512),
        (1000, 1, 64, 128), (1000, 128, 64, 128), (1000, 8, 32, 64),
    ],
    "GRU": [
        (1000, 32, 64, 128), (1000, 32, 128, 256), (500, 32, 256, 512),
        (1000, 1, 64, 128), (1000, 128, 64, 128), (1000, 8, 32, 64),
    ],
    "RNN": [(1000, 32, 64, 128), (1000, 32, 128, 256), (500, 32, 256, 512), (1000, 1, 64, 128)],
}  # fmt: skip
COMMON = (1000, 32, 64, 128)
EVERY = 1000
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def rows() -> dict[str, Callable[[], tuple[Callable[[], None], Callable[[], None], float | None]]]:
    """Name → a maker of (torch's step, our step, floating point operations or None)."""
    out: dict[str, Any] = {}
    for kind, shapes in SHAPES.items():
        for shape in shapes:
            label = f"{kind} {','.join(map(str, shape))}"
            out[f"train {label}"] = lambda kind=kind, shape=shape: train(kind, *shape)
            out[f"infer {label}"] = lambda kind=kind, shape=shape: infer(kind, *shape)
        out[f"float64 {kind}"] = lambda kind=kind: train(kind, *COMMON, dtype=torch.float64)
        out[f"ragged {kind}"] = lambda kind=kind: train(kind, *COMMON, ragged=True)
        out[f"2 layers, bidirectional {kind}"] = lambda kind=kind: train(
            kind, 500, 32, 64, 128, num_layers=2, bidirectional=True
        )
        out[f"error at the last step {kind}"] = lambda kind=kind: train(kind, *COMMON, last=True)
        out[f"x with gradient {kind}"] = lambda kind=kind: train(kind, *COMMON, x_grad=True)
    out["projected LSTM"] = lambda: train("LSTM", *COMMON, proj_size=64)
    out["subnormal RNN, radius 0.5"] = lambda: train("RNN", *COMMON, last=True, radius=0.5)
    return out


def pair(
    kind: str, n_in: int, H: int, dtype: torch.dtype, radius: float | None, **options: Any
) -> tuple[nn.RNNBase, nn.RNNBase]:
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(n_in, H, dtype=dtype, **options)
    if radius is not None:
        uv.cures.spectral_radius_(theirs, radius)
    ours = getattr(uv.nn, kind)(n_in, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def train(
    kind: str,
    T: int,
    B: int,
    n_in: int,
    H: int,
    dtype: torch.dtype = torch.float32,
    ragged: bool = False,
    last: bool = False,
    x_grad: bool = False,
    radius: float | None = None,
    **options: Any,
) -> tuple[Callable[[], None], Callable[[], None], float | None]:
    """Forward and full backward with an error at every step, or at the last."""
    layers = pair(kind, n_in, H, dtype, radius, **options)
    x: Any = torch.randn(T, B, n_in, dtype=dtype, requires_grad=x_grad)
    if ragged:
        lengths = torch.randint(T // 4, T + 1, (B,), generator=torch.Generator().manual_seed(0))
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    sample = layers[0](x)[0]
    like: Tensor = sample.data if ragged else (sample[-1] if last else sample)
    error = torch.randn_like(like)

    def step(layer: nn.RNNBase) -> None:
        y = layer(x)[0]
        (y.data if ragged else y[-1] if last else y).backward(error)

    steps = int(lengths.sum()) if ragged else T * B
    work = 2 * steps * GATES[kind] * H * (3 * H + n_in * (3 if x_grad else 2))
    return lambda: step(layers[0]), lambda: step(layers[1]), None if options else work


def infer(kind: str, T: int, B: int, n_in: int, H: int) -> tuple[Callable[[], None], Callable[[], None], float | None]:
    """Forward without gradients."""
    layers = pair(kind, n_in, H, torch.float32, None)
    x = torch.randn(T, B, n_in)

    def step(layer: nn.RNNBase) -> None:
        with torch.no_grad():
            layer(x)

    return lambda: step(layers[0]), lambda: step(layers[1]), 2 * T * B * GATES[kind] * H * (H + n_in)


def peak(dtype: str = "float32") -> float:
    """FLOP/s of multiply-adds on registers, on all of torch's threads at once: the best of several runs."""
    run, isa, rounds = getattr(_native, f"peak_{dtype}"), os.environ.get("UNVANISH_ISA"), 10**6
    threads, best = torch.get_num_threads(), 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter()
            done = sum(pool.map(lambda _: run(rounds, isa), range(threads)))
            best = max(best, done / (time.perf_counter() - start))
    return best


def measure(pattern: str, repeats: int) -> dict[str, Any]:
    """Medians of both, alternating."""
    torch.set_num_threads(2)
    top, out = {"float32": peak(), "float64": peak("float64")}, {}
    for name, make in rows().items():
        if pattern.lower() not in name.lower():
            continue
        theirs, ours, work = make()
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):
            for step, list_ in zip((theirs, ours), times, strict=True):
                start = time.perf_counter()
                step()
                list_.append(time.perf_counter() - start)
        torchs, mine = (statistics.median(v[1:]) for v in times)
        out[name] = {"torch_ms": 1e3 * torchs, "ours_ms": 1e3 * mine, "ratio": torchs / mine}
        if work is not None:
            out[name]["share_of_peak"] = work / mine / top["float64" if "float64" in name else "float32"]
        print(
            f"{name}: torch {1e3 * torchs:.1f} ms, ours {1e3 * mine:.1f} ms, {torchs / mine:.2f}×",
            file=sys.stderr,
            flush=True,
        )
    return out


def isas(repeats: int) -> str:
    """Our kernels of every instruction set, interleaved: milliseconds of a training step."""
    torch.set_num_threads(2)
    able = []
    for isa in ("avx512", "avx2", "baseline"):
        os.environ["UNVANISH_ISA"] = isa
        try:
            peak()
            able.append(isa)
        except ValueError:
            print(f"{isa}: does not run here", file=sys.stderr)
    lines = ["| row | " + " | ".join(f"{isa} ms" for isa in able) + " |", "|---" * (1 + len(able)) + "|"]
    for kind in SHAPES:
        step = train(kind, *COMMON)[1]
        times: dict[str, list[float]] = {isa: [] for isa in able}
        for _ in range(repeats + 1):
            for isa, list_ in times.items():
                os.environ["UNVANISH_ISA"] = isa
                start = time.perf_counter()
                step()
                list_.append(time.perf_counter() - start)
        found = [f"{1e3 * statistics.median(v[1:]):.1f}" for v in times.values()]
        lines.append(f"| train {kind} {','.join(map(str, COMMON))} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def step_memory(whose: str, kind: str, shape: tuple[int, int, int, int], every: int | None) -> dict[str, float]:
    """MB that training steps add to the process's peak of resident memory, and the seconds of one but the first."""
    torch.set_num_threads(2)
    T, B, n_in, H = shape
    layer = getattr(nn if whose == "torch" else uv.nn, kind)(n_in, H)
    if every is not None:
        layer.checkpoint_every = every
    x, error = torch.randn(T, B, n_in), torch.randn(T, B, H)
    layer(x[:8])[0].backward(error[:8])  # what torch imports in its first backward is no step's memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        layer(x)[0].backward(error)
        seconds.append(time.perf_counter() - start)
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"mb": added, "seconds": statistics.median(seconds[1:])}


def memory() -> str:
    """Each step in a process of its own."""

    def run(*request: Any) -> dict[str, float]:
        command = [sys.executable, __file__, "--one-step", json.dumps(request)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)

    lines = ["| training step | torch MB | ours MB |", "|---|---|---|"]
    for kind in SHAPES:
        theirs, ours = (run(whose, kind, COMMON, None)["mb"] for whose in ("torch", "ours"))
        lines.append(f"| {kind} {','.join(map(str, COMMON))} | {theirs:.0f} | {ours:.0f} |")
    shape = (100_000, 4, 64, 128)
    label = ",".join(map(str, shape))
    lines += ["", f"| {label} | plain MB | plain s | checkpoint_every={EVERY} MB | s |", "|---|---|---|---|---|"]
    for kind in SHAPES:
        both = [run("ours", kind, shape, every) for every in (None, EVERY)]
        lines.append(f"| {kind} | " + " | ".join(f"{v['mb']:.0f} | {v['seconds']:.2f}" for v in both) + " |")
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def table(default: dict[str, Any], keep: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| row | torch ms | ours ms | × default | × keep | share of peak |", "|---|---|---|---|---|---|"]
    for name, row in default.items():
        share = f"{100 * row['share_of_peak']:.0f} %" if "share_of_peak" in row else ""
        kept = f"{keep[name]['ratio']:.2f}" if name in keep else ""
        lines.append(
            f"| {name} | {row['torch_ms']:.1f} | {row['ours_ms']:.1f} | {row['ratio']:.2f} | {kept} | {share} |"
        )
    for kind in SHAPES:
        for phase in ("train", "infer"):
            shapes = [shape for shape in SHAPES[kind] if shape[1] > 1]
            names = [f"{phase} {kind} {','.join(map(str, shape))}" for shape in shapes]
            if all(name in default for name in names):
                means = [f"{mean([run[name]['ratio'] for name in names]):.2f}" for run in (default, keep)]
                lines.append(
                    f"| **{phase} {kind}, geometric mean over B > 1** | | | **{means[0]}** | **{means[1]}** | |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--isas", action="store_true", help="our instruction sets against each other")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--allocators", default="default,keep", help="default, keep, or both with a comma between")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one-step", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_step is not None:
        print(json.dumps(step_memory(*options.one_step)))
        return
    if options.isas or options.memory:
        print(isas(options.repeats) if options.isas else memory())
        return
    if options.inner:
        print(json.dumps(measure(options.rows, options.repeats)))
        return
    results = []
    for extra in ({"default": {}, "keep": KEEP}[name] for name in options.allocators.split(",")):
        command = [sys.executable, __file__, "--inner", "--rows", options.rows, "--repeats", str(options.repeats)]
        done = subprocess.run(command, env={**os.environ, **extra}, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout))
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{cpu}, 2 threads, {uv.engine.isa()}; {versions}; medians of {options.repeats}\n")
    print(table(results[0], results[-1]))


if __name__ == "__main__":
    main()
