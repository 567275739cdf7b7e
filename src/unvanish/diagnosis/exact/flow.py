"""What gets through: the input to the answers, a signal through a stack of layers, a gradient to each parameter."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.diagnosis.exact.bench import RECURRENT, Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.structure import detached_copy
from unvanish.nn.modules import SequenceModule


def input_ignored(bench: Bench) -> list[Finding]:
    """All samples exchanged for others: some answer has to move, in eval mode or with batch statistics."""
    k = bench.count
    if k is None or k < 2:
        return []
    index = torch.roll(torch.arange(k), 1)
    other = bench.taken(index)
    apart = max(_apart(bench.run(), bench.run(other)), _apart(bench.run(train=True), bench.run(other, train=True)))
    if apart is None or apart < 0 or apart > 1e-9:
        return []
    return [
        Finding(
            "input_ignored", "error", "",
            "The answers do not depend on the input: they are the same for every sample.",
            f"Each of {k} samples was exchanged for another: the answers moved by {apart:.1g} of their size.",
            "Follow the input through forward: is it overwritten, multiplied by 0, or replaced by a constant?",
        )
    ]  # fmt: skip


def _apart(was: list[Tensor], now: list[Tensor]) -> float:
    found = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in zip(was, now, strict=False)
        if a.shape == b.shape and a.numel()
    ]
    return max(found, default=-1.0)


LOST = 1e-3
"""spread of the states over samples, in the last layer relative to the first, from which a stack has lost its input"""


def depth(bench: Bench) -> list[Finding]:
    """Spread of the states over samples from layer to layer, and the gradient on the way down."""
    spreads = _spreads(bench)
    if len(spreads) < 3:
        return []
    first, last = spreads[0][1], spreads[-1][1]
    if first <= 0 or last / first > LOST or last >= min(s for _, s in spreads) * 3:
        return []
    answers = _answer_spread(bench)
    if answers > 1e-2:
        return []
    weights = _down(bench)
    listed = ", ".join(f"{s:.1g}" for _, s in spreads)
    return [
        Finding(
            "depth", "error", spreads[-1][0],
            f"The input's trace is lost in the depth: {len(spreads)} stacked layers shrink the differences "
            "between samples until all answers are the same.",
            f"Standard deviation of the final states over samples, layer by layer: {listed}; of the answers "
            f"{answers:.1g}.{weights}",
            "Use fewer layers (2 or 3), or add a skip connection or layer norm around each.",
        )
    ]  # fmt: skip


def _spreads(bench: Bench) -> list[tuple[str, float]]:
    """(layer, standard deviation over samples of its state at its last step) from the first layer to the last."""
    found: list[tuple[str, float]] = []
    latest: dict[str, Any] = {}
    for call in bench.training.trace.modules:
        if isinstance(call.module, RECURRENT) and call.outputs:
            latest[call.path] = call
    for path, call in latest.items():
        if isinstance(call.module, SequenceModule):
            final = call.output[1]
            h = (final[0] if isinstance(final, tuple) else final).detach()
            if h.dim() != 3 or h.shape[1] < 3:
                return []
            ways = 2 if call.module.bidirectional else 1
            found += [
                (f"{path}.l{i // ways}".removeprefix("."), float(h[i : i + ways].double().std(1).mean()))
                for i in range(0, len(h), ways)
            ]
        else:
            h = call.outputs[0].detach()
            if h.dim() != 2 or len(h) < 3:
                return []
            found.append((path, float(h.double().std(0).mean())))
    return found


def _answer_spread(bench: Bench) -> float:
    """Mean standard deviation over samples; the largest of several outputs."""
    found = []
    for t in bench.training.answers:
        for rows in bench.by_sample(t.detach(), bench.subject.samples)[:1]:
            found.append(float(rows.double().std(0, correction=0).mean()))  # noqa: PERF401
    return max(found, default=0.0)


def _down(bench: Bench) -> str:
    """How the gradient of the weights shrinks, within one stacked module."""
    for path, module in bench.training.model.named_modules():
        if isinstance(module, SequenceModule) and module.num_layers > 1:
            norms = [
                bench.training.gradients.get(f"{path}.weight_ih_l{i}".removeprefix("."))
                for i in range(module.num_layers)
            ]
            sizes = [float(g.double().norm()) for g in norms if g is not None]
            if len(sizes) == module.num_layers:
                return f" Gradient of W_ih from the top layer down: {', '.join(f'{s:.1g}' for s in reversed(sizes))}."
    return ""


def parameters_unmoved(bench: Bench, optimizer: Any = None) -> list[Finding]:
    """Parameters that no gradient reaches, that are frozen, that no optimizer holds, or that the model does not own."""
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
    listed = ", ".join(f"`{n}`" for n in still[:4]) + (f" and {len(still) - 4} more" if len(still) > 4 else "")
    proof = f"∂E/∂w is absent or exactly 0 for {len(still)} of {len(gradients)} parameters: {listed}."
    if share == 1.0 or (used and share > 0.3):
        where = used[0] if used else ""
        return [
            Finding(
                "parameters_unmoved", "error", where,
                f"No gradient reaches {f'`{where}`' if where else 'any parameter'}, although the forward pass uses it.",
                proof, "Look for detach, .data, no_grad, argmax or rounding between it and the loss.",
            )
        ]  # fmt: skip
    unused = {n.rpartition(".")[0] for n in still}
    return [
        Finding(
            "parameters_unmoved", "note", sorted(unused)[0],
            "Some parameters have no part in this loss.", proof, "Nothing, if they are left over or trained elsewhere.",
        )
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
                "The optimizer does not hold all of the model's parameters: these stay as they were initialised.",
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
