"""The subject of a diagnosis: a model together with the batch and loss, or the step, used to train it."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from unvanish.diagnosis.order import axis_of_time
from unvanish.diagnosis.structure import detached_copy, floating, mapped, tensors
from unvanish.diagnosis.trace import COMPARING, traced
from unvanish.nn.accelerate import accelerate, obstacle
from unvanish.nn.layers import EngineSequence
from unvanish.nn.modules import SequenceModule
from unvanish.seeding import seeded

Loss = Callable[..., Tensor]


class Subject:
    """A model and what it is trained on.

    Subject(model, (x,), y, loss_fn)          loss_fn(model(x), y)
    Subject(model, (x,), loss=loss_fn)        loss_fn(model(x))
    Subject(model, step=step)                 step(model)
    Subject(lightning_module, (batch,))       its training_step(batch, 0)
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...] = (),
        target: Any = None,
        loss: Loss | None = None,
        *,
        step: Callable[[nn.Module], Tensor] | None = None,
        has_target: bool | None = None,
    ) -> None:
        self.model, self.inputs, self.target, self.step = model, tuple(inputs), target, step
        self.loss_function = loss
        self.has_target = target is not None if has_target is None else has_target
        self.lightning = step is None and loss is None
        if self.lightning and not hasattr(model, "training_step"):
            raise TypeError(
                "loss: expected a function (output, target) → scalar, or step=, or a LightningModule, got none"
            )
        if step is None and not inputs:
            raise ValueError("batch: expected the model's input and its target")

    def twin(self) -> nn.Module:
        """A deep copy to experiment on, in which tensors of an earlier graph are detached."""
        return detached_copy(self.model)

    def answers(self, model: nn.Module, inputs: tuple[Any, ...], **named: Any) -> list[Tensor]:
        """The floating-point tensors that `model(*inputs, **named)` returns."""
        return floating(model(*inputs, **named))

    def loss(self, model: nn.Module, inputs: tuple[Any, ...] | None = None, target: Any = None) -> Tensor:
        """The loss of this copy, on the subject's own batch or on another; a scalar.

        Raises:
            ValueError: what the loss or the step returned is not a single number.
        """
        if self.step is not None:
            value: Any = self.step(model)
        elif self.lightning:
            value = model.training_step(self._batch(self.inputs if inputs is None else inputs), 0)  # type: ignore[operator]
            value = value["loss"] if isinstance(value, dict) else value
        else:
            assert self.loss_function is not None
            if inputs is None:
                inputs, target = self.inputs, self.target
            output = model(*inputs)
            value = self.loss_function(output, target) if self.has_target else self.loss_function(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: expected a tensor with one number, got {got}; take its mean or sum")
        return value if value.dim() == 0 else value.reshape(())

    @staticmethod
    def _batch(inputs: tuple[Any, ...]) -> Any:
        return inputs[0] if len(inputs) == 1 else inputs

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the model's own call: given, or seen in one pass of the step; ((), {}) if there is none."""
        return (self.inputs, {}) if self._given else self._seen[0]

    @property
    def goals(self) -> list[Tensor]:
        """Tensors of the target: given, or what loss functions compare the answers with in one pass of the step."""
        return tensors(self.target) if self._given else self._seen[1]

    @property
    def _given(self) -> bool:
        """Whether the batch was passed in parts."""
        return self.step is None and not self.lightning

    @cached_property
    def _seen(self) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], list[Tensor]]:
        with self.rng(0):
            done = traced(self.twin(), self.loss, backward=False)
        own = next((c for c in done.trace.modules if c.path == ""), None)
        goals = []
        for call in done.trace.functions:
            target = call.argument(1, "target")
            if not call.inside and call.name in COMPARING and isinstance(target, Tensor) and not target.requires_grad:
                goals.append(target.detach())
        return ((), {}) if own is None else mapped((own.args, own.options), torch.detach), goals

    @cached_property
    def _layout(self) -> tuple[int | None, tuple[int, ...]]:
        """(samples, axes in the order in which they are looked at)"""
        # A training_step may bypass the model's own forward and work on the batch itself.
        items = self.inputs if self.lightning and not any(self.call) else self.call
        packed = _packed(items)
        if packed:
            return int(packed[0].batch_sizes[0]), (0, 1)
        given = [t for t in tensors(items) if t.dim()]
        if not given:
            return None, (0, 1)
        main = max(given, key=lambda t: (t.dim(), t.numel()))
        targets = [t for t in self.goals if t.dim()]
        if not targets and self.goals:
            return None, (0, 1)  # a target without axes: one sample, unbatched
        if not targets:
            targets = [t for t in given if t is not main]
        if main.dim() < 2:
            return (len(main), (0, 1)) if all(len(t) == len(main) for t in targets) else (None, (0, 1))
        scores = {axis: _agreement(main.shape[axis], targets) for axis in (0, 1)}
        if not any(scores.values()):
            # Without a target to compare with, batches come first, unless the first recurrent layer says otherwise.
            axis = 0 if targets and main.dim() < 3 else self._declared_axis
            return (None, (0, 1)) if targets else (main.shape[axis], (axis, 1 - axis))
        best = max(scores, key=lambda axis: (scores[axis], -axis))
        if scores[0] and scores[1]:
            # A time-major batch, and a layer that takes a batch for time-major, look the same but for the data. One
            # target for each sample settles it: that their number is a multiple of the other axis too is an accident.
            open_ = scores[0] == scores[1] or any(t.shape[:2] == main.shape[:2] for t in targets)
            time = axis_of_time(main, targets) if open_ else None
            if time is not None:
                return main.shape[1 - time], (1 - time, time)
            other = self._follows(main.shape[1], (1, 0)) and not self._follows(main.shape[0], (0, 1))
            best = 1 if other else 0 if scores[0] >= scores[1] else best
        return main.shape[best], (best, 1 - best)

    @property
    def _declared_axis(self) -> int:
        layers = [m for m in self.model.modules() if isinstance(m, SequenceModule)]
        return 1 if layers and not layers[0].batch_first else 0

    def _follows(self, samples: int, axes: tuple[int, ...]) -> bool:
        """Whether the answers for a part of the batch are that part of the answers."""
        # Last ones first: the first half of the steps would follow too, as later steps do not change them.
        index = torch.arange(samples - 1, samples // 2 - 1, -1)
        twin = self.twin().eval()
        args, named = self.call
        try:
            with self.rng(0), torch.no_grad():
                whole = self.answers(twin, args, **named)
            twin = self.twin().eval()
            with self.rng(0), torch.no_grad():
                part = self.answers(twin, _taken(args, index, samples, axes), **_taken(named, index, samples, axes))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        expected = [_taken(t, index, samples, axes) for t in whole]
        return all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5)
            for a, b in zip(part, expected, strict=False)
        )

    @property
    def samples(self) -> int | None:
        """The number of samples in the batch; None if no axis agrees among inputs and target."""
        return self._layout[0]

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that are tried as the axis of the samples, in this order."""
        return self._layout[1]

    def rows(self, items: Any, index: Tensor) -> Any:
        """These samples of every tensor with an axis of samples, in the same structure; other tensors unchanged."""
        samples, axes = self._layout
        if samples is None:
            raise ValueError("samples: no axis of the batch was recognised as the samples")
        return _taken(items, index, samples, axes)

    def axis(self, tensor: Tensor) -> int | None:
        """The axis of the samples in this tensor; None if it has none."""
        samples, axes = self._layout
        return None if samples is None else _axis(tensor, samples, axes)

    @contextmanager
    def rng(self, seed: int = 0) -> Iterator[None]:
        """Start random numbers from this seed within the block; afterwards they continue as if none had been drawn."""
        import numpy as np

        devices = {p.device for p in self.model.parameters() if p.device.type not in ("cpu", "cuda", "meta")}
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the user's code draws from it)
        try:
            with ExitStack() as stack:
                for kind in {d.type for d in devices}:
                    here = [d for d in devices if d.type == kind]
                    stack.enter_context(torch.random.fork_rng(devices=here, device_type=kind))
                stack.enter_context(seeded(seed))
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def on_engine(twin: nn.Module) -> nn.Module:
    """This copy, with torch's layers on our engine: the same numbers in less time."""
    for module in list(twin.modules()):
        if isinstance(module, nn.RNNBase) and obstacle(module) is None:
            accelerate(module)
    return twin


