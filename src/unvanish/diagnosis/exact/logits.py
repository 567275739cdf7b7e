"""The inputs of cross-entropy and its relatives: scores, not probabilities."""

import math

import torch
from torch import Tensor

from unvanish.diagnosis.exact.testbench import Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.structure import tensors
from unvanish.diagnosis.trace import Called, traced

MANY = 20
"""the number of equal targets from which that is no accident"""
_VIEWS = (
    "View", "UnsafeView", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Select", "Slice", "Alias", "Expand",
    "Clone", "AsStrided", "Index", "Cat", "Stack", "ToCopy", "Reshape", "Unbind", "Split", "Gather", "Movedim",
    "IndexSelect", "SwapDims",
)  # fmt: skip


def origin(tensor: Tensor) -> str:
    """Name of the operation that made these numbers, seen through views: "Softmax", "Sigmoid", "Relu" …"""
    node = tensor.grad_fn
    while node is not None:
        name = node.name().removesuffix("0").removesuffix("1").removesuffix("Backward").lstrip("_")
        if name not in _VIEWS:
            return {"LogSoftmax": "LogSoftmax", "SafeSoftmax": "Softmax"}.get(name, name)
        following = [n for n, _ in node.next_functions if n is not None]
        if not following:
            return ""
        node = following[0]
    return ""


def output_not_logits(bench: Bench) -> list[Finding]:
    """Probabilities, or log-probabilities, where a loss expects scores, and the other way round."""
    for call in bench.training.trace.functions:
        x = call.argument(0, "input")
        if not isinstance(x, Tensor) or not x.requires_grad or not x.is_floating_point() or x.numel() < 2:
            continue
        values, made = x.detach().double(), origin(x)
        if call.name in ("cross_entropy", "log_softmax"):
            axis = call.argument(1, "dim", -1) if call.name == "log_softmax" else (1 if x.dim() > 1 else 0)
            axis = -1 if axis is None else axis
            classes = x.shape[axis]
            if classes < 2:
                if call.name == "cross_entropy":
                    return [_one_class(x)]
                continue
            sums = values.sum(axis)
            if bool((values >= 0).all()) and float((sums - 1).abs().max()) < 1e-3 and _certain(made, values):
                return [_softmax_twice(call.name, made, classes, float((sums - 1).abs().max()))]
            if made == "Softmax" and bool((values >= 0).all()):
                return [_softmax_twice(call.name, f"{made} over another axis", classes, float((sums - 1).abs().max()))]
            if made == "Sigmoid":
                return [_bounded(call.name, "sigmoid", classes)]
            if made == "LogSoftmax" and float((values.exp().sum(axis) - 1).abs().max()) < 1e-3:
                bench.notes.append(f"`{call.name}` is given log-probabilities: log_softmax twice changes nothing")
        elif call.name == "binary_cross_entropy_with_logits" and made in ("Sigmoid", "Softmax"):
            floor = math.log1p(math.exp(-1.0))
            return [
                Finding(
                    "output_not_logits", "error", "loss",
                    f"`{call.name}` expects scores and applies the sigmoid itself, but receives probabilities.",
                    f"Its input comes from {made.lower()} and lies in [{float(values.min()):.3g}, "
                    f"{float(values.max()):.3g}]; no probability leaves [0.5, 0.731], so that the loss of a positive "
                    f"can't fall below {floor:.3g}.",
                    "Leave out the model's last sigmoid, or use binary_cross_entropy.",
                )
            ]  # fmt: skip
        elif call.name in ("nll_loss", "ctc_loss") and x.dim() > 1:
            sums = values.exp().sum(1 if call.name == "nll_loss" else -1)
            if float((sums - 1).abs().max()) > 0.05:
                kind = "probabilities" if made == "Softmax" else "scores"
                return [
                    Finding(
                        "output_not_logits", "error", "loss",
                        f"`{call.name}` expects log-probabilities, but receives {kind}: the loss can fall without end "
                        "and says nothing about the classes.",
                        f"exp of its input sums to between {float(sums.min()):.3g} and {float(sums.max()):.3g} over "
                        "the classes; log-probabilities give 1.",
                        "Use cross_entropy on the scores, or log_softmax before nll_loss."
                        if call.name == "nll_loss"
                        else "Give it the scores' log_softmax over the last axis.",
                    )
                ]  # fmt: skip
        elif call.name == "kl_div" and bool((values >= 0).all()) and made in ("Softmax", "Sigmoid"):
            return [
                Finding(
                    "output_not_logits", "error", "loss",
                    "`kl_div` expects log-probabilities as its input, but receives probabilities.",
                    f"Its input lies in [{float(values.min()):.3g}, {float(values.max()):.3g}]; logarithms of "
                    "probabilities are not positive.",
                    "Give it log_softmax of the scores.",
                )
            ]  # fmt: skip
    return []


