"""Gradients observed by hooks in each run of the autograd engine: at sequences, of weights and of parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unvanish import torch_internals
from unvanish.capture.parts import unseen
from unvanish.flow.watched_sequence import Sequence, observable_weights
from unvanish.nn.modules import RecurrentModule

LONGEST_WAIT = 60.0
"""seconds for which a thread waits until another one has measured"""


@dataclass
class BackwardRun:
    """One run of the autograd engine."""

    errors: dict[Sequence, dict[Hashable, Any]] = field(default_factory=dict)
    gradients: dict[Hashable, Tensor] = field(default_factory=dict)
    """weight key → autograd's ∂E/∂W of this run"""
    sums: list[tuple[str, Tensor]] = field(default_factory=list)
    """(parameter, the sum of its gradient): not finite where the gradient is not"""
    differentiable: bool = False
    """whether its gradients are kept as part of a graph (create_graph)"""


class OneAtATime:
    """Lets one thread measure at a time; the others wait, though not for ever: on a GPU they are autograd's threads for
    its devices, which may be needed for what is being measured."""

    def __init__(self, problems: dict[str, str]) -> None:
        self._problems, self._lock = problems, RLock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[bool]:
        """Whether the turn of this thread has come; if not, the problem of `name` says so."""
        alone = self._lock.acquire(timeout=LONGEST_WAIT)
        if not alone:
            self._problems[name] = (
                f"the backward pass of another thread was still being measured after {LONGEST_WAIT:g} seconds, so that "
                "a part was left out; run the passes one after the other, or watch less often (every=)"
            )
        try:
            yield alone
        finally:
            if alone:
                self._lock.release()


class BackwardRuns:
    """The runs that have begun; `finish` is called at the end of each, with None for one that `close` has forgotten."""

    def __init__(self, finish: Callable[[BackwardRun | None], None]) -> None:
        self._finish = finish
        self._begun: dict[int, BackwardRun] = {}
        self.weights: dict[Hashable, tuple[Tensor, RemovableHandle]] = {}
        """key → (weight or parameter, its hook)"""
        self._observed: dict[int, Tensor] = {}
        """leaf weights that need no further hook, by id"""

    def observe_parameters(self, model: nn.Module) -> None:
        """Record for each parameter whether its gradient is finite."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.weights["", name] = (parameter, parameter.register_hook(partial(self._add_sum, name)))

    def observe_weights(self, module: RecurrentModule) -> None:
        """Record ∂E/∂W of the weights that the module's last call used."""
        used = module._flat_weights if isinstance(module, nn.RNNBase) else module._parameters.values()
        if all(w is None or id(w) in self._observed for w in used):
            return
        for key, weight in observable_weights(module).values():
            if weight.requires_grad and not (weight.is_leaf and key in self.weights):
                handle = weight.register_hook(partial(self._add_gradient, key))
                if weight.is_leaf:
                    self.weights[key] = (weight, handle)
        # Held, so that no other weight can get the number.
        self._observed |= {id(w): w for w in used if w is not None and w.is_leaf and w.requires_grad}

    def catch(self, sequence: Sequence, key: Hashable, error: Any) -> None:
        """Record a gradient that arrived at a sequence."""
        errors = self._current().errors.setdefault(sequence, {})
        errors[key] = errors[key] + error if key in errors else error

    def close(self) -> None:
        """Remove the hooks, and forget all runs."""
        for weight, handle in self.weights.values():
            handle.remove()
            if not weight._backward_hooks:
                weight._backward_hooks = None
        self.weights.clear()
        self._observed.clear()
        self._begun.clear()

    def _add_gradient(self, key: Hashable, grad: Tensor) -> None:
        if unseen([grad]) is not None:
            return
        gradients = self._current().gradients
        gradients[key] = gradients[key] + grad if key in gradients else grad

    def _add_sum(self, name: str, grad: Tensor) -> None:
        if unseen([grad]) is not None:
            return
        dtype = torch.promote_types(grad.dtype, torch.float32)
        self._current().sums.append((name, grad.detach().sum(dtype=dtype)))

    def _current(self) -> BackwardRun:
        task = torch_internals.backward_number()
        run = self._begun.get(task)
        if run is None:
            run = self._begun[task] = BackwardRun(differentiable=torch.is_grad_enabled())
            end = partial(self._end, task)
            # autograd drops it at the end, and where a pass fails, whichever thread that happens in.
            finalize(end, self._begun.pop, task, None).atexit = False
            torch_internals.after_backward(end)
        return run

    def _end(self, task: int) -> None:
        self._finish(self._begun.pop(task, None))
