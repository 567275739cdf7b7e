"""Connections: whether the input reaches the answers, and a gradient each parameter."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.diagnosis.exact.depth import lost_by_degrees
from unvanish.diagnosis.exact.testbench import RECURRENT, Arguments, Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.structure import detached_copy, mapped, tensors
from unvanish.diagnosis.trace import THRESHOLDS


def input_ignored(bench: Bench) -> list[Finding]:
    """All samples exchanged for others: some answer has to move, in eval mode or with batch statistics."""
    k = bench.count
    if k is None or k < 2:
        return []
    index = torch.roll(torch.arange(k), 1)
    other = bench.taken(index)
    apart = _apart(bench.run(), bench.run(other))
    if apart <= ROUNDING:
        apart = max(apart, _apart(bench.run(train=True), bench.run(other, train=True)))
    if apart < 0:
        return []
    if apart > ROUNDING:
        return _part_ignored(bench, other)
    if lost_by_degrees(bench) is not None:
        return []  # lost on its way, which `depth` says
    if _moves_after_an_update(bench, other):
        return []  # as with a last layer that starts at zero
    where, lost = _lost_at(bench, other)
    return [
        Finding(
            "input_ignored", "error", where,
            "The answers do not depend on the input: they are the same for every sample.",
            f"Each of {k} samples was exchanged for another: the answers moved by {apart:.1g} of their size, before "
            f"and after an update along the gradient.{lost}",
            "Follow the input through forward: is it overwritten, multiplied by 0, replaced by a constant, or so large "
            "that an activation is saturated?",
        )
    ]  # fmt: skip


UPDATE = 0.01
"""largest change of a weight in a trial update"""
ROUNDING = 1e-9
"""the largest relative change of an answer that is not counted as one"""


def _moves_after_an_update(bench: Bench, other: Arguments) -> bool:
    """Whether one step of gradient descent makes the answers depend on the input."""
    gradients = {n: g for n, g in bench.training.gradients.items() if g is not None}
    most = max((float(g.abs().max()) for g in gradients.values()), default=0.0)
    if most == 0 or not math.isfinite(most):
        return False
    twin = detached_copy(bench.model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name in gradients:
                p.sub_(gradients[name] * (UPDATE / most))
    with torch.no_grad(), bench.subject.rng(0):
        was, now = (bench.subject.answers(twin, given[0], **given[1]) for given in (bench.given, other))
    return _apart(was, now) > ROUNDING


def _lost_at(bench: Bench, other: Arguments) -> tuple[str, str]:
    """(module that is the last to return something else for other samples, sentence about it)"""
    calls = [
        [c for c in trace.modules if c.path and next(c.module.children(), None) is None]
        for trace in (bench.evaluation(), bench.evaluation(other))
    ]
    pairs = list(zip(*calls, strict=False))
    moved = [i for i, (a, b) in enumerate(pairs) if _apart(a.outputs, b.outputs) > 0]
    if not moved or moved[-1] + 1 == len(pairs):
        return "", ""
    last, after = pairs[moved[-1]][0].path, pairs[moved[-1] + 1]
    verb = "is given" if _apart(after[0].inputs, after[1].inputs) <= 0 else "returns"
    return last, f" What `{last}` returns still differs from sample to sample, what `{after[0].path}` {verb} does not."


DROPPED = 0.1
"""share of the steps, at the end, that a recurrent module reads and no answer moves with, from which it is a fault"""


def steps_dropped(bench: Bench) -> list[Finding]:
    """A recurrent module runs over all steps, but the answers move only with the first ones."""
    if bench.reach is None or bench.steps < 3:
        return []
    moves = [t for t in bench.probed if float(bench.reach[1][:, t].max()) > 0]
    later = [t for t in bench.probed if moves and t > moves[-1] and bench.differs_at(t)]
    if not later or later[-1] < bench.steps - 1 or len(later) < 2 or bench.steps - later[0] < DROPPED * bench.steps:
        return []
    # Samples that each stop counting at a step of their own are read at their own ends.
    ends = {int(row.nonzero().max()) for row in bench.reach[1] if bool(row.any())}
    if len(ends) > 1:
        return []
    lengths: dict[str, int] = {}
    for call in bench.training.trace.modules:
        if isinstance(call.module, RECURRENT) and call.inputs:
            x, stepped = call.inputs[0], isinstance(call.module, nn.RNNCellBase)
            steps = 1 if stepped or x.dim() < 3 else x.shape[1 if call.module.batch_first else 0]
            lengths[call.path] = lengths.get(call.path, 0) + steps
    where = next((path for path, steps in lengths.items() if steps >= bench.steps), None)
    if where is None:
        return []
    first = moves[-1] == 0
    used = "the first step" if first else f"the first {later[0]} of {bench.steps} steps"
    return [
        Finding(
            "readout", "error" if first else "warning", where,
            f"The answers use {used} of `{where}` alone: the other steps are computed and dropped.",
            f"Each of {len(later)} later steps was exchanged for other samples': no answer moved; with step "
            f"{moves[-1]} they move.",
            "Read the last step: y[:, -1] with batch_first=True, y[-1] without, h_n[-1] of the final state; or pool "
            "over the steps.",
        )
    ]  # fmt: skip


def _part_ignored(bench: Bench, other: Arguments) -> list[Finding]:
    """One of several input tensors, which a module without any gradient reads, moves no answer."""
    given = tensors(bench.given)
    unmoved = _unmoved_modules(bench)
    if len(given) < 2 or not unmoved:
        return []
    read = {x.untyped_storage().data_ptr() for c in bench.evaluation().modules if c.path for x in c.inputs}
    exchanged = tensors(other)
    for number, tensor in enumerate(given):
        if tensor.untyped_storage().data_ptr() not in read or torch.equal(tensor, exchanged[number]):
            continue
        count = itertools.count()
        alone = mapped(bench.given, lambda t, n=number, c=count: exchanged[n] if next(c) == n else t)
        if any(_apart(bench.run(train=t), bench.run(alone, train=t)) != 0 for t in (False, True)):
            continue
        return [
            Finding(
                "input_ignored", "error", unmoved[0],
                f"One of the inputs is not used in the answers: what `{unmoved[0]}` makes of the batch is dropped.",
                f"Input tensor {number}, of shape {tuple(tensor.shape)}, was exchanged for other samples': no answer "
                f"moved, and no gradient reaches `{unmoved[0]}`.",
                f"Hand on what `{unmoved[0]}` returns: an encoder's final state starts the decoder, for instance.",
            )
        ]  # fmt: skip
    return []


def _unmoved_modules(bench: Bench) -> list[str]:
    """Recurrent modules that ran and that no gradient reaches."""
    gradients = bench.training.gradients
    called = {c.path: c.module for c in bench.training.trace.modules if c.outputs and isinstance(c.module, RECURRENT)}
    own = {path: [f"{path}.{n}".removeprefix(".") for n, _ in m.named_parameters()] for path, m in called.items()}
    return [
        path for path, names in own.items()
        if names and all((g := gradients.get(n)) is None or not bool((g != 0).any()) for n in names)
    ]  # fmt: skip


def _apart(was: list[Tensor], now: list[Tensor]) -> float:
    found = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in zip(was, now, strict=False)
        if a.shape == b.shape and a.numel()
    ]
    return max(found, default=-1.0)


def parameters_unmoved(bench: Bench, optimizer: Any = None) -> list[Finding]:
    """Parameters that no gradient reaches, are frozen, missing in the optimizer, or not registered in the model."""
    done = bench.training
    found: list[Finding] = []
    if done.loss is not None and done.error is None:
        if not done.loss.requires_grad:
            found.append(_nothing_trains(bench))
        elif done.gradients:
            found += _unreached(bench)
        found += _unregistered(bench)
    return found + _not_optimized(bench, optimizer)


def _nothing_trains(bench: Bench) -> Finding:
    frozen = [n for n, p in bench.subject.model.named_parameters() if not p.requires_grad]
    why = (
        f"{len(frozen)} of {len(list(bench.subject.model.parameters()))} parameters have requires_grad False."
        if frozen
        else f"None of {len(list(bench.subject.model.parameters()))} parameters is frozen: the graph is cut before "
        "the loss."
    )
    return Finding(
        "parameters_unmoved", "error", "loss", "The loss has no gradient: nothing can train.",
        f"loss.requires_grad is False. {why}",
        "Let the parameters require a gradient, and compute the loss without detach, .data, .item, numpy, argmax or "
        "no_grad on the way.",
    )  # fmt: skip


def _unreached(bench: Bench) -> list[Finding]:
    gradients = bench.training.gradients
    still = [n for n, g in gradients.items() if g is None or not bool((g != 0).any())]
    if not still:
        return []
    share = len(still) / len(gradients)
    recurrent = [
        path for path, m in bench.training.model.named_modules()
        if isinstance(m, RECURRENT) and (own := [f"{path}.{n}".removeprefix(".") for n, _ in m.named_parameters()])
        and all(n in still for n in own)
    ]  # fmt: skip
    called = {c.path for c in bench.training.trace.modules if c.outputs}
    used = [path for path in recurrent if path in called and _matters(bench, path)]
    used = used or _behind_threshold(bench, still)
    listed = ", ".join(f"`{n}`" for n in still[:4]) + (f" and {len(still) - 4} more" if len(still) > 4 else "")
    proof = f"∂E/∂w is absent or exactly 0 for {len(still)} of {len(gradients)} parameters: {listed}."
    if share == 1.0 or (used and share > 0.3):
        where = used[0] if used else ""
        return [
            Finding(
                "parameters_unmoved", "error", where,
                f"No gradient reaches {f'`{where}`' if where else 'any parameter'}, although the forward pass uses it.",
                proof,
                "Look for detach, .data, no_grad, argmax, rounding or a comparison such as (v > 1).float() between it "
                "and the loss; a threshold needs a surrogate gradient.",
            )
        ]  # fmt: skip
    unused = {n.rpartition(".")[0] for n in still}
    return [
        Finding(
            "parameters_unmoved", "note", sorted(unused)[0],
            "Some parameters are not used in this loss.", proof, "Nothing, if they are unused or trained elsewhere.",
        )
    ]  # fmt: skip


def _behind_threshold(bench: Bench, still: list[str]) -> list[str]:
    """Modules that no gradient reaches and that move the answers, where the model compares numbers that have a graph:
    a comparison has no derivative. A detach alone may be meant."""
    trace = bench.training.trace
    compared = any(
        c.inside and c.name in THRESHOLDS and isinstance(c.args[0], Tensor) and c.args[0].requires_grad
        for c in trace.functions if c.args
    )  # fmt: skip
    if not compared:
        return []
    called = {
        c.path: c.module for c in trace.modules
        if c.path and c.outputs and c.outputs[0].requires_grad and next(c.module.children(), None) is None
    }  # fmt: skip
    return [
        path for path, m in called.items()
        if (own := [f"{path}.{n}" for n, p in m.named_parameters() if p.requires_grad])
        and all(n in still for n in own) and _matters(bench, path)
    ]  # fmt: skip


def _matters(bench: Bench, path: str) -> bool:
    """Whether answers that the loss uses change with this module's weights; those of a target network do not."""
    twin = detached_copy(bench.model)
    with torch.no_grad():
        for p in twin.get_submodule(path).parameters():
            p.mul_(0.5).add_(0.1)
    args, named = bench.given
    with torch.no_grad(), bench.subject.rng(0):
        changed = bench.subject.answers(twin, args, **named)
    return any(
        asked is not None and bool((asked != 0).any()) and not torch.equal(was, now)
        for was, now, asked in zip(bench.run(), changed, bench.asked, strict=False)
    )


