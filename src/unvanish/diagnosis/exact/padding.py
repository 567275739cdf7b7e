"""Read-outs on padded steps, sample by sample."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish.diagnosis.exact.testbench import Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.structure import tensors

SHARE = 0.15
"""the share of samples that have to end in the same value for it to count as padding"""

FADED, DEAD = 0.2, 0.02
"""fractions of the gradient on padded steps that still arrive at real ones: worth a remark, and a fault. Any network
bridges short padding and the dark rows at the edge of an image."""


def tails(sequence: Tensor) -> Tensor | None:
    """Steps of padding at the end of each sample of `[samples, steps, …]`; None if nothing there looks like padding.

    Padding is a value that ends many samples, in runs of different lengths, and is rare before them.
    """
    n, T = sequence.shape[:2]
    flat = sequence.reshape(n, T, -1)
    if n < 3 or T < 3:
        return None
    constant = (flat == flat[:, -1:]).all(-1)
    runs = constant.flip(1).long().cumprod(1).sum(1)
    ends, inverse, counts = flat[:, -1].unique(dim=0, return_inverse=True, return_counts=True)
    common = int(counts.argmax())
    same = inverse == common
    if float(same.double().mean()) < SHARE or int(runs[same].max()) < 2:
        return None
    lengths = torch.where(same, runs, 0)
    if int(lengths.max()) == int(lengths.min()):
        return None
    pad = (flat == ends[common]).all(-1)
    real = torch.arange(T)[None, :] < (T - lengths)[:, None].cpu()
    inside = pad.cpu()[real]
    return lengths if len(inside) and float(inside.double().mean()) < 0.2 else None


def padding_read(bench: Bench) -> list[Finding]:
    """Where the answers' gradient arrives: on each sample's own last step, or on the padding after it."""
    if bench.sequence is None or bench.count is None or any(isinstance(a, PackedSequence) for a in bench.given[0]):
        return []
    for front in (False, True):
        found = _read(bench, front)
        if found:
            return found
    return []


def _read(bench: Bench, front: bool) -> list[Finding]:
    assert bench.sequence is not None
    which, samples, steps = bench.sequence

    def ordered(value: object) -> Tensor:
        main = tensors(value)[which].movedim((samples, steps), (0, 1))
        return main.flip(1) if front else main

    found = tails(ordered(bench.subject.call[0]))
    if found is None:
        return []
    T = bench.steps
    long = (found >= 2) & (found < T)
    if int(long.sum()) < 2:
        return []
    # Samples with the usual amount of padding, and the longest one, which keeps the length of the batch.
    longest = found.argmin()[None]
    pick = ((found - found[long].median()).abs() + T * ~long).argsort(stable=True)
    pick = torch.cat([pick[(found[pick] < T) & (pick != longest)][: (bench.count or 1) - 1], longest])
    if len(pick) < (bench.count or 0):
        return []
    given = bench.taken(pick)
    # The loss's own gradient decides: answers on padded steps that the loss leaves out do no harm.
    asked = [None if g is None else bench.subject.rows(g, pick).abs() for g in bench.asked]

    def used(answers: list[Tensor]) -> Tensor:
        parts = [
            (answer * weight.to(answer)).sum()
            for answer, weight in zip(answers, asked, strict=False)
            if weight is not None and weight.shape == answer.shape
        ]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    entries, got = bench.gradients_at(given, used)
    k = len(pick)
    norms = None
    for entry, gradient in zip(entries, got, strict=True):
        if entry.dim() >= 2 and entry.shape[samples] == k and entry.shape[steps] == T:
            by_step = gradient.movedim((samples, steps), (0, 1)).reshape(k, T, -1).double().norm(dim=-1).cpu()
            norms = by_step if norms is None else norms + by_step
    if norms is None or not bool((norms > 0).any()):
        return []
    if front:
        norms = norms.flip(1)
    lengths = found[pick].cpu()
    if not front and (fault := _zeros_read(bench, norms, asked, lengths - lengths.min(), lengths)) is not None:
        return [fault]
    real = torch.arange(T)[None, :] < (T - lengths)[:, None]
    on_real = norms.where(real, 0.0).amax(1)
    on_padding = norms.where(~real, 0.0).amax(1)
    use = (lengths >= 2) & (on_padding > 0)
    if float(use.double().mean()) < 0.5:
        return []
    ratio = float((on_real / on_padding)[use].median())
    if ratio > FADED:
        return []
    side = "before" if front else "after"
    typical = int(lengths[use].median())
    return [
        Finding(
            "padding_read", "error" if ratio < DEAD else "note", "",
            f"The answer is read on padded steps: the gradient has to cross the padding {side} each sequence and "
            f"{'dies there' if ratio < DEAD else 'fades there'}.",
            f"{float((found > 0).double().mean()):.0%} of the samples are padded ({typical} of {T} steps in the median "
            f"of those looked at); the gradient on real steps is at most {ratio:.2g} times that on padded ones.",
            "Pack the sequences (pack_padded_sequence with their lengths), or read each sample's output at its own "
            "last step: `y[torch.arange(len(y)), lengths - 1]`.",
        )
    ]  # fmt: skip


def _zeros_read(
    bench: Bench, norms: Tensor, asked: list[Tensor | None], shorter: Tensor, lengths: Tensor
) -> Finding | None:
    """Answers of all padded samples that no step of their input reaches: the zeros that unpacking fills in."""
    counted = torch.zeros(len(norms), dtype=torch.bool)
    for weight in asked:
        for rows in [] if weight is None else bench.by_sample(weight, len(norms))[:1]:
            counted |= (rows != 0).any(1).cpu()
    padded, alive = (shorter > 0) & counted, (norms > 0).any(1)
    if int(padded.sum()) < 2 or bool(alive[padded].any()) or not bool(alive[shorter == 0].any()):
        return None
    return Finding(
        "padding_read", "error", "",
        "The answers of shorter sequences are read after their end: they do not depend on the input at all.",
        f"∂answer/∂x is exactly 0 at every step of all {int(padded.sum())} samples looked at that end before the "
        f"longest one ({int(lengths[padded].median())} of {bench.steps} steps of padding in the median), but not for "
        "the longest one.",
        "Read each sample's output at its own last step, `y[torch.arange(len(y)), lengths - 1]`, or the final state, "
        "h_n[-1], which is each sample's own.",
    )  # fmt: skip
