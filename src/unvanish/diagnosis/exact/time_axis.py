"""Targets against inputs step by step: leaked answers, answers from the future, time exchanged with features."""

import torch
from torch import Tensor, nn

from unvanish.diagnosis.exact.testbench import Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.structure import tensors
from unvanish.nn.modules import SequenceModule


def _sequences(bench: Bench, which: int | None = None) -> tuple[Tensor, Tensor] | None:
    """(input [B, T, F], target [B, T, …]) where both have steps; of the main input, or of this one."""
    n = bench.subject.samples
    if bench.sequence is None or n is None:
        return None
    main, samples, steps = bench.sequence
    x = tensors(bench.subject.call[0])[main if which is None else which].detach().cpu()
    if x.dim() < 2 or x.shape[samples] != n:
        return None
    x = x.movedim((samples, steps), (0, 1))
    T = x.shape[1]
    for y in bench.subject.goals:
        y = y.detach().cpu()
        if y.dim() >= 2 and y.shape[samples] == n and y.shape[steps] == T:
            return x.reshape(n, T, -1), y.movedim((samples, steps), (0, 1)).reshape(n, T, -1)
        if y.dim() == 1 and y.shape[0] == n * T:
            folded = y.unflatten(0, (n, T)) if samples == 0 else y.unflatten(0, (T, n)).T
            return x.reshape(n, T, -1), folded.unsqueeze(-1)
    return None


def _answers_use(bench: Bench, at: int, step: int, which: int | None = None) -> bool:
    """Whether the answers at step `at` move with another step of the main input, or of this one."""
    k = bench.count or 0
    base, changed = bench.run(), bench.run(bench.with_step(step, torch.roll(torch.arange(k), 1), which))
    for was, now in zip(base, changed, strict=False):
        a, b = _at(bench, was, at, which), _at(bench, now, at, which)
        if a is not None and b is not None:
            apart = float((a - b).abs().max())
            if apart > bench.tolerance * float(a.abs().max().clamp_min(1e-30)):
                return True
    return False


def _at(bench: Bench, answers: Tensor, step: int, which: int | None) -> Tensor | None:
    """These answers at a step, of as many as the input has; also where samples and steps are one axis."""
    steps = bench.steps_of(which)
    found = bench.at_step(answers, step, steps)
    if found is not None or answers.dim() == 0 or answers.shape[0] != (bench.count or 0) * steps:
        return found
    outer = bench.samples_outer
    unfolded = answers.unflatten(0, (-1, steps) if outer else (steps, -1))
    return unfolded[:, step] if outer else unfolded[step]


def target_in_input(bench: Bench) -> list[Finding]:
    """The target of a step is contained in the input that its answer sees: the sequence, or a decoder's input."""
    if bench.sequence is None:
        return []
    for which in range(len(tensors(bench.subject.call[0]))):
        found = _target_in(bench, which)
        if found:
            return found
    return []


def _target_in(bench: Bench, which: int) -> list[Finding]:
    both = _sequences(bench, which)
    if both is None or both[0].shape[1] < 3:
        return []
    x, y = both
    T, ids = x.shape[1], not x.is_floating_point()
    if y.shape[-1] > x.shape[-1] or len(y.unique()) < 2:
        return []
    middle = T // 2
    for shift in (0, 1):
        goal, shown = y[:, : T - shift], x[:, shift:]
        columns = [j for j in range(shown.shape[-1]) if torch.equal(shown[..., j].double(), goal[..., 0].double())]
        if not columns:
            continue
        # Of an autoencoder every answer sees the whole input, through its bottleneck.
        sees = _answers_use(bench, middle, middle + shift, which)
        later = _answers_use(bench, middle, min(T - 1, middle + 2), which)
        if not sees or (shift == 0 and later):
            continue
        if shift:
            says = "The answer of a step depends on the next step's input, which is its target: it can be copied."
            do = "Use a unidirectional model, or predict something that it has not been shown."
        else:
            says = "The target of each step is that step's own input, so there is nothing to predict."
            do = "Shift the targets by one step: inputs `x[:, :-1]`, targets `x[:, 1:]`."
        proof = f"Target at step t equals {'the ids' if ids else f'feature {columns[0]}'} of the input at step t" + (
            " + 1" if shift else ""
        ) + f" for all {goal.numel()} values, and the answer of step {middle} moves with it."  # fmt: skip
        # With a second target this may be a second task, a reconstruction.
        sure = "error" if ids or shift else "warning" if len(bench.subject.goals) == 1 else "note"
        return [Finding("target_in_input", sure, "target", says, proof, do)]
    return []


WINDOW = 4


def needs_future(bench: Bench) -> list[Finding]:
    """A causal model, and targets that a linear fit finds in later inputs but not in those up to the step."""
    both = _sequences(bench)
    if both is None or bench.steps < 4:
        return []
    x, y = both
    T = x.shape[1]
    middle = T // 2
    if _answers_use(bench, middle, min(T - 1, middle + 1)) or not _answers_use(bench, middle, middle):
        return []
    for ahead in range(1, min(T - 1, 25)):
        value, later = y[:, :-ahead, :1], x[:, ahead:, :1]
        judged = torch.ones_like(value, dtype=torch.bool) if y.is_floating_point() else value >= 0
        if bool(judged.any()) and torch.equal(value[judged].double(), later[judged].double()):
            return []  # a later value, which is what a forecast is asked for
    if y.shape[-1] <= x.shape[-1] and torch.equal(y[..., 0].double(), x.flip(1)[..., 0].double()):
        proof = (
            "The target is the input in reverse order: in the first half of the steps the model has not seen it yet."
        )
    else:
        fit = _fits(x, y)
        if fit is None or fit["future"] <= 0.5 or fit["past"] >= 0.1:
            return []
        proof = (
            "Share of the targets' variance that a linear fit explains on held-out samples: "
            f"{fit['future']:.2f} from the {WINDOW} steps after, {max(fit['past'], 0):.2f} from the step itself and "
            f"the {WINDOW} before."
        )
    return [
        Finding(
            "needs_future", "error", "",
            "The targets depend on later steps, which the model has not seen when it answers.",
            f"{proof} The answer at step {middle} does not move with the input of step {min(T - 1, middle + 1)}.",
            "Use bidirectional=True, delay the targets by some steps, or read the whole sequence before answering.",
        )
    ]  # fmt: skip


