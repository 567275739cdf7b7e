"""Shared by the exact tests: a float64 copy in eval mode, some samples, and passes of the copy on changed inputs."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.diagnosis.structure import detached_copy, floating, mapped, tensors
from unvanish.diagnosis.subject import Subject, on_engine, out_of_eval_mode
from unvanish.diagnosis.trace import Pass, Trace, double, traced
from unvanish.nn.modules import RecurrentModule

SAMPLES, FEW = (12, 13, 11, 14, 10, 15, 9, 16), (6, 7, 5, 8)
"""the number of perturbed samples, and that for very long sequences: the first one that no other axis has, so that
their axis is unambiguous"""
VERY_LONG = 4096
"""steps beyond which fewer samples are perturbed, and fewer steps exchanged"""
EXCHANGED = 3
"""the samples of a very long sequence whose steps are exchanged"""
RECURRENT = RecurrentModule
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs) of the model"""


class Bench:
    """Copies of the subject's model to experiment on."""

    def __init__(self, subject: Subject, lag: int | None = None) -> None:
        self.subject, self.lag = subject, lag
        self.notes: list[str] = []

    @cached_property
    def training(self) -> Pass:
        """A training pass as the user would run it: own dtype, own mode, own kernels, whole batch."""
        with self.subject.rng(0):
            # Bitwise the user's: a loss may be singular exactly where it lands.
            done = traced(self.subject.twin(), self.subject.loss)
        if done.error is not None:
            # A failure of the user's own pass is reported; one caused by observing it is not.
            with self.subject.rng(0), torch.enable_grad():
                value = self.subject.loss(self.subject.twin())
                if value.requires_grad:
                    value.backward()
            self.notes.append(f"the training pass could not be watched ({type(done.error).__name__}: {done.error})")
        return done

    @cached_property
    def count(self) -> int | None:
        """The number of samples used; None where the batch has no axis of samples."""
        n = self.subject.samples
        if n is None:
            return None
        sizes = {size for t in tensors(self.subject.call) for a, size in enumerate(t.shape) if a != self._axis_in(t)}
        sizes |= {size for t in self.training.answers for a, size in enumerate(t.shape) if a != self._axis_in(t)}
        wanted = FEW if self._steps_given > VERY_LONG else SAMPLES
        number = next((k for k in wanted if k < n and k not in sizes), n)
        return number if number == n or self._takes(number) else n

    @property
    def _steps_given(self) -> int:
        """The steps of the largest sequence of the batch; 0 where there is none."""
        packed: list[int] = []
        mapped(self.subject.call, lambda t: t, lambda p: packed.append(len(p.batch_sizes)) or p)
        found = [t for t in tensors(self.subject.call[0]) if t.dim() > 1 and self._axis_in(t) in (0, 1)]
        main = max(found, key=lambda t: (t.dim() > 2, t.numel()), default=None)
        return max([*packed, 0 if packed or main is None else main.shape[1 - self._axis_in(main)]])

    def _takes(self, samples: int) -> bool:
        """Whether the model runs on a part of the batch: a kept state may fix its size."""
        try:
            args, named = self.subject.rows(self.subject.call, torch.arange(samples))
            with torch.no_grad(), self.subject.rng(0):
                self.twin().eval()(*args, **named)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return False
        return True

    def _axis_in(self, tensor: Tensor) -> int:
        axis = self.subject.axis(tensor)
        return -1 if axis is None else axis

    @cached_property
    def given(self) -> Arguments:
        """These samples."""
        return self.cast(self._given)

    @cached_property
    def _given(self) -> Arguments:
        whole = self.subject.call
        return whole if self.count is None else self.subject.rows(whole, torch.arange(self.count))

    def taken(self, index: Tensor) -> Arguments:
        """These samples of the whole batch."""
        return self.cast(self.subject.rows(self.subject.call, index))

    def cast(self, value: Any) -> Any:
        """The arguments in the precision of `model`."""
        return double(value) if self.in_double else value

    @cached_property
    def in_double(self) -> bool:
        """Whether the model runs in float64 at all; some make float32 tensors of their own."""
        try:
            args, named = double(self._given)
            with torch.no_grad(), self.subject.rng(0):
                self.twin().eval().double()(*args, **named)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        return True

    @cached_property
    def model(self) -> nn.Module:
        """The copy from which passes start: eval mode, float64 where possible, torch's layers on our engine."""
        twin = self.twin().eval()
        return twin.double() if self.in_double else twin

    def twin(self) -> nn.Module:
        """A copy in the user's own mode and precision, torch's layers on our engine."""
        return on_engine(self.subject.twin())

    @property
    def tolerance(self) -> float:
        """The relative change from which an answer counts as moved."""
        return 1e-10 if self.in_double else 1e-4

    def run(self, given: Arguments | None = None, *, train: bool = False) -> list[Tensor]:
        """The answers of a fresh copy, without a graph; equal inputs give equal answers."""
        if given is None and not train:
            return self._own_answers
        args, named = self.given if given is None else given
        twin = detached_copy(self.model).train(train)
        with torch.no_grad(), self.subject.rng(0):
            return [t.detach() for t in floating(twin(*args, **named))]

    @cached_property
    def _own_answers(self) -> list[Tensor]:
        return self.run(self.given)

    def evaluation(self, given: Arguments | None = None) -> Trace:
        """A pass of a fresh copy in eval mode, without a graph, seen from outside."""
        if given is None:
            return self._own_evaluation
        twin = detached_copy(self.model)
        with torch.no_grad(), self.subject.rng(0), Trace(twin) as trace:
            twin(*given[0], **given[1])
        return trace

    @cached_property
    def _own_evaluation(self) -> Trace:
        return self.evaluation(self.given)

    def gradients_at(
        self, given: Arguments, scalar: Callable[[list[Tensor]], Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(entries, gradients) of a scalar of the answers at the floating-point inputs, or at what embeddings make of
        the others."""
        twin = out_of_eval_mode(detached_copy(self.model))
        entries: list[Tensor] = []

        def enter(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            tensor = tensor.detach().clone().requires_grad_()
            entries.append(tensor)
            return tensor

        args, named = mapped(given[0], enter), mapped(given[1], enter)

        def embedded(_: nn.Module, __: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not torch.is_grad_enabled():
                return output
            shifted = output.detach().requires_grad_() if not output.requires_grad else output
            shifted.retain_grad()
            entries.append(shifted)
            return shifted

        for module in twin.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(embedded)
        with torch.enable_grad(), self.subject.rng(0):
            value = scalar(floating(twin(*args, **named)))
            if not value.requires_grad:
                return entries, [torch.zeros_like(e) for e in entries]
            got = torch.autograd.grad(value, entries, allow_unused=True) if entries else ()
        return entries, [torch.zeros_like(e) if g is None else g for e, g in zip(entries, got, strict=True)]

    def by_sample(self, tensor: Tensor, count: int | None = None) -> list[Tensor]:
        """The possible readings `[samples, …]` of an output: several where samples and steps are folded into an axis,
        none where it has no axis of samples."""
        count = self.count if count is None else count
        if count is None or tensor.dim() == 0:
            return []
        order = self.subject.axes
        for axis in (a for a in order if a < tensor.dim()):
            if tensor.shape[axis] == count:
                return [tensor.movedim(axis, 0).reshape(count, -1)]
        if tensor.dim() > 2 and tensor.shape[2] == count:
            return [tensor.movedim(2, 0).reshape(count, -1)]
        # Other multiples are not steps: the data of packed answers has as many rows as the lengths sum to.
        if count > 1 and tensor.shape[0] in (count * s for s in (self.steps - 1, self.steps, self.steps + 1) if s > 1):
            folded = tensor.unflatten(0, (count, -1)).reshape(count, -1)
            return [folded, tensor.unflatten(0, (-1, count)).movedim(1, 0).reshape(count, -1)]
        return []

    @cached_property
    def samples_outer(self) -> bool:
        """Whether answers in which samples and steps are one axis hold all steps of a sample one after the other."""
        k = self.count or 1
        index = torch.arange(k)
        index[0] = 1 % k
        for was, now in zip(self.run(), self.run(self.taken(index)), strict=False):
            if was.shape != now.shape or was.dim() == 0 or was.shape[0] <= k or was.shape[0] % k:
                continue
            steps = was.shape[0] // k
            moved = (was - now).abs().reshape(k * steps, -1).amax(1) > 0
            if bool(moved.any()):
                return not bool(moved[steps:].any())
        return self.subject.axes[0] == 0

    @cached_property
    def sequence(self) -> tuple[int, int, int] | None:
        """(which of the input's tensors, its axis of samples, its axis of steps) of the main sequence; None if there
        is none."""
        found = tensors(self.given[0])
        if self.count is None or not found:
            return None
        best = max(
            range(len(found)),
            key=lambda i: (found[i].dim() >= 3, found[i].dim() >= 2, found[i].numel()),
        )
        main = found[best]
        if main.dim() < 2:
            return None
        axis = next((a for a in self.subject.axes if a < main.dim() and main.shape[a] == self.count), None)
        if axis is None or axis > 1:
            return None
        return best, axis, 1 - axis

    @property
    def steps(self) -> int:
        """The number of steps of the main sequence; 0 without one."""
        if self.sequence is None:
            return 0
        which, _, axis = self.sequence
        return tensors(self.given[0])[which].shape[axis]

    def steps_of(self, which: int | None) -> int:
        """The number of steps of this input tensor, or of the main sequence."""
        if which is None or self.sequence is None:
            return self.steps
        return tensors(self.given[0])[which].shape[self.sequence[2]]

    def with_step(self, t: int, donor: Tensor, which: int | None = None) -> Arguments:
        """These samples, with step t of the main sequence, or of this input tensor, taken from other samples."""
        return self.with_steps(self.given, [t] * len(donor), donor, which)

    def with_steps(self, given: Arguments, steps: list[int], donor: Tensor, which: int | None = None) -> Arguments:
        """These inputs, with a step of each sample's own of the main sequence, or of this input tensor, taken from
        other samples of `given`."""
        assert self.sequence is not None
        main, samples, time = self.sequence
        which = main if which is None else which
        number = -1

        def change(tensor: Tensor) -> Tensor:
            nonlocal number
            number += 1
            if number != which:
                return tensor
            changed = tensor.clone()
            rows, others = changed.movedim((samples, time), (0, 1)), tensor.movedim((samples, time), (0, 1))
            own = torch.arange(len(steps), device=tensor.device)
            at = torch.tensor(steps, device=tensor.device)
            rows[own, at] = others[donor.to(tensor.device), at]
            return changed

        return mapped(given[0], change), given[1]

    def differs_at(self, t: int) -> bool:
        """Whether the inputs of the samples whose steps are exchanged differ at step t of the main sequence."""
        assert self.sequence is not None
        which, samples, steps = self.sequence
        at = tensors(self.given[0])[which].select(steps, t).movedim(samples - (steps < samples), 0)
        return bool((at[: self.exchanged] != at[:1]).any())

    def at_step(self, tensor: Tensor, t: int, steps: int | None = None) -> Tensor | None:
        """The answers at this step, where an output has an axis as long as `steps` or the main sequence; else None."""
        if self.sequence is None or tensor.dim() < 2:
            return None
        steps = self.steps if steps is None else steps
        # Classes may be as many as the steps.
        orders = ((0, 2),) if tensor.shape[1:] in self.classes_second else ((0, 1), (1, 0), (0, 2))
        for samples, time in orders:
            if time < tensor.dim() and tensor.shape[samples] == self.count and tensor.shape[time] == steps:
                return tensor.select(time, t)
        return None

    @cached_property
    def classes_second(self) -> set[torch.Size]:
        """Shapes, without the samples, of answers `[samples, classes, steps]` that cross-entropy takes as they are."""
        given = [
            x for call in self.training.trace.functions
            if call.name in ("cross_entropy", "nll_loss") and isinstance(x := call.argument(0, "input"), Tensor)
        ]  # fmt: skip
        return {
            a.shape[1:] for a in self.training.answers for x in given
            if a.dim() > 2 and x.shape == a.shape and x.stride() == a.stride() and x.data_ptr() == a.data_ptr()
        }  # fmt: skip

    def last_answers(self, answers: list[Tensor]) -> Tensor:
        """A fixed random mixture of the answers, of those at the last step where there are several."""
        parts = []
        for number, tensor in enumerate(answers):
            last = self.at_step(tensor, self.steps - 1)
            part = tensor if last is None else last
            mix = torch.rand(part.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64) + 0.5
            parts.append((part * mix.to(part)).sum())
        return torch.stack(parts).sum()

    @cached_property
    def asked(self) -> list[Tensor | None]:
        """∂E/∂answer of the training pass, whole batch; None for an answer that the loss does not use."""
        done = self.training
        if done.loss is None or not done.loss.requires_grad:
            return [None] * len(done.answers)
        used = [a for a in done.answers if a.requires_grad]
        got = iter(torch.autograd.grad(done.loss, used, retain_graph=True, allow_unused=True) if used else ())
        return [next(got) if a.requires_grad else None for a in done.answers]

    @cached_property
    def reach(self) -> tuple[Tensor, Tensor] | None:
        """‖∂ans/∂x_t‖ per sample and step, `[samples, steps]`, and |Δans| when step t is exchanged, `[samples, steps]`,
        along all paths; for the last step's answers. None where it is unknown."""
        if self.sequence is None or self.steps < 2 or not (base := self.run()):
            return None
        _, samples, steps = self.sequence
        entries, got = self.gradients_at(self.given, self.last_answers)
        T, k = self.steps, self.count or 0
        norms = torch.zeros(k, T, dtype=torch.float64)
        seen = False
        for entry, gradient in zip(entries, got, strict=True):
            for axes in ((samples, steps), (1 - samples, 1 - steps)):
                if entry.dim() >= 2 and entry.shape[axes[0]] == k and entry.shape[axes[1]] == T:
                    by_step = gradient.movedim(axes, (0, 1)).reshape(k, T, -1).double().cpu()
                    norms += by_step.abs().amax(-1)
                    seen = True
                    break
        if not seen:
            return None
        moved = torch.zeros(k, T, dtype=torch.float64)
        scale = [t.abs().mean().clamp_min(1e-30) for t in base]
        # A pass holds `together` copies of each of these samples, each copy with another step exchanged. They stay in
        # order: the lengths of samples may have to be sorted.
        together = k // self.exchanged
        own = (torch.arange(k) // together).clamp_max(self.exchanged - 1)
        number, donor = torch.arange(k) - own * together, (own - 1) % self.exchanged * together
        given = self.given
        if together > 1:
            given = self.taken(own)
            base = self.run(given)
        for first in range(0, len(self.probed), together):
            some = torch.tensor(self.probed[first : first + together])
            at = some[number.clamp_max(len(some) - 1)]
            changed = self.run(self.with_steps(given, at.tolist(), donor))
            for was, now, size in zip(base, changed, scale, strict=False):
                a, b = self.at_step(was, T - 1), self.at_step(now, T - 1)
                if a is None or b is None:
                    a, b = was, now
                rows = self.by_sample(((a - b) / size).abs())
                if rows:
                    before, found = moved[own, at], rows[0].amax(-1).double().cpu()
                    moved[own, at] = torch.maximum(before, found)
        return norms, moved

    @cached_property
    def exchanged(self) -> int:
        """The number of samples, the first ones, whose steps are exchanged: all of them, or of a very long sequence
        `EXCHANGED`, where no sample's answers depend on the others."""
        k = self.count or 0
        if self.steps <= VERY_LONG or k <= EXCHANGED:
            return k
        index = torch.arange(k)
        index[0] = 1
        for was, now in zip(self.run(), self.run(self.taken(index)), strict=False):
            rows = self.by_sample((was - now).abs()) if was.shape == now.shape else []
            if not rows or float(rows[0][1:].max()) > self.tolerance * float(was.abs().max()):
                return k
        return EXCHANGED

    @cached_property
    def probed(self) -> list[int]:
        """Steps that are exchanged: all of a short sequence, else the last ones and some of the others; half as many of
        a very long one, as each takes a pass over all steps."""
        T = self.steps
        if T <= 24:
            return list(range(T))
        n = 12 if T <= VERY_LONG else 6
        return sorted({*range(T - n, T), *(round(i * (T - 1) / (n - 1)) for i in range(n))})