def _unregistered(bench: Bench) -> list[Finding]:
    """Modules in plain lists or dicts, which model.parameters() does not know."""
    model = bench.training.model
    own = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    hidden: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") or not isinstance(value, list | tuple | dict):
                continue
            inside = value.values() if isinstance(value, dict) else value
            for item in inside:
                if isinstance(item, nn.Module) and _used(bench, item):
                    lost = [p for p in item.parameters() if id(p) not in own and p.requires_grad]
                    if lost:
                        place = f"{path}.{name}".removeprefix(".")
                        hidden[place] = hidden.get(place, 0) + sum(p.numel() for p in lost)
    return [
        Finding(
            "parameters_unmoved", "error", place,
            f"Modules in the plain container `{place}` are not part of the model: no optimizer over "
            "model.parameters() trains them.",
            f"{number} weights in `{place}` are missing from model.parameters().",
            "Use nn.ModuleList or nn.ModuleDict instead of a list or dict.",
        )
        for place, number in hidden.items()
    ]  # fmt: skip


def _used(bench: Bench, module: nn.Module) -> bool:
    return any(p.grad is not None for p in module.parameters()) or bench.training.error is not None


def _not_optimized(bench: Bench, optimizer: Any) -> list[Finding]:
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        return []
    model = bench.subject.model
    held = {id(p): group["lr"] for group in groups for p in group["params"]}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    missing = [n for n, p in named if id(p) not in held]
    stale = len(set(held) - {id(p) for p in model.parameters()})
    still = [n for n, p in named if held.get(id(p), 1.0) == 0]
    if missing:
        also = f", but {stale} that the model does not have (any more)" if stale else ""
        return [
            Finding(
                "parameters_unmoved", "error", missing[0].rpartition(".")[0],
                "Some of the model's parameters are missing from the optimizer: they stay as they were initialised.",
                f"The optimizer lacks {len(missing)} of {len(named)} parameters that require a gradient "
                f"({_listed(missing)}){also}.",
                "Build the optimizer after the model is complete and on its device: torch.optim.Adam("
                "model.parameters()).",
            )
        ]  # fmt: skip
    if still:
        return [
            Finding(
                "parameters_unmoved", "error", still[0].rpartition(".")[0],
                "The learning rate of some parameters is 0: they stay as they were initialised.",
                f"lr is 0 for {len(still)} of {len(named)} parameters ({_listed(still)}).",
                "Give their group a learning rate, or step the scheduler differently.",
            )
        ]  # fmt: skip
    return []


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f"`{n}`" for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
