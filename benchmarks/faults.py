"""What is left after a process is killed, interrupted, or out of room: figures for docs/faults.md.

python benchmarks/faults.py [killed_records|killed_compare|killed_training|interrupted|terminated|full] [repeats]

`full` mounts small file systems and needs root. benchmarks/fuzz.py looks for malformed input.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import unvanish as uv

COMPARE = [
    "compare",
    "--task",
    "adding",
    "--length",
    "20",
    "--cells",
    "rnn",
    "--steps",
    "40",
    "--hidden",
    "8",
    "--batch",
    "8",
]
TRAIN = [
    "train",
    "--task",
    "adding",
    "--length",
    "10",
    "--hidden",
    "4",
    "--steps",
    "200",
    "--every",
    "5",
    "--flow-every",
    "0",
]
WRITE = """
import itertools, sys, torch, unvanish as uv
gates = uv.flow.gate_statistics(torch.nn.LSTM(64, 256), torch.randn(3, 2, 64))
print("ready", flush=True)
for _ in itertools.count():
    gates.save(sys.argv[1])
"""


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`unvanish ARGUMENTS`."""
    command = [sys.executable, "-c", "from unvanish.cli import main; main()", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def how_long(folder: Path, *arguments: str) -> float:
    start = time.perf_counter()
    assert started(folder, *arguments, "--out", "first").wait() == 0
    return time.perf_counter() - start


def state_of(out: Path) -> str:
    """ "none" or "whole"; anything else is a fault."""
    if not out.exists():
        return "none"
    uv.train.Comparison.from_json(json.loads((out / "results.json").read_text(encoding="utf-8")))
    assert (out / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    return "whole"


def killed_records(folder: Path, repeats: int) -> Counter[str]:
    """SIGKILL while a record is written over and over."""
    seen: Counter[str] = Counter()
    for _ in range(repeats):
        path = folder / "gates.flow"
        child = subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        child.stdout.readline()
        for _ in range(200):
            time.sleep(random.uniform(0, 0.02))
            if path.exists():
                uv.flow.load(path)
                seen["read while it was written: whole"] += 1
        child.kill()
        child.wait()
        uv.flow.load(path)
        seen["read after the kill: whole"] += 1
        seen["temporary files left"] += sum(1 for _ in folder.glob(".gates.flow.*"))
        for left in folder.glob(".gates.flow.*"):
            left.unlink()
    return seen


def killed_compare(folder: Path, repeats: int) -> Counter[str]:
    """SIGKILL at a random moment of `unvanish compare`, the second half over an earlier run."""
    seconds, seen = how_long(folder, *COMPARE), Counter[str]()
    for number in range(repeats):
        out = folder / ("first" if number % 2 else f"new{number}")
        child = started(folder, *COMPARE, "--out", str(out))
        time.sleep(random.uniform(0.3, 1.05) * seconds)
        child.kill()
        child.communicate()
        seen[("over an earlier run: " if number % 2 else "new: ") + state_of(out)] += 1
    return seen


def killed_training(folder: Path, repeats: int) -> Counter[str]:
    """`unvanish train`, ended again and again at random moments by SIGKILL, Ctrl-C or SIGTERM, gone on with by
    --resume until it ends well, against the weights of one that nothing happened to."""
    seconds, seen = how_long(folder, *TRAIN), Counter[str]()
    whole = (folder / "first" / "model.safetensors").read_bytes()
    stops, number = 0, 0
    while stops < repeats:
        number, before = number + 1, stops
        out = folder / f"run{number}"
        while True:
            child = started(folder, *TRAIN, "--out", str(out), "--resume")
            try:
                _, said = child.communicate(timeout=random.uniform(0.3, 1.3 + (stops - before) / 5) * seconds)
                break
            except subprocess.TimeoutExpired:
                ends = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[stops % 3]
                stops += 1
                child.send_signal(ends)
                _, said = child.communicate()
                trace = ", traceback" if "Traceback" in said else ""
                seen[f"{ends.name}: code {child.returncode}{trace}"] += 1
                if trace:
                    print(said[-1500:], file=sys.stderr)
        if child.returncode:
            print(said[-1500:], file=sys.stderr)
        same = (out / "model.safetensors").exists() and (out / "model.safetensors").read_bytes() == whole
        left = [str(p) for p in out.rglob(".*")]
        weights = "the same" if same else "OTHER"
        seen[f"resumed to the end: code {child.returncode}, {weights} weights, left {left}"] += 1
    return seen


def terminated(folder: Path, repeats: int) -> Counter[str]:
    """SIGTERM at a random moment of `unvanish compare`."""
    return interrupted(folder, repeats, signal.SIGTERM)


def interrupted(folder: Path, repeats: int, ends: signal.Signals = signal.SIGINT) -> Counter[str]:
    """Ctrl-C at a random moment of `unvanish compare`."""
    seconds, seen = how_long(folder, *COMPARE), Counter[str]()
    for number in range(repeats):
        out = folder / f"new{number}"
        child = started(folder, *COMPARE, "--out", str(out))
        after = random.uniform(0.02, 1.0) * seconds
        time.sleep(after)
        child.send_signal(ends)
        _, said = child.communicate()
        last = said.strip().splitlines()[-1] if said.strip() else ""
        trace = ", traceback" if "Traceback" in said else ""
        left = sorted(p.name for p in folder.iterdir() if p.name.startswith(".new"))
        seen[f"code {child.returncode}, {state_of(out)}, {last[:60]!r}{trace}{', left ' if left else ''}"] += 1
        if trace:
            print(f"after {after:.2f} of {seconds:.2f} s:\n{said[-1500:]}", file=sys.stderr)
    return seen


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def full(folder: Path, repeats: int) -> Counter[str]:
    """A file system with room for little, and one that is read-only."""
    seen: Counter[str] = Counter()
    gates = uv.flow.gate_statistics(torch.nn.LSTM(64, 256), torch.randn(3, 2, 64))
    for size in ("16k", "1m", "4m"):
        with mounted(folder, f"size={size}"):
            child = started(folder, *COMPARE, "--out", "out")
            _, said = child.communicate()
            left = sorted(os.listdir(folder))
            seen[f"compare, {size}: code {child.returncode}, left {left}, {said.strip().splitlines()[-1:]}"] += 1
            child = started(folder, *TRAIN, "--out", "trained")
            _, said = child.communicate()
            seen[f"train, {size}: code {child.returncode}, {said.strip().splitlines()[-1:]}"] += 1
            if size == "16k":
                for _ in range(repeats):
                    with contextlib.suppress(OSError):
                        gates.save(folder / "gates.flow")
                        seen["record written"] += 1
                seen[f"records, 16k: left {sorted(os.listdir(folder))}"] += 1
    with mounted(folder, "size=9m,ro"):
        for command in (COMPARE, TRAIN):
            child = started(Path("/"), *command, "--out", str(folder / "out"))
            _, said = child.communicate()
            seen[f"read-only: code {child.returncode}, {said.strip()}"] += 1
    return seen


MEASURED: dict[str, Callable[[Path, int], Counter[str]]] = {
    "killed_records": killed_records, "killed_compare": killed_compare, "killed_training": killed_training,
    "interrupted": interrupted, "terminated": terminated, "full": full,
}  # fmt: skip

if __name__ == "__main__":
    name, repeats = (*sys.argv[1:], "10")[:2]
    random.seed(0)
    with tempfile.TemporaryDirectory() as place:
        for what, count in sorted(MEASURED[name](Path(place), int(repeats)).items()):
            print(f"{name}: {what}: {count}")
