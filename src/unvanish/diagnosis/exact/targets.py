"""Targets against answers: shapes that broadcast, ranges that can't be reached, scales far apart."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.capture.parts import NAMES
from unvanish.diagnosis.exact.logits import origin
from unvanish.diagnosis.exact.testbench import Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.structure import floating, mapped
from unvanish.diagnosis.trace import Called, double
from unvanish.nn.modules import cell_of

REGRESSION = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}
DIFFERENCES = {"sub", "rsub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__"} | REGRESSION


def target_mismatch(bench: Bench) -> list[Finding]:
    """An operation of the loss whose operands extend each other: [B, 1] with [B] gives [B, B]."""
    for call in bench.training.trace.functions:
        if call.inside or call.name not in DIFFERENCES or len(operands := _operands(call)) < 2:
            continue
        a, b = operands[0], operands[1]
        if a.requires_grad == b.requires_grad or a.shape == b.shape:
            continue
        answers, target = (a, b) if a.requires_grad else (b, a)
        both = torch.broadcast_shapes(a.shape, b.shape)
        extended = math.prod(both) > max(a.numel(), b.numel()) and a.dim() != b.dim() and min(a.numel(), b.numel()) > 1
        shapes = (
            f"`{call.name}` was given answers of shape {tuple(answers.shape)} and a target of {tuple(target.shape)}"
        )
        if extended:
            moved = _moved(bench)
            if moved is not None and moved[0] == 0:
                continue
            also = (
                ""
                if moved is None
                else f" One target was changed: so did ∂E/∂answer for {moved[0]} of the {moved[1]} other samples."
            )
            return [
                Finding(
                    "target_mismatch", "error", "loss",
                    "Every answer is compared with every target, because the shapes differ and broadcast: the best the "
                    "model can do is to predict the targets' mean.",
                    f"{shapes}; they broadcast to {tuple(both)}.{also}",
                    f"Give both the same shape: target.reshape({tuple(answers.shape)}), for instance.",
                )
            ]  # fmt: skip
        if call.name in REGRESSION and target.numel() > 1 and a.numel() != b.numel():
            return [
                Finding(
                    "target_mismatch", "warning", "loss",
                    "Answers and targets have different shapes, and one is broadcast to the other.",
                    f"{shapes}.", "Check that this is meant; otherwise give both the same shape.",
                )
            ]  # fmt: skip
    return []


def _operands(call: Called) -> list[Tensor]:
    return [a for a in (*call.args[:2], *call.options.values()) if isinstance(a, Tensor)]


def _moved(bench: Bench) -> tuple[int, int] | None:
    """(other samples whose ∂E/∂answer changes when one target does, other samples)"""
    subject = bench.subject
    if subject.loss_function is None or not subject.has_target or (n := subject.samples) is None or n < 2:
        return None
    twin = subject.twin().eval()
    with torch.no_grad(), subject.rng(0):
        output = twin(*subject.inputs)

    def gradient(target: Any) -> list[Tensor]:
        leaves = mapped(double(output), lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)
        assert subject.loss_function is not None
        with torch.enable_grad(), subject.rng(0):
            value = subject.loss_function(leaves, double(target))
            got = torch.autograd.grad(value, floating(leaves), allow_unused=True)
        return [g for g in got if g is not None]

    def first_moved(by: float) -> Any:
        def change(tensor: Tensor) -> Tensor:
            axis = subject.axis(tensor)
            if axis is None or not tensor.is_floating_point():
                return tensor
            tensor = tensor.clone()
            tensor.select(axis, 0).add_(by * (1 + tensor.abs().max()))
            return tensor

        return mapped(subject.target, change)

    most = 0
    # Far to both sides: the gradient of an absolute error depends only on the side.
    for was, now in zip(gradient(first_moved(-10.0)), gradient(first_moved(10.0)), strict=True):
        rows = bench.by_sample((was - now).abs(), n)
        if rows:
            size = float(was.abs().amax()) or 1.0
            most = max(most, int((rows[0].amax(1) > 1e-9 * size)[1:].sum()))
    return most, n - 1


def target_scale(bench: Bench) -> list[Finding]:
    """Answers start near 0, and an optimizer moves them by about its rate per update; targets may be far away."""
    for answers, target in compared(bench):
        goal, size = target.detach().double(), float(answers.detach().double().abs().mean())
        if goal.numel() < 2 or not bool(goal.isfinite().all()):
            continue
        rms = float(goal.square().mean().sqrt())
        spread = float(goal.std())
        if rms > 30 and rms > 20 * max(size, 1e-9):
            return [
                Finding(
                    "target_scale", "error" if rms > 100 else "warning", "target",
                    "The targets are far larger than the answers of the fresh model, so training spends its updates "
                    "on getting there.",
                    f"root mean square of the targets: {rms:.3g} (mean {float(goal.mean()):.3g}, standard deviation "
                    f"{spread:.3g}); mean size of the answers: {size:.3g}.",
                    "Standardise the targets by the training set's mean and standard deviation, "
                    "`target = (target - mean) / std`, and undo it when predicting.",
                )
            ]  # fmt: skip
        if 0 < spread < 1e-3 and spread < 1e-2 * float((answers.detach().double() - goal).square().mean().sqrt()):
            return [
                Finding(
                    "target_scale", "warning", "target",
                    "The targets differ far less from each other than they differ from the answers.",
                    f"standard deviation of the targets: {spread:.3g}; root mean square error of the fresh model: "
                    f"{float((answers.detach().double() - goal).square().mean().sqrt()):.3g}.",
                    "Standardise the targets by the training set's mean and standard deviation.",
                )
            ]  # fmt: skip
    return []


def output_range(bench: Bench) -> list[Finding]:
    """Answers of a bounded last activation against targets outside its range."""
    ranges = {"Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0), "Relu": (0.0, math.inf), "Softmax": (0.0, 1.0),
              "Softplus": (0.0, math.inf), "Hardtanh": (-1.0, 1.0)}  # fmt: skip
    for answers, target in compared(bench):
        made = origin(answers)
        low, high = ranges.get(made, (-math.inf, math.inf))
        low, high = _recurrent_range(bench, answers, low, high)
        goal = target.detach().double()
        beyond = ((goal < low - 1e-6) | (goal > high + 1e-6)).double().mean()
        # Targets at the open ends of the range are approached, which is what they are for.
        much = 0.1 if made in ranges else 0.5  # a state that answers itself is often meant to, for part of the targets
        if float(beyond) > 0.02:
            return [
                Finding(
                    "output_range", "error" if float(beyond) > much else "warning", "",
                    "The last activation can't reach the targets.",
                    f"Answers come from {made.lower() if made in ranges else 'a recurrent state'} and lie in [{low:g}, "
                    f"{high:g}]; targets range from {float(goal.min()):.4g} to {float(goal.max()):.4g}, "
                    f"{float(beyond):.0%} of them outside.",
                    "Remove the last activation and end with a linear layer, or scale the targets into its range.",
                )
            ]  # fmt: skip
    for call in bench.training.trace.functions:
        if call.name != "cross_entropy" or not isinstance(x := call.argument(0, "input"), Tensor):
            continue
        made = origin(x)
        if made == "Tanh" and x.dim() > 1:
            classes = x.shape[1]
            floor = math.log1p((classes - 1) * math.exp(-2.0))
            if floor > 0.1:
                return [
                    Finding(
                        "output_range", "error" if floor > 0.15 * math.log(classes) else "warning", "",
                        "Scores end in tanh, so that no class can get a probability near 1.",
                        f"With {classes} classes and scores in [-1, 1] cross-entropy can't fall below {floor:.3g} "
                        f"(guessing: {math.log(classes):.3g}).",
                        "Leave out the tanh: cross_entropy takes scores of any size.",
                    )
                ]  # fmt: skip
    return []


def _recurrent_range(bench: Bench, answers: Tensor, low: float, high: float) -> tuple[float, float]:
    """[-1, 1] for answers that are the output h of a gated layer or cell of torch or unvanish.

    A projection of h is not bounded, nor is c; h of a plain RNN is as φ is.
    """
    if math.isfinite(low):
        return low, high
    for call in bench.training.trace.modules:
        module = call.module
        if not isinstance(module, nn.RNNBase | nn.RNNCellBase) or type(module).__name__ not in NAMES:
            continue
        if not cell_of(module).carries or getattr(module, "proj_size", 0):
            continue
        # A cell returns h, with c behind it where it has one; a layer returns the outputs and the last h first.
        for h in call.outputs[: 1 if isinstance(module, nn.RNNCellBase) else 2]:
            if h.untyped_storage().data_ptr() == answers.untyped_storage().data_ptr():
                return -1.0, 1.0
    return low, high


def compared(bench: Bench) -> list[tuple[Tensor, Tensor]]:
    """(answers, target) of the same shape that a regression loss compares, or the only ones there are."""
    found = []
    for call in bench.training.trace.functions:
        if call.inside or call.name not in {*REGRESSION, "sub", "__sub__", "rsub", "__rsub__"}:
            continue
        pair = _operands(call)[:2]
        if len(pair) == 2 and pair[0].requires_grad != pair[1].requires_grad and pair[0].is_floating_point():
            answers, target = pair if pair[0].requires_grad else reversed(pair)
            if answers.shape == target.shape and target.is_floating_point() and _is_target(bench, target):
                found.append((answers, target))
    return found


def _is_target(bench: Bench, tensor: Tensor) -> bool:
    """Whether it is the target itself, not a quantity made from it such as its logarithm."""
    goals = bench.subject.goals
    return not goals or any(
        t.numel() == tensor.numel() and t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        for t in goals
    )
