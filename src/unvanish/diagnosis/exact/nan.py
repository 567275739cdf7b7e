"""NaN and infinity: in the batch, a parameter, the forward pass, or the backward pass; where each first appears."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from unvanish.diagnosis.exact.testbench import RECURRENT, Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.structure import floating
from unvanish.diagnosis.trace import ModuleCall
from unvanish.nn.modules import SequenceModule


def nan(bench: Bench) -> list[Finding]:
    """The first value that is not finite, in the order in which a training pass computes them."""
    subject = bench.subject
    for name, parameter in subject.model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return [_found(name, "A parameter contains NaN or infinity: an earlier update destroyed it.",
                           f"{_count(parameter)} of `{name}`.", "Start again from finite weights, with clipping or a "
                           "smaller learning rate.")]  # fmt: skip
    done = bench.training
    if done.loss is None:
        return []
    bad_loss = not bool(done.loss.isfinite())
    bad = [n for n, g in done.gradients.items() if g is not None and not bool(g.isfinite().all())]
    if not bad_loss and not bad:
        return []
    for what, items in (("input", subject.call), ("target", subject.goals)):
        for number, tensor in enumerate(floating(items)):
            if not bool(tensor.isfinite().all()):
                return [_found(f"{what} {number}", f"The {what} contains NaN or infinity.",
                               f"{_count(tensor)} of {what} tensor {number}.",
                               "Fill or leave out missing values before training.")]  # fmt: skip
    if bad_loss:
        return [_growing_states(bench) or _forward(bench)]
    return [_backward(bench, bad)]


GROWN = 1e6
"""a state that grows to this many times its size at the first step is the cause of the overflow"""


def _growing_states(bench: Bench) -> Finding | None:
    """A recurrent module whose states grow from step to step until a number, theirs or the loss's, is too large."""
    for path, (sizes, largest) in _sizes(bench).items():
        finite = [s for s in sizes if math.isfinite(s)]
        if len(finite) < 2 or not finite[-1] > GROWN * max(finite[0], 1.0):
            continue
        if len(finite) == len(sizes) and finite[-1] < math.sqrt(largest):
            continue  # squares of such states are finite, so it is not their size that spoils the loss
        rate = (finite[-1] / max(finite[0], 1e-30)) ** (1 / (len(finite) - 1))
        return Finding(
            "explodes", "error", path,
            f"The states of `{path or 'the model'}` grow from step to step until the numbers overflow.",
            f"The largest state is {finite[0]:.2g} at the first step and {finite[-1]:.2g} at step {len(finite)} of "
            f"{len(sizes)}: {rate:.3g}-fold with every step; the loss is not finite.",
            "Scale the recurrent matrices down to a spectral radius of at most 1, "
            "`uv.cures.spectral_radius_(layer, 1.0)`, or take a cell whose states are bounded; scale the input to "
            "about 1.",
        )  # fmt: skip
    return None


def _sizes(bench: Bench) -> dict[str, tuple[list[float], float]]:
    """Recurrent module → (largest |state| at each step, the largest number of their dtype)."""
    found: dict[str, tuple[list[float], float]] = {}
    for call in bench.training.trace.modules:
        if not call.outputs or not isinstance(call.module, RECURRENT):
            continue
        y = call.outputs[0].detach().abs()
        if isinstance(call.module, SequenceModule) and y.dim() == 3:
            y = y.movedim(1, 0) if call.module.batch_first else y
            found[call.path] = y.flatten(1).amax(1).tolist(), torch.finfo(y.dtype).max
        elif y.numel():
            found.setdefault(call.path, ([], torch.finfo(y.dtype).max))[0].append(float(y.max()))
    return found


def _forward(bench: Bench) -> Finding:
    assert bench.training.loss is not None
    for call in _inner_first(bench.training.trace.modules):
        if call.outputs and _spoilt(call.outputs) and not _spoilt(call.inputs):
            name = call.path or "the model's own forward"
            bad = next(t for t in call.outputs if t.is_floating_point() and not bool(t.isfinite().all()))
            return _found(call.path, f"`{name}` turns finite inputs into NaN or infinity.",
                          f"{_count(bad)} of its output; the loss is {float(bench.training.loss.detach())}.",
                          "Guard the operation there: a division, logarithm, root or exponential of what it is given, "
                          "or weights that are too large.")  # fmt: skip
    numbers = sum(a.numel() for a in bench.training.answers)
    return _found("loss", "The loss turns finite answers into NaN or infinity.",
                  f"All {numbers} numbers of the answers are finite; the loss is "
                  f"{float(bench.training.loss.detach())}.",
                  "Guard its logarithms, roots and divisions: add a small constant inside, or use the log-domain "
                  "function (log_softmax, binary_cross_entropy_with_logits).")  # fmt: skip


