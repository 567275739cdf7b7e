"""Independence: the answer for one sample must not change when another sample is exchanged."""

import torch
from torch import Tensor, nn

from unvanish.diagnosis.exact.testbench import RECURRENT, Bench
from unvanish.diagnosis.finding import Finding


def samples_mixed(bench: Bench) -> list[Finding]:
    """{j : f(X')_j ≠ f(X)_j} must be {i} where X' has another sample in place of X_i; in eval mode."""
    k = bench.count
    if k is None or k < 3:
        return []
    base = bench.run()
    most, asked = 0, 0
    square = False
    for i in sorted({0, k // 2, k - 1}):
        index = torch.arange(k)
        index[i] = (i + 1) % k
        if bench.subject.samples is not None and bench.subject.samples > k:
            index[i] = k
        others = 0
        for was, now in zip(base, bench.run(bench.taken(index)), strict=False):
            if was.shape != now.shape:
                continue
            if was.dim() == 2 and was.shape[0] == was.shape[1] == k:
                square = True  # similarities of all pairs, of an in-batch contrastive loss
                continue
            readings = [_moved(a, b, bench.tolerance) for a, b in _pairs(bench, was, now)]
            if readings:
                others = max(others, min(int(m.sum()) - int(m[i]) for m in readings))
        most, asked = max(most, others), asked + 1
    if square:
        bench.notes.append("the model returns a matrix of all pairs of samples, as contrastive losses need")
    if most == 0:
        return []
    proof = f"One of {k} samples was exchanged for another, {asked} times: up to {most} of the other answers changed."
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in bench.model.modules()):
        bench.notes.append(f"batch norm without running statistics makes answers depend on other samples. {proof}")
        return []
    where, do = _culprit(bench)
    says = (
        "The answer for a sample depends on the other samples of the batch: samples are mixed up with steps or layers."
    )
    return [Finding("samples_mixed", "error", where, says, proof, do)]


def _pairs(bench: Bench, was: Tensor, now: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(bench.by_sample(was), bench.by_sample(now), strict=True))


def _moved(was: Tensor, now: Tensor, tolerance: float) -> Tensor:
    """[samples] whether each sample's answer changed."""
    size = was.abs().amax().clamp_min(1e-30)
    return ((was - now).abs() > tolerance * size).any(1).cpu()


def _culprit(bench: Bench) -> tuple[str, str]:
    """(module, change): a recurrent layer that is given the samples where it expects the steps."""
    for call in bench.evaluation().modules:
        if not isinstance(call.module, RECURRENT) or isinstance(call.module, nn.RNNCellBase) or not call.inputs:
            continue
        x, first = call.inputs[0], call.module.batch_first
        if x.dim() != 3:
            continue
        if not first and x.shape[0] == bench.count and x.shape[1] != bench.count:
            return call.path, (
                f"`{call.path}` takes [steps, samples, features], since batch_first is False, and is given "
                f"{tuple(x.shape)} with the samples first. Build it with batch_first=True."
            )
        if first and x.shape[1] == bench.count and x.shape[0] != bench.count:
            return call.path, (
                f"`{call.path}` was built with batch_first=True and is given {tuple(x.shape)} with the steps first. "
                "Build it with batch_first=False, or transpose its input."
            )
    return "", (
        "Exchange axes with transpose or permute: view and reshape keep the order of the numbers and so mix samples. "
        "The final state has the shape [layers, samples, units]; read its last layer as h_n[-1], or transpose(0, 1) it "
        "before a view."
    )
