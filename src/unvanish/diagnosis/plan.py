"""A plan: everything to change at once, as code to paste and as a function, with the training that proved it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SETTINGS = ("p", "dropout")
"""plain attributes that a step may change: the probabilities of torch's dropout and recurrent layers"""


@dataclass(frozen=True)
class Step:
    """One change to the model or to its training."""

    says: str
    """what is changed and to what end, in one clause"""
    code: str
    """Python that makes the change to `model`; may rebind it"""
    act: Callable[[nn.Module], nn.Module] | None = field(repr=False, compare=False, default=None)
    """model → changed model, the same one wherever possible; None: concerns the training alone"""


@dataclass(frozen=True)
class Prediction:
    """Lowest loss on samples held out of the training of two copies: one as the model is, one changed by the plan."""

    before: float
    after: float
    bar: float
    """loss of the best constant answer on the same samples"""
    updates: int
    """the most updates that each copy was trained for"""

    def __str__(self) -> str:
        return (
            f"lowest loss on held-out samples within {self.updates} updates: {self.before:.4g} as it is, "
            f"{self.after:.4g} with the plan (best constant answer: {self.bar:.4g})"
        )


@dataclass(frozen=True)
class Plan:
    """What to change, for all modules together; false where there is nothing to do.

    if d.plan:
        print(d.plan.code)
        d.plan.apply(model)
    """

    steps: tuple[Step, ...] = ()
    predicted: Prediction | None = None
    _undo: dict[int, tuple[nn.Module, Callable[[], nn.Module]]] = field(repr=False, compare=False, default_factory=dict)
    """by a model's id, which stays its own as long as the model is held here"""

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def code(self) -> str:
        """The plan as Python code that runs unchanged where `model` is defined; "" if there is nothing to do."""
        if not self.steps:
            return ""
        lines = "\n".join(step.code for step in self.steps)
        imports = [
            line for name, line in (("torch.", "import torch"), ("uv.", "import unvanish as uv")) if name in lines
        ]
        return "\n".join([*imports, "", *(f"# {step.says}\n{step.code}" for step in self.steps)]) + "\n"

    def apply(self, model: nn.Module) -> nn.Module:
        """Make the changes that concern the model, in place, and return it.

        Where the model itself is a recurrent layer that is replaced, its successor is returned. The learning rate and
        the clipping are the training loop's: see `code`.

        Raises:
            ValueError: the plan was applied to this model already and not taken back.
        """
        if id(model) in self._undo:
            raise ValueError("plan: was applied to this model already; take it back with undo first")
        before = _Snapshot(model)
        changed = model
        for step in self.steps:
            if step.act is not None:
                changed = step.act(changed)
        restore = before.restorer()
        self._undo[id(changed)] = changed, restore
        return changed

    def undo(self, model: nn.Module) -> nn.Module:
        """Take the plan back, and return the model as it was before `apply`.

        Replaced modules return; every module that the plan changed gets its own weights back bitwise, whatever was
        trained since. Modules that the plan left alone keep what they have learnt.

        Raises:
            ValueError: the plan was not applied to this model.
        """
        if id(model) not in self._undo:
            raise ValueError("plan: was not applied to this model, so there is nothing to take back")
        return self._undo.pop(id(model))[1]()

    def __str__(self) -> str:
        if not self.steps:
            return "nothing to change"
        lines = [f"{i}. {step.says}" for i, step in enumerate(self.steps, 1)]
        return "\n".join([*lines, *([str(self.predicted)] if self.predicted else []), "", self.code])


class _Snapshot:
    """A snapshot of a model: its modules' children, settings and own tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = list(model.modules())
        self.children = [dict(m._modules) for m in self.modules]
        self.settings = [_settings(m) for m in self.modules]
        self.hooks = [set(m._forward_pre_hooks) for m in self.modules]
        self.tensors = [{n: t.detach().clone() for n, t in _own(m).items()} for m in self.modules]

    def restorer(self) -> Callable[[], nn.Module]:
        """A function that undoes what has changed since the snapshot."""
        children = [(m, was) for m, was in zip(self.modules, self.children, strict=True) if m._modules != was]
        settings = [(m, was) for m, was in zip(self.modules, self.settings, strict=True) if _settings(m) != was]
        tensors = [
            (m, was)
            for m, was in zip(self.modules, self.tensors, strict=True)
            if any(not _same(t, was.get(n)) for n, t in _own(m).items())
        ]
        hooks = [
            (m, new)
            for m, was in zip(self.modules, self.hooks, strict=True)
            if (new := set(m._forward_pre_hooks) - was)
        ]
        model = self.model

        def restore() -> nn.Module:
            for module, was in children:
                module._modules.clear()
                module._modules.update(was)
            for module, new in hooks:
                for key in new:
                    module._forward_pre_hooks.pop(key, None)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
            for module, was in settings:
                for name, value in was.items():
                    setattr(module, name, value)
            with torch.no_grad():
                for module, was in tensors:
                    for name, tensor in _own(module).items():
                        tensor.copy_(was[name])
            return model

        return restore


def _own(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _settings(module: nn.Module) -> dict[str, Any]:
    return {n: v for n in SETTINGS if isinstance(v := vars(module).get(n), int | float)}


def _same(now: Tensor, was: Tensor | None) -> bool:
    """Bitwise, so that a NaN equals itself."""
    if was is None or now.shape != was.shape or now.dtype != was.dtype:
        return False
    return (
        bool(((now == was) | (now.isnan() & was.isnan())).all()) if now.is_floating_point() else torch.equal(now, was)
    )
