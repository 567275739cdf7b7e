"""The user's optimizer, rebuilt for a copy: the same class, options and parameter groups, with changes.

Groups are remembered by the names of their parameters, so that they can be rebuilt for any copy. A parameter that the
user's optimizer does not hold is not trained in a copy either; one that only a changed copy has (a replaced layer's)
joins the first group.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

USUAL = {
    "Adam": (1e-3, 3e-3, 1e-2),
    "AdamW": (1e-3, 3e-3, 1e-2),
    "NAdam": (1e-3, 3e-3, 1e-2),
    "RAdam": (1e-3, 3e-3, 1e-2),
    "Adamax": (2e-3, 5e-3),
    "RMSprop": (1e-3, 3e-3),
    "Adagrad": (1e-2, 3e-2),
    "SGD": (1e-2, 1e-1),
}
"""learning rates at which each optimizer is commonly used"""
FAR = 5.0
"""a rate that is this many times smaller or larger than all of these is suspect"""
CLOSE = 1.5
"""two rates within this factor count as one"""


@dataclass(frozen=True)
class Recipe:
    """How to make an optimizer for any copy of the model."""

    kind: Callable[..., Optimizer]
    """its class"""
    groups: tuple[tuple[tuple[str, ...], dict[str, Any]], ...]
    """(names of parameters, options)"""
    known: frozenset[str]
    """names of all parameters of the original model"""
    given: bool
    """whether it is the user's, not the default"""

    @property
    def name(self) -> str:
        """Of its class."""
        return getattr(self.kind, "__name__", str(self.kind))

    @property
    def lr(self) -> float:
        """The largest learning rate of its groups."""
        return max(float(options["lr"]) for _, options in self.groups)

    @property
    def weight_decay(self) -> float:
        """The largest weight decay of its groups; 0 where the optimizer has none."""
        return max(float(options.get("weight_decay") or 0.0) for _, options in self.groups)

    def at(self, lr: float) -> "Recipe":
        """The same with every group's rate scaled so that the largest is `lr`."""
        old = self.lr

        def changed(options: dict[str, Any]) -> dict[str, Any]:
            return {**options, "lr": lr if old == 0 else float(options["lr"]) * lr / old}

        return replace(self, groups=tuple((names, changed(options)) for names, options in self.groups))

    def without_decay(self) -> "Recipe":
        """The same without weight decay."""
        groups = ((names, {k: 0.0 if k == "weight_decay" else v for k, v in o.items()}) for names, o in self.groups)
        return replace(self, groups=tuple(groups))

    def as_adam(self, lr: float) -> "Recipe":
        """Adam at `lr` on the same parameters."""
        names = tuple(name for group, _ in self.groups for name in group)
        return replace(self, kind=torch.optim.Adam, groups=((names, {"lr": lr}),))

    def build(self, model: nn.Module) -> Optimizer:
        """An optimizer of a copy's parameters.

        Raises:
            ValueError: none of the copy's parameters is to be trained.
        """
        have = dict(model.named_parameters())
        added = [p for name, p in have.items() if name not in self.known]
        groups = []
        for i, (names, options) in enumerate(self.groups):
            params = [have[name] for name in names if name in have] + (added if i == 0 else [])
            if params:
                groups.append({"params": params, **options})
        if not groups:
            raise ValueError("optimizer: holds none of the model's parameters; make it from model.parameters()")
        return self.kind(groups)

    def code(self) -> str:
        """Python code that builds the optimizer for `model`."""
        where = f"torch.optim.{self.name}"
        if self.kind.__module__.partition(".")[0] != "torch":
            where = f"{self.kind.__module__}.{self.kind.__qualname__}"
        lines = [] if where.startswith("torch.") else [f"import {self.kind.__module__}"]
        if len(self.groups) == 1 and set(self.groups[0][0]) >= self.known:
            return "\n".join([*lines, f"optimizer = {where}(model.parameters(), {self._options(self.groups[0][1])})"])
        shown = ["parameters = dict(model.named_parameters())"]
        shown.append(f"optimizer = {where}([")
        for names, options in self.groups:
            shown.append(f'    {{"params": [parameters[n] for n in {list(names)!r} if n in parameters],')
            shown.append(f"     **dict({self._options(options)})}},")
        shown.append("])")
        new = f"added = [p for n, p in parameters.items() if n not in {sorted(self.known)!r}]"
        more = ["if added:", '    optimizer.add_param_group({"params": added})']
        return "\n".join([*lines, *shown, new, *more])

    def _options(self, options: dict[str, Any]) -> str:
        default = self.kind([nn.Parameter(torch.zeros(1))], lr=1.0).defaults
        kept = {k: v for k, v in options.items() if k != "lr" and k in default and default[k] != v}
        written = ", ".join(f"{k}={v!r}" for k, v in kept.items())
        return f"lr={float(options['lr']):.4g}" + (f", {written}" if written else "")


def recipe(
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None, model: nn.Module, default_lr: float
) -> tuple[Recipe, tuple[str, ...]]:
    """From what the user gave, and notes on what could not be taken over.

    Args:
        optimizer: an optimizer of `model`'s parameters; a function parameters → optimizer, which is called once; or
            None: Adam.
        model: the user's, whose parameters name the groups.
        default_lr: Adam's, for None.

    Raises:
        TypeError: it is none of these, or the function returns no torch.optim.Optimizer.
        ValueError: it holds none of the model's parameters.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    known = frozenset(names.values())
    trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    adam = Recipe(torch.optim.Adam, ((trained, {"lr": default_lr}),), known, given=False)
    if optimizer is None:
        return adam, ()
    made = optimizer
    if not isinstance(made, Optimizer):
        if not callable(made):
            raise TypeError(
                "optimizer: expected a torch.optim.Optimizer, or a function that makes one from parameters, got "
                f"{type(made).__name__}"
            )
        made = made(model.parameters())
        if not isinstance(made, Optimizer):
            raise TypeError(
                f"optimizer: expected the function to return a torch.optim.Optimizer, got {type(made).__name__}"
            )
    if isinstance(made, torch.optim.LBFGS):
        return adam, ("the optimizer is LBFGS, which calls the loss itself: the copies were trained with Adam instead",)
    groups = tuple(
        (
            tuple(names[id(p)] for p in group["params"] if id(p) in names),
            {k: v for k, v in group.items() if k != "params"},
        )
        for group in made.param_groups
    )
    if not any(held for held, _ in groups):
        raise ValueError(
            "optimizer: holds none of the model's parameters; make it from model.parameters() after the model's last "
            "change"
        )
    if any("lr" not in options for _, options in groups):
        return adam, (f"{type(made).__name__} has no learning rate: the copies were trained with Adam instead",)
    return Recipe(type(made), groups, known, given=True), ()


def other_rates(recipe: Recipe) -> list[float]:
    """Learning rates worth a trial besides its own: a third, three times, and the usual ones of its kind."""
    own, rates = recipe.lr, []
    for rate in (own * 3, own / 3, *USUAL.get(recipe.name, ())):
        if rate > 0 and all(not (1 / CLOSE < rate / other < CLOSE) for other in (own, *rates) if other > 0):
            rates.append(rate)
    return rates


def usual_rate(recipe: Recipe) -> float | None:
    """A common rate of its kind, where the user's own is far from all of them; None where it is not."""
    usual = USUAL.get(recipe.name, ())
    if not usual or not recipe.given or min(usual) / FAR < recipe.lr < max(usual) * FAR:
        return None
    return usual[len(usual) // 2]