def _certain(made: str, values: Tensor) -> bool:
    """Whether these are probabilities by construction, or too many values to sum to 1 by chance."""
    return made == "Softmax" or values.shape.numel() >= 8


def _softmax_twice(name: str, made: str, classes: int, off: float) -> Finding:
    floor = math.log1p((classes - 1) * math.exp(-1.0))
    return Finding(
        "output_not_logits", "error", "loss",
        f"`{name}` expects scores and applies the softmax itself, but receives probabilities: two softmaxes leave "
        "hardly any gradient.",
        f"Its input comes from {made.lower() or 'an operation that normalises'}, is nowhere negative, and its "
        f"sums over the {classes} classes differ from 1 by at most {off:.1g}. With probabilities as scores the "
        f"loss can't fall below {floor:.3g} (guessing: {math.log(classes):.3g}).",
        "Leave out the model's last softmax; apply it only when probabilities are to be read.",
    )  # fmt: skip


def _bounded(name: str, kind: str, classes: int) -> Finding:
    floor = math.log1p((classes - 1) * math.exp(-1.0))
    return Finding(
        "output_not_logits", "error", "loss",
        f"`{name}` expects scores of any size, but receives the output of a {kind}.",
        f"With scores in [0, 1] and {classes} classes the loss can't fall below {floor:.3g} (guessing: "
        f"{math.log(classes):.3g}).",
        f"Leave out the model's last {kind}.",
    )  # fmt: skip


def _one_class(x: Tensor) -> Finding:
    return Finding(
        "output_not_logits", "error", "loss",
        "`cross_entropy` over one class is always 0: the softmax of a single score is 1.",
        f"Its input has the shape {tuple(x.shape)}, with one class along axis 1.",
        "Use binary_cross_entropy_with_logits for one score, or give as many scores as there are classes.",
    )  # fmt: skip


def targets_ignored(bench: Bench) -> list[Finding]:
    """Targets that ignore_index or class weights leave out although they are real."""
    for call in bench.training.trace.functions:
        if call.name not in ("cross_entropy", "nll_loss") or not isinstance(y := call.argument(1, "target"), Tensor):
            continue
        if y.is_floating_point():
            continue
        ignore = call.argument(4, "ignore_index", -100)
        weight = call.argument(2, "weight")
        if isinstance(weight, Tensor) and bool((weight == 0).any()):
            gone = (
                (weight.to(y.device)[y.clamp(0, len(weight) - 1)] == 0) & (y >= 0) & (y < len(weight)) & (y != ignore)
            )
            if float(gone.double().mean()) > 0 and not _padded_too(bench, gone):
                return [_left_out("a class weight of 0", gone)]
        if not isinstance(ignore, int) or not bool((y == ignore).any()):
            continue
        gone = y == ignore
        if bool(gone.all()):
            return [_left_out(f"ignore_index={ignore}", gone)]
        if ignore >= 0 and not _padded_too(bench, gone) and _scattered(bench, gone):
            return [_left_out(f"ignore_index={ignore}", gone)]
    return _without_weight(bench) or _masked_away(bench)


def _without_weight(bench: Bench) -> list[Finding]:
    """A function of torch compares answers with the targets, and the loss is the same for any targets.

    A target that is passed and never used is no fault, whatever else has no weight.
    """
    subject, samples = bench.subject, bench.subject.samples
    idle = [number for number, asked in enumerate(bench.asked) if asked is not None and not bool((asked != 0).any())]
    if not idle or len(idle) == len(bench.asked) or not subject.has_target or samples is None:
        return []
    compares = next(
        (call.name for call in bench.training.trace.functions if not call.inside and _given(call, bench)), ""
    )
    if not compares:
        return []
    same = subject.rows(subject.target, torch.zeros(samples, dtype=torch.long))
    if all(torch.equal(a, b) for a, b in zip(tensors(same), tensors(subject.target), strict=True)):
        return []
    twin = subject.twin()
    losses: list[float] = []
    for target in (subject.target, same):
        with torch.no_grad(), subject.rng(0):
            losses.append(float(subject.loss(twin, subject.inputs, target)))
    if losses[0] != losses[1]:
        return []
    return [
        Finding(
            "targets_ignored", "error", "loss",
            f"The loss does not depend on the targets: {compares}, which compares answers with them, has no weight.",
            f"With the first sample's target for all {samples} samples the loss is the same, {losses[0]:.6g}, and its "
            f"gradient at answer {idle[0]}, of shape {tuple(bench.training.answers[idle[0]].shape)}, is exactly 0.",
            "Give that term a weight above 0.",
        )
    ]  # fmt: skip


