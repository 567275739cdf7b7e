"""Pairing: whether a sample's target is compared with the answers that the sample's input moves."""

from typing import Any

import torch
from torch import Tensor

from unvanish.diagnosis.exact.targets import target_mismatch
from unvanish.diagnosis.exact.testbench import Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.structure import detached_copy, floating, mapped

MOST = 0.5
"""the share of the answers compared with a sample's target that the sample's own input has to move"""
SHARE = 2.0
"""how many times its equal share of the answers a target may be compared with; beyond, the loss compares all pairs"""


def compared_with_others(bench: Bench) -> list[Finding]:
    """{entries of f(X) that x_i moves} against {entries whose ∂E/∂f(X) y_i moves}, sample by sample.

    Answers and targets that are flattened in a different order agree in shape, and every loss accepts them.
    """
    subject, k = bench.subject, bench.count
    if k is None or k < 3 or subject.loss_function is None or not subject.has_target:
        return []
    base = bench.run()
    output = _output(bench)
    own = _gradients(bench, output, torch.arange(k))
    if own is None or any(a.shape != g.shape for a, g in zip(base, own, strict=False)):
        return []
    compared, answered, elsewhere, entries = 0, 0, 0, sum(a.numel() for a in base)
    for i in sorted({0, k // 2, k - 1}):
        moved = [torch.zeros_like(a, dtype=torch.bool) for a in base]
        asked = [torch.zeros_like(a, dtype=torch.bool) for a in base]
        # Several donors: two samples may share a step's id or target.
        for donor in {(i + 1) % k, (i + 2) % k}:
            index = torch.arange(k)
            index[i] = donor
            now = _gradients(bench, output, index)
            if now is None:
                return []
            for j, changed in enumerate(bench.run(bench.taken(index))):
                if changed.shape != base[j].shape:
                    return []
                moved[j] |= (changed - base[j]).abs() > bench.tolerance * base[j].abs().amax().clamp_min(1e-30)
                asked[j] |= _changed(own[j], now[j], max(bench.tolerance, 1e-6))
        asked, moved = (_with_classes(bench, masks) for masks in (asked, moved))
        number = sum(int(a.sum()) for a in asked)
        if number > SHARE * entries / k:
            return []
        if not number or not any(bool(m.any()) for m in moved):
            continue  # the same class by chance, or an input that is lost on its way
        compared += number
        elsewhere += sum(int((m & ~a).sum()) for a, m in zip(asked, moved, strict=True))
        answered += sum(int((a & m).sum()) for a, m in zip(asked, moved, strict=True))
    if compared == 0 or answered > MOST * compared or elsewhere < MOST * compared:
        return []
    if not _separable(bench, output, own) or target_mismatch(bench):
        return []  # contrastive losses compare samples with each other on purpose; a broadcast has its own name
    return [
        Finding(
            "samples_mixed", "error", "loss",
            "The answers for a sample are compared with the targets of other samples: their order differs.",
            f"The targets of single samples were exchanged, and the inputs: of {compared} values of the answers whose "
            f"gradient ∂E/∂answer the targets changed, the same samples' inputs move {answered}, and "
            f"{elsewhere} others.",
            "Bring answers and targets into the same order before they are flattened: y.transpose(0, 1), or "
            "batch_first=True, and then reshape(-1, classes).",
        )
    ]  # fmt: skip


def _with_classes(bench: Bench, masks: list[Tensor]) -> list[Tensor]:
    """All scores of a prediction where any one is marked: a class target changes the gradient of two of them."""
    per_sample = sum(g.numel() for g in bench.subject.goals) // (bench.subject.samples or 1)
    found = []
    for mask in masks:
        classes = mask.numel() // max(per_sample * (bench.count or 1), 1)
        axis = next((a for a in (-1, 1) if mask.dim() > 1 and classes > 1 and mask.shape[a] == classes), None)
        found.append(mask if axis is None else mask.any(axis, keepdim=True).expand_as(mask))
    return found


def _separable(bench: Bench, output: Any, own: list[Tensor]) -> bool:
    """Whether ∂E/∂f of the other entries stays the same, up to a common factor, when those of one sample change."""
    k = bench.count or 0
    index = torch.arange(k)
    index[0] = 1
    args, named = bench.taken(index)
    with torch.no_grad(), bench.subject.rng(0):
        changed = detached_copy(bench.model)(*args, **named)
    now = _gradients(bench, changed, torch.arange(k))
    if now is None:
        return False
    still = [a == b for a, b in zip(floating(output), floating(changed), strict=True)]
    tolerance = max(bench.tolerance, 1e-6)
    return not any(bool((_changed(a, b, tolerance) & s).any()) for a, b, s in zip(own, now, still, strict=True))


def _output(bench: Bench) -> Any:
    args, named = bench.given
    with torch.no_grad(), bench.subject.rng(0):
        return detached_copy(bench.model)(*args, **named)


def _gradients(bench: Bench, output: Any, index: Tensor) -> list[Tensor] | None:
    """∂E/∂f(X) with the targets of these samples; None where the loss takes no part of the batch."""
    subject = bench.subject
    assert subject.loss_function is not None
    leaves = mapped(output, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)
    try:
        with torch.enable_grad(), subject.rng(0):
            value = subject.loss_function(leaves, bench.cast(subject.rows(subject.target, index)))
            got = torch.autograd.grad(value, floating(leaves), allow_unused=True)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    return [torch.zeros_like(t) if g is None else g for t, g in zip(floating(leaves), got, strict=True)]


def _changed(was: Tensor, now: Tensor, tolerance: float) -> Tensor:
    """Entries that changed by more than the common factor that a loss normalised by its targets gives to all."""
    both = (was != 0) & (now != 0)
    factor = (now[both] / was[both]).median() if bool(both.any()) else torch.ones((), dtype=was.dtype)
    return (now - factor * was).abs() > tolerance * was.abs().amax().clamp_min(1e-30)
