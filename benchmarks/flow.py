"""What measuring the flow costs: ratios taken interleaved in one process, medians over rounds.

    python benchmarks/flow.py                # all
    python benchmarks/flow.py watch map      # some of: watch, map, memory, growth
    python benchmarks/flow.py watch --device cuda

watch   a training step (forward and backward) watched, against the same step unwatched: our layer, torch's layer, and
        the usual alternative, torch's cell in a loop with retain_grad on every state; on CUDA in float32, in TF32 and
        under bfloat16 autocast, with the peak of the device's memory
map     the full adjoint map, against one autograd pass per source through that loop: `grad` takes only what the map
        holds, ∂E_k/∂h_t (h or c) of every t ≤ k; `backward` is what a training script would call. Timed at sources
        spread evenly over the sequence, so that their mean is that of all, and multiplied by their number.
memory  peak resident memory of a watched step over an unwatched one, each in a process of its own
growth  resident memory of a watched loop after 100, 2,000 and 10,000 steps
"""

import argparse
import contextlib
import functools
import gc
import itertools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import unvanish as uv

SIZES = [(1000, 32, 64, 128), (200, 32, 64, 128), (500, 4, 64, 64), (100, 64, 128, 256)]
"""T, B, I, H"""

PRECISIONS = {"float32": False, "TF32": True, "bfloat16": False}
"""What torch rounds products to on CUDA: name → whether it may take TF32."""

CELLS = {"RNN": nn.RNNCell, "GRU": nn.GRUCell, "LSTM": nn.LSTMCell}

Step = Callable[[], object]


