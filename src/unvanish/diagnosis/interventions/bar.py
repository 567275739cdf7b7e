"""The bar: the loss of the best answer that ignores the input.

The model's outermost modules are replaced by constants of the same structure and shape, which are fitted under the
user's own loss. Two kinds: one answer for all samples and steps, and one per step; the lower loss is the bar.

A model that ends in a softmax can't return an arbitrary constant: the constant then passes through the same last
function, which is read from the output's autograd node, so that the model can attain the bar's loss.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from unvanish.diagnosis.interventions.material import Material
from unvanish.diagnosis.structure import floating, mapped, tensors
from unvanish.nn.modules import evaluating

LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "SoftmaxBackward0": lambda z: z,  # along its own axis: see `_linked`
    "LogSoftmaxBackward0": lambda z: z,
    "SigmoidBackward0": torch.sigmoid,
    "LogSigmoidBackward0": logsigmoid,
    "TanhBackward0": torch.tanh,
    "ReluBackward0": softplus,
    "SoftplusBackward0": softplus,
    "ExpBackward0": torch.exp,
    "HardtanhBackward0": torch.tanh,
    "HardsigmoidBackward0": torch.sigmoid,
}
"""autograd node of a last activation → a smooth function with its range"""
VIEWS = ("View", "Reshape", "Squeeze", "Unsqueeze", "Select", "Slice", "Transpose", "Permute", "T", "Expand", "Clone",
         "Stack", "Cat", "Alias", "Index", "Unbind", "Split", "ToCopy", "UnsafeView", "AsStrided")  # fmt: skip
"""autograd nodes that only rearrange numbers"""
ROUNDS = 3
"""of LBFGS, of up to 20 iterations each, before Adam, which also settles losses with corners"""


@dataclass
class Bar:
    """The best constant answer, fitted."""

    losses: Tensor
    """`[G]` the losses of the groups that copies are judged on"""
    per_step: bool = False
    """whether it is one answer per step"""
    answers: dict[str, "_Constant"] = field(default_factory=dict)
    """by the path of the module whose output it replaces"""

    @property
    def mean(self) -> float:
        """Over the groups."""
        return float(self.losses.mean())

    @contextmanager
    def shrunk(self, model: nn.Module, share: float) -> Iterator[None]:
        """Within this, a copy's answers are `constant + share · (answer − constant)`.

        A copy that has seen few samples is over-confident: its loss on others can be above the bar although its
        answers point in the right direction, which this reveals. For a loss that is convex in the answers, nothing is
        gained where the answers carry no information about the samples.
        """
        modules = [model.get_submodule(path) for path in self.answers]
        reals = [module.forward for module in modules]
        try:
            for module, real, answer in zip(modules, reals, self.answers.values(), strict=True):
                module.forward = _shrinking(real, answer, share)
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)


def _shrinking(real: Callable[..., Any], answer: "_Constant", share: float) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        numbers = iter(range(1 << 30))
        return _mapped(real(*args, **kwargs), lambda t: answer.towards(next(numbers), t, share))

    return forward


def best_constant(
    material: Material, seed: int, evaluations: int = 150, until: float = math.inf
) -> tuple[Bar | None, tuple[str, ...]]:
    """The bar, and a note where there is none.

    Args:
        material: where losses come from.
        seed: of random numbers that the loss draws.
        evaluations: of the loss at most, for each of the two kinds of constant.
        until: `time.perf_counter()` at which fitting ends, but for the first evaluation of each kind.
    """
    found: list[Bar] = []
    for per_step in (False, True):
        twin = material.subject.twin()
        with material.subject.rng(seed):
            outer = _outermost(twin, material)
            if not outer:
                return None, ("no best constant answer: the model returns no tensors, or nothing but its own loss",)
            answers = [_Constant(module.forward, per_step) for module in outer.values()]
            with _standing_in(list(outer.values()), answers):
                losses = _fit(twin, material, answers, evaluations, until)
        if losses is not None:
            found.append(Bar(losses, per_step, dict(zip(outer, answers, strict=True))))
        if not any(answer.steps for answer in answers):
            break
    if not found:
        return None, (
            "no best constant answer: the loss of a constant is not finite, or does not depend on the output",
        )
    return min(found, key=lambda bar: bar.mean), ()


def _outermost(twin: nn.Module, material: Material) -> dict[str, nn.Module]:
    """Path → modules whose outputs the loss is made of: the model itself, unless it returns a loss of its own."""
    scalars: set[int] = set()
    calls: list[tuple[nn.Module, tuple[nn.Module, ...], bool]] = []
    stack: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(module)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        stack.pop()
        tensors = floating(out)
        if any(t.dim() == 0 for t in tensors):
            scalars.add(id(module))
        calls.append((module, tuple(stack), bool(tensors)))

    handles = [h for m in twin.modules() for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    try:
        material.judged(twin)
    finally:
        for handle in handles:
            handle.remove()
    outer = {
        id(module)
        for module, above, answers in calls
        if answers and id(module) not in scalars and all(id(m) in scalars for m in above)
    }
    return {path: module for path, module in twin.named_modules() if id(module) in outer}


@dataclass
class _Constant:
    """Stands in for a module's forward: the same structure and shapes, one answer for all samples."""

    real: Callable[..., Any]
    """the forward that it replaces"""
    per_step: bool
    answers: dict[int, nn.Parameter] = field(default_factory=dict)
    """by the tensor's number among the floats of the output; of those that depend on the model's parameters"""
    links: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    templates: dict[Any, Any] = field(default_factory=dict)
    """by the shapes of the input, while no answer exists yet, and where only answers are returned"""
    steps: bool = False
    """whether an answer per step can differ from one for all steps"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = tuple((tuple(t.shape), t.dtype) for t in tensors((args, kwargs)))
        out = self.templates.get(key)
        if out is None or not self.answers:
            with torch.enable_grad():
                out = self.real(*args, **kwargs)
            if not self.answers or all(t.is_floating_point() and t.requires_grad for t in tensors(out)):
                self.templates[key] = out
        numbers = iter(range(1 << 30))
        return _mapped(out, lambda t: self._answer(next(numbers), t))

    def make(self, samples: int | None) -> None:
        """Make the answers from the outputs seen so far. The axis of the samples is the one whose size changed between
        them, or else the first of size `samples`, or else the first."""
        outs = [floating(out) for out in self.templates.values()]
        for number, tensor in enumerate(outs[0] if outs else ()):
            if not tensor.requires_grad or tensor.dim() == 0:
                continue
            shapes = [o[number].shape for o in outs if number < len(o) and o[number].dim() == tensor.dim()]
            changed = [d for d in range(tensor.dim()) if len({shape[d] for shape in shapes}) > 1]
            axis = changed[0] if changed else next((d for d, n in enumerate(tensor.shape) if n == samples), 0)
            link, start = _linked(tensor)
            mean = start.detach().mean(axis, keepdim=True)
            steps = [d for d in range(tensor.dim() - 1) if d != axis]
            self.steps |= any(tensor.shape[d] > 1 for d in steps)
            if steps and not self.per_step:
                mean = mean.mean(steps, keepdim=True)
            self.answers[number], self.links[number] = nn.Parameter(mean.clone()), link
        if any(
            not (t.is_floating_point() and t.requires_grad) for out in self.templates.values() for t in tensors(out)
        ):
            self.templates.clear()

    def towards(self, number: int, tensor: Tensor, share: float) -> Tensor:
        """The answer, and `share` of the way from it to a copy's own."""
        if number not in self.answers:
            return tensor
        with torch.no_grad():
            constant = self._answer(number, tensor)
        return constant + share * (tensor - constant)

    def _answer(self, number: int, like: Tensor) -> Tensor:
        if number not in self.answers:
            return like.detach()
        made = self.links[number](self.answers[number]).to(like.dtype)
        for d in range(made.dim()):
            # Sequences of another length: their own steps of the answer, and its last one beyond.
            if made.shape[d] > 1 and made.shape[d] != like.shape[d]:
                made = made.index_select(
                    d, torch.arange(like.shape[d], device=made.device).clamp(max=made.shape[d] - 1)
                )
        # With the memory layout of the model's own answer, because losses take views of it.
        return torch.empty_like(like, requires_grad=False).copy_(made.expand(like.shape))


