"""Depth: a signal through a stack of layers, recurrent or not, and the gradient on its way down."""

import itertools
import math
from typing import Any

from unvanish.diagnosis.exact.testbench import RECURRENT, Bench
from unvanish.diagnosis.finding import Finding
from unvanish.nn.modules import SequenceModule

LOST = 1e-3
"""spread of the states over samples, in the last layer relative to the first, from which a stack has lost its input"""
FADING = 0.1
"""the same, from which it is worth a remark"""


def depth(bench: Bench) -> list[Finding]:
    """Spread of the states over samples from layer to layer, and the gradient on the way down."""
    recurrent = _recurrent_stack(bench)
    lost = any(f.severity == "error" for f in recurrent)
    return recurrent if lost else _any_stack(bench) or recurrent


def _recurrent_stack(bench: Bench) -> list[Finding]:
    spreads = _spreads(bench)
    if len(spreads) < 3:
        return []
    first, last = spreads[0][1], spreads[-1][1]
    if first <= 0 or last / first > FADING or last >= min(s for _, s in spreads) * 3:
        return []
    answers = _answer_spread(bench)
    if answers > 1e-2:
        return []
    weights = _down(bench)
    if last / first > LOST:
        return [_fading(spreads, weights)]
    listed = ", ".join(f"{s:.1g}" for _, s in spreads)
    return [
        Finding(
            "depth", "error", spreads[-1][0],
            f"The signal is lost in the depth: {len(spreads)} stacked layers shrink the differences "
            "between samples until all answers are the same.",
            f"Standard deviation of the final states over samples, layer by layer: {listed}; of the answers "
            f"{answers:.1g}.{weights}",
            "Use fewer layers (2 or 3), or add a skip connection or layer norm around each.",
        )
    ]  # fmt: skip


def _fading(spreads: list[tuple[str, float]], weights: str) -> Finding:
    """Not proved to be harmful: only training shows whether enough of the gradient remains."""
    listed = ", ".join(f"{s:.1g}" for _, s in spreads)
    return Finding(
        "depth", "note", spreads[-1][0],
        f"{len(spreads)} stacked layers shrink the differences between samples {spreads[0][1] / spreads[-1][1]:.0f}-"
        "fold, and the gradient on its way down; if the loss does not fall, start here.",
        f"Standard deviation of the final states over samples, layer by layer: {listed}.{weights}",
        "Use fewer layers (2 or 3), or add a skip connection or layer norm around each.",
    )  # fmt: skip


def _any_stack(bench: Bench) -> list[Finding]:
    """Layers of all kinds, where no single one removes most of the differences between samples."""
    chain = lost_by_degrees(bench)
    if chain is None:
        return []
    listed = ", ".join(f"{s:.1g}" for _, s in chain)
    return [
        Finding(
            "depth", "error", chain[-1][0],
            f"The signal is lost in the depth: {len(chain)} modules one after the other shrink the differences "
            "between samples until all answers are the same.",
            f"Standard deviation of their outputs over samples, in order: {listed}.",
            "Use fewer layers, or a skip connection or normalisation around each; relu and gelu shrink less than "
            "sigmoid and tanh.",
        )
    ]  # fmt: skip


GRADUAL = 0.4
"""the share of the fall, in orders of magnitude, that a single module may cause; beyond it, that module is at fault"""


def lost_by_degrees(bench: Bench) -> list[tuple[str, float]] | None:
    """(module, spread of its output over samples), from where it is largest to the end; None unless it falls gradually
    to less than `LOST` along them."""
    k = bench.count
    if k is None or k < 3:
        return None
    chain: dict[str, float] = {}
    for call in bench.evaluation().modules:
        if not call.outputs or next(call.module.children(), None) is not None:
            continue
        rows = bench.by_sample(call.outputs[0])
        if rows and rows[0].is_floating_point():
            chain.pop(call.path, None)
            chain[call.path] = float(rows[0].detach().double().std(0).mean())
    spreads = list(chain.items())
    top = max(range(len(spreads)), key=lambda i: spreads[i][1], default=0)
    spreads = spreads[top:]
    if len(spreads) < 6 or spreads[-1][1] <= 0 or spreads[-1][1] > LOST * spreads[0][1]:
        return None
    falls = [math.log(a / b) if b > 0 else math.inf for (_, a), (_, b) in itertools.pairwise(spreads)]
    return spreads if max(falls) < GRADUAL * math.log(spreads[0][1] / spreads[-1][1]) else None


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