def interleaved(runs: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each, every round running all of them in turn."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            gc.collect()
            finish()
            start = time.perf_counter()
            run()
            finish()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def training_step(layer: nn.Module, x: Tensor, watched: bool) -> Step:
    def plain() -> None:
        layer.zero_grad()
        layer(x)[0].square().mean().backward()

    def step() -> None:
        with uv.watch(layer) as flow:
            plain()
        _ = flow.layers

    return step if watched else plain


def loop(kind: str, cell: nn.RNNCellBase, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(h_t of every step, the state that the flow is measured at: c_t or h_t)."""
    state, outputs, measured = None, [], []
    for x_t in x:
        state = cell(x_t, state)
        outputs.append(state[0] if kind == "LSTM" else state)
        measured.append(state[1] if kind == "LSTM" else state)
    return outputs, measured


def cell_loop_step(kind: str, cell: nn.RNNCellBase, x: Tensor) -> Step:
    def step() -> None:
        cell.zero_grad()
        outputs, measured = loop(kind, cell, x)
        for v in (*outputs, *measured):
            v.retain_grad()
        torch.stack(outputs).square().mean().backward()
        _ = [v.grad.norm(dim=-1) for v in (*outputs, *measured) if v.grad is not None]

    return step


@contextlib.contextmanager
def precision(name: str, device: str) -> Iterator[None]:
    """Products of the user's own pass at this precision."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = PRECISIONS[name]
    try:
        with torch.autocast(device, torch.bfloat16, enabled=name == "bfloat16"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def device_peak(run: Step) -> int:
    """Bytes of a CUDA device that a step needs above what is held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def watch(rounds: int, device: str = "cpu") -> None:
    print("watch: seconds of the unwatched step, and ratios to it")
    on_gpu = device.startswith("cuda")
    for name in PRECISIONS if on_gpu else ["float32"]:
        ratios = []
        with precision(name, "cuda" if on_gpu else device):
            for size, kind in itertools.product(SIZES, CELLS):
                ratios.append(_watch(kind, size, rounds, device, name))
        print(
            f"  torch watched, {name}: geometric mean {statistics.geometric_mean(ratios):.2f}×, most {max(ratios):.2f}×"
        )


def _watch(kind: str, size: tuple[int, int, int, int], rounds: int, device: str, name: str) -> float:
    """Prints a row; returns the ratio of torch's watched step to its plain one."""
    T, B, n_in, H = size
    x = torch.randn(T, B, n_in, device=device)
    torch.manual_seed(0)
    families = (getattr(nn, kind), getattr(uv.nn, kind), CELLS[kind])
    stock, ours, cell = (family(n_in, H).to(device) for family in families)
    steps = {
        "stock": training_step(stock, x, False),
        "stock watched": training_step(stock, x, True),
        "ours": training_step(ours, x, False),
        "ours watched": training_step(ours, x, True),
        "cell loop": cell_loop_step(kind, cell, x),
    }
    s = interleaved(steps, rounds)
    memory = ""
    if device.startswith("cuda"):
        plain, watched = (device_peak(steps[step]) for step in ("stock", "stock watched"))
        memory = f"   peak {plain / 2**20:.0f} MiB, watched {watched / plain:.2f}×"
    print(
        f"  {name:8} {kind:4} T={T:<4} B={B:<2} I={n_in:<3} H={H:<3}  "
        f"ours {s['ours']:.4f} s, watched {s['ours watched'] / s['ours']:5.2f}×   "
        f"torch {s['stock']:.4f} s, watched {s['stock watched'] / s['stock']:5.2f}×   "
        f"cell loop with retain_grad against ours watched {s['cell loop'] / s['ours watched']:5.1f}×, "
        f"torch watched {s['cell loop'] / s['stock watched']:5.1f}×{memory}",
        flush=True,
    )
    return s["stock watched"] / s["stock"]


def adjoint_map(rounds: int, T: int = 500, B: int = 4, H: int = 64, sampled: int = 20) -> None:
    print(f"map: all {T} sources at B={B}, H={H}, against {T} autograd passes ({sampled} timed, evenly spread)")
    x = torch.randn(T, B, H)
    sources = [round((i + 0.5) * T / sampled) for i in range(sampled)]
    for kind, family in CELLS.items():
        torch.manual_seed(0)
        layer, cell = getattr(nn, kind)(H, H), family(H, H)
        outputs, measured = loop(kind, cell, x)
        for v in measured:
            v.retain_grad()
        cotangent = torch.randn(B, H)

        def grad(outputs: list[Tensor] = outputs, measured: list[Tensor] = measured, v: Tensor = cotangent) -> None:
            for k in sources:
                torch.autograd.grad((outputs[k] * v).sum(), measured[: k + 1], retain_graph=True)

        def backward(outputs: list[Tensor] = outputs, measured: list[Tensor] = measured, v: Tensor = cotangent) -> None:
            for k in sources:
                (outputs[k] * v).sum().backward(retain_graph=True)
                for state in measured:
                    state.grad = None

        def ours(layer: nn.RNNBase = layer) -> None:
            uv.flow.adjoint_map(layer, x)

        s = interleaved({"map": ours, "grad": grad, "backward": backward}, rounds)
        many = T / sampled
        print(
            f"  {kind:4} map {s['map']:.3f} s   autograd.grad {many * s['grad']:.2f} s, "
            f"{many * s['grad'] / s['map']:.0f}×   backward() {many * s['backward']:.2f} s, "
            f"{many * s['backward'] / s['map']:.0f}×",
            flush=True,
        )


def _peak(ours: bool, kind: str, watched: bool, size: tuple[int, int, int, int], result: Any) -> None:
    T, B, n_in, H = size
    torch.manual_seed(0)
    layer = getattr(uv.nn if ours else nn, kind)(n_in, H)
    training_step(layer, torch.randn(2, B, n_in), watched)()
    x = torch.randn(T, B, n_in)
    # The high-water mark from here on; that of getrusage is inherited from the parent.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _high_water()
    training_step(layer, x, watched)()
    result.put(_high_water() - before)


def _high_water() -> float:
    """MiB"""
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) / 1024 for row in file if row.startswith("VmHWM"))


def memory(rounds: int) -> None:
    del rounds
    print("memory: peak of one step, MiB above what the process held before it")
    context = multiprocessing.get_context("spawn")
    for kind in CELLS:
        for ours in (True, False):
            peaks = []
            for watched in (False, True):
                result = context.Queue()
                child = context.Process(target=_peak, args=(ours, kind, watched, SIZES[0], result))
                child.start()
                peaks.append(result.get())
                child.join()
            name = "ours " if ours else "torch"
            print(f"  {kind:4} {name} {peaks[0]:6.0f} MiB, watched {peaks[1] / peaks[0]:5.2f}×", flush=True)


def growth(rounds: int) -> None:
    del rounds
    print("growth: resident MiB of a watched loop")
    page = resource.getpagesize()
    layer, x = uv.nn.LSTM(8, 16), torch.randn(20, 4, 8)
    held = []
    with uv.watch(layer) as flow:
        for step in range(1, 10001):
            layer.zero_grad()
            layer(x)[0].square().mean().backward()
            if step in (100, 2000, 10000):
                with open("/proc/self/statm") as file:
                    held.append(int(file.read().split()[1]) * page / 2**20)
    del flow
    print(f"  {held[0]:.1f} after 100 steps, {held[1]:.1f} after 2,000, {held[2]:.1f} after 10,000")


def main() -> None:
    parts = {"watch": watch, "map": adjoint_map, "memory": memory, "growth": growth}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)}; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="for watch; the others are about the CPU")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"parts: expected some of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    if arguments.device != "cpu":
        if arguments.parts != ["watch"]:
            parser.error(f"--device: expected the part watch alone with {arguments.device}")
        parts["watch"] = functools.partial(watch, device=arguments.device)
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads, {arguments.rounds} rounds")
    for name in arguments.parts or parts:
        parts[name](arguments.rounds)


if __name__ == "__main__":
    main()