def _given(call: Called, bench: Bench) -> bool:
    """Whether the targets are among a call's arguments."""
    goals = [goal for goal in bench.subject.goals if isinstance(goal, Tensor)]
    given = [a for a in (*call.args, *call.options.values()) if isinstance(a, Tensor)]
    return any(a.shape == g.shape and a.dtype == g.dtype and torch.equal(a, g) for a in given for g in goals)


def _masked_away(bench: Bench) -> list[Finding]:
    """Only steps with one and the same target count: the padding, because of an inverted mask."""
    for answers, asked in zip(bench.training.answers, bench.asked, strict=True):
        if asked is None:
            continue
        for goal in bench.subject.goals:
            if goal.dim() < 2 or answers.shape[:2] != goal.shape[:2]:
                continue
            counts = (asked != 0).flatten(2).any(-1) if asked.dim() > 2 else asked != 0
            steps = goal.reshape(*goal.shape[:2], -1)
            kept, gone = steps[counts], steps[~counts]
            if len(kept) > MANY and len(gone) and len(kept.unique(dim=0)) == 1 and len(gone.unique(dim=0)) > 2:
                return [_left_out("a mask that keeps the steps whose targets are all the same", ~counts)]
    return _by_value(bench)


def _by_value(bench: Bench) -> list[Finding]:
    """Numbers on one side of a threshold are left out, whatever the answers are: `y > 0` meant as a mask of padding."""
    subject = bench.subject
    if subject.loss_function is None or not subject.has_target or len(subject.goals) != 1:
        return []
    (goal,) = subject.goals
    answers = bench.training.answers
    if len(answers) != 1 or not goal.is_floating_point() or answers[0].shape != goal.shape or goal.dim() == 0:
        return []
    asked = bench.asked[0]
    if asked is None or not _apart(goal, asked != 0):
        return []
    counts = asked != 0
    # One-sided losses are flat too, but beyond an answer, not beyond a target.
    for end in (goal.min(), goal.max()):
        moved = end.expand_as(answers[0]).clone().requires_grad_()
        with torch.enable_grad(), subject.rng(0):
            (gradient,) = torch.autograd.grad(subject.loss_function(moved, subject.target), moved)
        counts = counts | (gradient != 0)
    if not _apart(goal, counts):
        return []
    kept = goal[counts]
    below = bool(goal[~counts].max() <= kept.min())
    edge = float(kept.min() if below else kept.max())
    return [_left_out(f"a mask that drops every target {'below' if below else 'above'} {edge:.3g}", ~counts)]


def _apart(goal: Tensor, counts: Tensor) -> bool:
    """Whether the targets that count and those that don't are many different ones, on two sides of a threshold."""
    kept, gone = goal[counts], goal[~counts]
    if len(kept.unique()) < MANY or len(gone.unique()) < MANY:
        return False
    return bool(gone.max() <= kept.min()) or bool(gone.min() >= kept.max())


def _left_out(by: str, gone: Tensor) -> Finding:
    return Finding(
        "targets_ignored", "error", "loss",
        f"Real targets are left out of the loss by {by}.",
        f"{int(gone.sum())} of {gone.numel()} targets ({float(gone.double().mean()):.0%}) have no part in the loss.",
        "Number the padding apart from the classes, -100 for instance, or mask by the sequences' lengths.",
    )  # fmt: skip


def _padded_too(bench: Bench, gone: Tensor) -> bool:
    """Whether the steps left out are at the end of their sequence: the usual padding."""
    by_step = _by_step(bench, gone)
    if by_step is None:
        return False
    tail = by_step.flip(1).long().cumprod(1).flip(1).bool()
    return bool((by_step == tail).all())


def _scattered(bench: Bench, gone: Tensor) -> bool:
    """Whether the steps are not one block shared by all samples, such as the part before an answer."""
    by_step = _by_step(bench, gone)
    if by_step is None:
        return gone.dim() == 1
    return not bool((by_step == by_step[:1]).all()) and not _leading(by_step)