@contextmanager
def _standing_in(modules: list[nn.Module], answers: list[_Constant]) -> Iterator[None]:
    for module, answer in zip(modules, answers, strict=True):
        module.forward = answer
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class _Enough(Exception):  # noqa: N818 (nothing went wrong)
    """Ends an optimizer's inner loop."""


def _fit(
    twin: nn.Module, material: Material, answers: list[_Constant], evaluations: int, until: float
) -> Tensor | None:
    """`[G]` losses of the fitted constant; None where no finite loss depends on it."""
    with evaluating(twin):
        material.judged(twin)
        material.fitted(twin)
        for answer in answers:
            answer.make(material.subject.samples)
        parameters = [p for answer in answers for p in answer.answers.values()]
        if not parameters:
            return None
        best, lowest, left = [p.detach().clone() for p in parameters], math.inf, evaluations

        def closure() -> Tensor:
            nonlocal best, lowest, left
            if left == 0 or (left < evaluations and time.perf_counter() > until):
                raise _Enough
            left -= 1
            for p in parameters:
                p.grad = None
            with torch.enable_grad():
                loss = material.fitted(twin)
                if not loss.requires_grad:
                    raise _Enough
                loss.backward(inputs=parameters)
            if float(loss.detach()) < lowest:
                best, lowest = [p.detach().clone() for p in parameters], float(loss.detach())
            return loss.detach()

        def back_to_best() -> None:
            with torch.no_grad():
                for p, value in zip(parameters, best, strict=True):
                    p.copy_(value)

        scale = max([float(p.detach().abs().mean()) for p in parameters] + [1.0])
        newton = torch.optim.LBFGS(parameters, max_iter=20, line_search_fn="strong_wolfe")
        adam = torch.optim.Adam(parameters, lr=0.02 * scale)
        for optimizer, times in ((newton, ROUNDS), (adam, evaluations)):
            back_to_best()
            try:
                for _ in range(times):
                    optimizer.step(closure)
            except _Enough:
                break
            except (RuntimeError, ValueError):
                # The loss takes no such answer, as a distribution no negative scale: Adam's steps are shorter.
                if lowest == math.inf:
                    raise
        if lowest == math.inf:
            return None
        back_to_best()
        losses = material.judged(twin)
    return losses if bool(losses.isfinite().all()) else None