def _backward(bench: Bench, bad: list[str]) -> Finding:
    born, line = _anomaly(bench)
    inside = _born_in_loss(bench)
    where = "loss" if inside else _module_of(bench, bad)
    count = f"the loss is finite ({float(bench.training.loss.detach()):.4g}), but the gradients of {len(bad)} of " if (
        bench.training.loss is not None) else ""  # fmt: skip
    proof = f"In the backward pass {count}{len(bench.training.gradients)} parameters hold NaN or infinity"
    proof += f"; {born} gives the first NaN" if born else ""
    proof += f", at “{line}”." if line else "."
    what = "the loss" if inside else f"`{where}`" if where else "the model"
    root = "The slope of a root is infinite at 0: write sqrt(x + 1e-8), or take the root outside the mean. " if (
        "Sqrt" in born or "Pow" in born or "Norm" in born) else ""  # fmt: skip
    do = f"{root}Keep the operation away from the point where its slope is infinite: add the constant inside it."
    return _found(where, f"The backward pass through {what} makes NaN although the forward pass is finite.", proof, do)


def _anomaly(bench: Bench) -> tuple[str, str]:
    """(function whose backward made the first NaN, the user's line that called it)"""
    with warnings.catch_warnings(record=True) as heard, bench.subject.rng(0), torch.enable_grad():
        warnings.simplefilter("always")
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                bench.subject.loss(bench.subject.twin()).backward()
        except RuntimeError as error:
            text = str(error)
            name = text.split("'")[1] if "'" in text else ""
            return name, _line("\n".join(str(w.message) for w in heard))
    return "", ""


def _line(text: str) -> str:
    """The last source line of the forward traceback that is not torch's."""
    lines = text.splitlines()
    own = [
        lines[i + 1].strip()
        for i, line in enumerate(lines[:-1])
        if line.strip().startswith("File ") and "/torch/" not in line and "/unvanish/" not in line
    ]
    return own[-1] if own else ""


def _born_in_loss(bench: Bench) -> bool:
    done = bench.training
    if done.loss is None or not (answers := [a for a in done.answers if a.requires_grad]):
        return False
    got = torch.autograd.grad(done.loss, answers, retain_graph=True, allow_unused=True)
    return any(g is not None and not bool(g.isfinite().all()) for g in got)


def _module_of(bench: Bench, bad: list[str]) -> str:
    """The last module, in the order of the forward pass, whose output's gradient is finite and whose parameters' or
    inputs' are not; by name of a parameter if no module tells."""
    done = bench.training
    calls = [c for c in _inner_first(done.trace.modules) if c.path and any(t.requires_grad for t in c.outputs)]
    for call in reversed(calls):
        outputs = [t for t in call.outputs if t.requires_grad]
        inputs = [t for t in call.inputs if t.requires_grad]
        if not inputs or done.loss is None:
            continue
        got = torch.autograd.grad(done.loss, [*outputs, *inputs], retain_graph=True, allow_unused=True)
        after, before = got[: len(outputs)], got[len(outputs) :]
        if _clean(after) and not _clean(before):
            return call.path
    owners = {name.rpartition(".")[0] for name in bad}
    return owners.pop() if len(owners) == 1 else ""


def _clean(gradients: Any) -> bool:
    return all(g is None or bool(g.isfinite().all()) for g in gradients)


def _inner_first(calls: list[ModuleCall]) -> list[ModuleCall]:
    """Leaf modules in the order of their calls, then the others."""
    return sorted(calls, key=lambda c: len(list(c.module.children())) > 0)


def _spoilt(values: list[Tensor]) -> bool:
    return any(t.is_floating_point() and not bool(t.isfinite().all()) for t in values)


def _count(tensor: Tensor) -> str:
    return f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} values"


def _found(where: str, says: str, proof: str, do: str) -> Finding:
    return Finding("nan", "error", where, says, proof, do)