def _fits(x: Tensor, y: Tensor) -> dict[str, float] | None:
    """Share of the targets' variance that the steps before, and those after, explain; None where too few are given."""
    features, goal = _features(x), _goal(y)
    at = range(WINDOW, x.shape[1] - WINDOW)
    if features is None or goal is None or not at:
        return None
    goals = torch.stack([goal[:, t] for t in at], 1).flatten(0, 1)
    fit = {}
    for name, span in {"past": range(-WINDOW, 1), "future": range(1, WINDOW + 1)}.items():
        rows = torch.cat([torch.stack([features[:, t + s] for t in at], 1) for s in span], -1).flatten(0, 1)
        fit[name] = _explained(rows, goals, len(x))
    return fit


def _features(x: Tensor) -> Tensor | None:
    if x.is_floating_point():
        return x.double() if x.shape[-1] * 5 <= 400 else None
    values = x[..., 0].unique()
    return (
        nn.functional.one_hot(torch.searchsorted(values, x[..., 0].contiguous())).double()
        if len(values) <= 40
        else None
    )


def _goal(y: Tensor) -> Tensor | None:
    if y.is_floating_point():
        return y.double()
    values = y[..., 0].unique()
    return (
        nn.functional.one_hot(torch.searchsorted(values, y[..., 0].contiguous())).double()
        if 2 <= len(values) <= 40
        else None
    )


def _explained(x: Tensor, y: Tensor, samples: int) -> float:
    """R² of a ridge regression on a quarter of the samples that it was not fitted on."""
    per = len(x) // samples
    cut = (samples * 3 // 4) * per
    if cut < 4 * x.shape[1] or cut == len(x):
        return 0.0
    mean, goal = x[:cut].mean(0), y[:cut].mean(0)
    a = x[:cut] - mean
    w = torch.linalg.solve(a.T @ a + 1e-3 * cut * torch.eye(x.shape[1], dtype=x.dtype), a.T @ (y[:cut] - goal))
    left = (y[cut:] - goal - (x[cut:] - mean) @ w).square().sum()
    return float(1 - left / (y[cut:] - goal).square().sum().clamp_min(1e-30))


def axes_mixed(bench: Bench) -> list[Finding]:
    """The input of a layer or the loss has the sizes of a transposed tensor, but the numbers of a view of it."""
    given = [(t.detach(), "the batch") for t in tensors(bench.subject.call) if t.dim() == 3 and t.is_floating_point()]
    # What convolutions make is [samples, channels, steps] until an operation changes its shape.
    trace = bench.training.trace
    channels = {c.outputs[0].shape for c in trace.modules if isinstance(c.module, nn.Conv1d) and c.outputs}
    made = [(c.outputs[0], f"`{c.path}`") for c in trace.modules if c.path and c.outputs]
    made += [(c.result, f"`{c.name}`") for c in trace.functions if c.inside and isinstance(c.result, Tensor)]
    given += [(t.detach(), by) for t, by in made if t.dim() == 3 and t.shape in channels]
    answers = [(t.detach(), "the model") for t in bench.training.answers if t.dim() == 3]
    read = [
        (c.path, f"`{c.path}`", c.inputs[0], given)
        for c in trace.modules
        if isinstance(c.module, SequenceModule | nn.Conv1d) and c.inputs
    ]
    read += [
        ("loss", f"The loss, {c.name},", c.argument(0, "input"), answers)
        for c in trace.functions
        if not c.inside and c.name in ("cross_entropy", "nll_loss")
    ]
    for path, who, tensor, sources in read:
        if not isinstance(tensor, Tensor):
            continue
        for x, source in sources:
            off = _viewed(tensor.detach(), x)
            if off:
                return [
                    Finding(
                        "axes_mixed", "error", path,
                        f"{who} receives a view where a transposition was meant: each step contains values of several "
                        "steps.",
                        f"Its input of shape {tuple(tensor.shape)} is what {source} gives, {tuple(x.shape)}, read in "
                        f"the same order; {off} of {x.numel()} values are not where they would be after a "
                        "transposition.",
                        "Exchange axes with `x.transpose(1, 2)` (or permute); view and reshape only regroup.",
                    )
                ]  # fmt: skip
    return []


def _viewed(r: Tensor, x: Tensor) -> int:
    """The number of values of r that are misplaced if r, with the sizes of x after exchanging axes, is only a view of
    x; 0 if it is not a view."""
    B, a, b = x.shape
    if a == b or r.numel() != x.numel() or r.dtype != x.dtype or r.dim() != 3:
        return 0
    if tuple(r.shape) == (B, b, a):
        wrong, right = x.reshape(B, b, a), x.transpose(1, 2)
    elif tuple(r.shape) == (b, B, a) and b != B:
        wrong, right = x.reshape(B, b, a).transpose(0, 1), x.permute(2, 0, 1)
    else:
        return 0
    return int((wrong != right).sum()) if torch.equal(r, wrong) else 0