def _linked(tensor: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(function with the range of the output's last activation, its argument for the present output)."""
    node = tensor.grad_fn
    while node is not None and node.name().removesuffix("Backward0").removesuffix("Backward1") in VIEWS:
        node = node.next_functions[0][0] if node.next_functions else None
    name = "" if node is None else node.name()
    if name in ("SoftmaxBackward0", "LogSoftmaxBackward0"):
        # Views may have moved the axis: it is the one along which the present output sums to 1.
        shares = tensor.detach() if name == "SoftmaxBackward0" else tensor.detach().exp()
        axis = next((d for d in reversed(range(tensor.dim())) if _sums_to_one(shares, d)), None)
        if axis is not None:
            link = torch.softmax if name == "SoftmaxBackward0" else torch.log_softmax
            return (lambda z: link(z, axis)), torch.zeros_like(tensor)
    if name in LINKS and "oftmax" not in name:
        return LINKS[name], torch.zeros_like(tensor)
    return (lambda z: z), tensor


def _sums_to_one(shares: Tensor, axis: int) -> bool:
    return shares.shape[axis] > 1 and bool((shares.sum(axis) - 1).abs().max() < 1e-3)


def _mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with its float tensors changed, in the order of `floating`."""
    return mapped(x, lambda t: change(t) if t.is_floating_point() else t)