def _leading(by_step: Tensor) -> bool:
    """Whether each sample's part is at its start, or at its start and its end."""
    kept = ~by_step
    first = kept.long().argmax(1)
    last = by_step.shape[1] - 1 - kept.flip(1).long().argmax(1)
    return bool((kept.sum(1) == (last - first + 1) * kept.any(1)).all())


def _by_step(bench: Bench, gone: Tensor) -> Tensor | None:
    """[samples, steps]; None for one target per sample."""
    n = bench.subject.samples
    if n is None:
        return None
    if gone.dim() == 1:
        if gone.shape[0] <= n or gone.shape[0] % n:
            return None
        return gone.unflatten(0, (n, -1)) if bench.subject.axes[0] == 0 else gone.unflatten(0, (-1, n)).T
    if gone.shape[0] == n:
        return gone.reshape(n, -1)
    return gone.movedim(1, 0).reshape(n, -1) if gone.dim() > 1 and gone.shape[1] == n else None


def loss_unbalanced(bench: Bench) -> list[Finding]:
    """The terms of a loss that is a sum, compared by the gradients that they send to shared weights."""
    done = bench.training
    if done.loss is None or done.error is not None:
        return []
    made = {id(c.result): c for c in done.trace.functions if c.name in ("add", "__add__", "__radd__", "sum")}
    terms = _terms(done.loss, made)
    weights = [p for p in done.model.parameters() if p.requires_grad]
    if len(terms) < 2 or not weights:
        return []
    sizes: list[tuple[float, float, bool]] = []
    for term, compared in zip(terms, _depend_on_target(bench, len(terms)), strict=True):
        if term.requires_grad:
            got = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
            norms = [g.double().norm() for g in got if g is not None]
            sizes.append((float(torch.stack(norms).norm()) if norms else 0.0, float(term.detach()), compared))
    # A penalty on weights or states is small on purpose; a large one drowns the data.
    most = max((g for g, _, compared in sizes if compared), default=0.0)
    sizes = sorted((s for s in sizes if s[0] > 0 and (s[2] or s[0] > most)), reverse=True)
    if len(sizes) < 2:
        return []
    ratio, largest, smallest = sizes[0][0] / sizes[-1][0], sizes[0][1], abs(sizes[-1][1])
    if ratio < 300 or largest < 10 * smallest:
        return []
    severity = "error" if ratio > 3_000 and largest > 100 * smallest else "warning"
    if severity == "warning" and not bench.subject.has_target:
        return []  # it is unknown which of the terms are penalties
    listed = ", ".join(f"{value:.3g} (gradient {gradient:.2g})" for gradient, value, _ in sizes)
    return [
        Finding(
            "loss_unbalanced", severity, "loss",
            "One term of the loss drowns the others: they hardly affect the weights.",
            f"terms: {listed}; gradients differ by a factor of {ratio:.3g}.",
            "Weight the terms so that their gradients are of one size, or standardise what the larger one compares.",
        )
    ]  # fmt: skip


def _depend_on_target(bench: Bench, terms: int) -> list[bool]:
    """For each term of the loss, whether its value changes with the order of the targets; all True if it is unknown."""
    subject = bench.subject
    n = subject.samples
    if not subject.has_target or n is None or n < 2:
        return [True] * terms
    values = []
    for roll in (0, 1):
        target = subject.rows(subject.target, torch.roll(torch.arange(n), roll))
        with subject.rng(0):
            done = traced(subject.twin(), lambda m, y=target: subject.loss(m, subject.inputs, y), backward=False)
        if done.loss is None:
            return [True] * terms
        made = {id(c.result): c for c in done.trace.functions if c.name in ("add", "__add__", "__radd__", "sum")}
        values.append([float(t.detach()) for t in _terms(done.loss, made)])
    if len(values[0]) != terms or len(values[1]) != terms:
        return [True] * terms
    return [a != b for a, b in zip(*values, strict=True)]


def _terms(loss: Tensor, made: dict[int, Called], depth: int = 0) -> list[Tensor]:
    call = made.get(id(loss))
    if call is None or depth > 20:
        return [loss]
    operands = [a for a in call.args if isinstance(a, Tensor) and a.numel() == 1]
    if len(operands) < 2:
        return [loss]
    return [t for operand in operands for t in _terms(operand, made, depth + 1)]