def out_of_eval_mode(twin: nn.Module) -> nn.Module:
    """This copy, with its layers on our engine in training mode, since cuDNN's kernels have no backward pass in eval
    mode. Dropout and h_detach, which training mode would draw, are disabled in those that were in eval mode."""
    for module in twin.modules():
        if isinstance(module, EngineSequence) and not module.training:
            module.dropout, module.h_detach = 0.0, None
            module.train()
    return twin


def _agreement(size: int, others: list[Tensor]) -> int:
    """How well the other tensors' axes agree with this number of samples."""
    score = 0
    for other in others:
        if other.shape[0] == size:
            score += 4
        elif other.dim() > 1 and other.shape[1] == size:
            score += 2
        elif size > 1 and other.dim() == 1 and other.shape[0] % size == 0:
            score += 1
    return score


def _axis(tensor: Tensor, samples: int, axes: tuple[int, ...]) -> int | None:
    return next((a for a in axes if a < tensor.dim() and tensor.shape[a] == samples), None)


def _packed(value: Any) -> list[PackedSequence]:
    found: list[PackedSequence] = []

    def note(packed: PackedSequence) -> PackedSequence:
        found.append(packed)
        return packed

    mapped(value, lambda tensor: tensor, note)
    return found


def _taken(items: Any, index: Tensor, samples: int, axes: tuple[int, ...]) -> Any:
    """These samples; a list of one entry per sample and tensors in which the samples are folded with the steps too."""
    if isinstance(items, list) and len(items) == samples and all(_axis_free(t, samples, axes) for t in items):
        return [items[i] for i in index.tolist()]
    exact = any(_axis(t, samples, axes) is not None for t in tensors(items)) or bool(_packed(items))

    def take(tensor: Tensor) -> Tensor:
        axis = _axis(tensor, samples, axes)
        if axis is not None:
            return tensor.index_select(axis, index.to(tensor.device))
        if exact or tensor.dim() == 0 or samples < 2 or tensor.shape[0] % samples:
            return tensor
        shape = (samples, -1) if axes[0] == 0 else (-1, samples)
        unfolded = tensor.unflatten(0, shape)
        return unfolded.index_select(axes[0], index.to(tensor.device)).flatten(0, 1)

    def repack(packed: PackedSequence) -> PackedSequence:
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        few = padded[index.to(padded.device)]
        return pack_padded_sequence(few, lengths[index.cpu()], batch_first=True, enforce_sorted=False)

    return mapped(items, take, repack)


def _axis_free(value: Any, samples: int, axes: tuple[int, ...]) -> bool:
    return not isinstance(value, Tensor) or _axis(value, samples, axes) is None
