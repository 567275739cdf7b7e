"""Changes worth trying on a copy: each candidate is one hypothesis about why the model does not learn."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from unvanish import cures, torch_internals
from unvanish import nn as layers
from unvanish.cures.replace import REPLACEABLE
from unvanish.diagnosis.interventions.inputs import Fed
from unvanish.diagnosis.interventions.optimizers import Recipe, other_rates, usual_rate
from unvanish.diagnosis.interventions.standardise import standardise_
from unvanish.diagnosis.plan import Step
from unvanish.nn.layers import EngineSequence
from unvanish.nn.modules import RecurrentModule, SequenceModule, cell_of
from unvanish.seeding import seeded

Kind = Literal["as_is", "rate", "clip", "radius", "depth", "reach", "input", "regularisation", "capacity"]

RADIUS = 1.2
"""spectral radius of W_hh above which a smaller one is tried"""
DROPOUT, DECAY = 0.6, 0.1
"""a probability of dropout, and a weight decay, above which regularisation is a suspect"""
FEATURES = 32
"""of an input whose means and spreads are written into a plan one by one"""


@dataclass(frozen=True)
class Candidate:
    """One hypothesis: changes to the model, to its optimizer, or both."""

    name: str
    """in the words of a practitioner: "chrono_(max_lag=100)" """
    kind: Kind
    steps: tuple[Step, ...] = ()
    lr: float | None = None
    """None: the recipe's own"""
    adam: bool = False
    """whether the optimizer is exchanged for Adam"""
    decay: bool = True
    """whether the optimizer's weight decay stays"""
    clip: float | None = None
    """bound on the norm of the whole gradient"""
    suspect: bool = False
    """whether an uncommon setting makes it likely before any trial, so that it is tried first and at length"""

    def recipe(self, own: Recipe) -> Recipe:
        """The optimizer it is trained with."""
        made = own if self.decay else own.without_decay()
        if self.adam:
            return made.as_adam(self.lr if self.lr is not None else made.lr)
        return made if self.lr is None else made.at(self.lr)

    def applied(self, model: nn.Module) -> nn.Module:
        """The model with every change made to it."""
        for step in self.steps:
            if step.act is not None:
                model = step.act(model)
        return model

    def with_rate(self, lr: float) -> "Candidate":
        """The same at another learning rate."""
        return replace(self, name=f"{self.name}, learning rate {lr:.2g}", lr=lr, suspect=False)

    def plan_steps(self, own: Recipe) -> tuple[Step, ...]:
        """Its changes, with the training's as the last."""
        steps = list(self.steps)
        if self.lr is not None or self.adam or not self.decay:
            made = self.recipe(own)
            says = f"train with {made.name} at a learning rate of {made.lr:.2g}"
            steps.append(Step(says + ("" if self.decay else ", without weight decay"), made.code()))
        elif steps:
            made = self.recipe(own)
            steps.append(Step("create the optimizer again, from the changed model's parameters", made.code()))
        if self.clip is not None:
            if not steps:
                steps.append(Step("the optimizer stays unchanged", own.code()))
            steps.append(
                Step(f"clip the norm of the gradient at {self.clip:g} before every update", _CLIP.format(self.clip))
            )
        return tuple(steps)


AS_IS = Candidate("as it is", "as_is")

_CLIP = """def clip_gradient(optimizer, args, kwargs):
    torch.nn.utils.clip_grad_norm_(model.parameters(), {:g})
optimizer.register_step_pre_hook(clip_gradient)"""


_NO_DROPOUT = """for module in model.modules():
    if isinstance(module, torch.nn.RNNBase):
        module.dropout = 0.0
    elif "Dropout" in type(module).__name__:
        module.p = 0.0"""


def rates(recipe: Recipe) -> list[Candidate]:
    """Other learning rates, and Adam where the user has another optimizer."""
    usual = usual_rate(recipe)
    found = [Candidate(f"learning rate {lr:.2g}", "rate", lr=lr, suspect=lr == usual) for lr in other_rates(recipe)]
    if not recipe.name.endswith(("Adam", "AdamW")):
        adam = Candidate("Adam, learning rate 0.003", "rate", lr=3e-3, adam=True, suspect=usual is not None)
        found.append(adam)
    return found


def clipped() -> Candidate:
    """Norm clipping at 1."""
    return Candidate("gradient clipping at 1", "clip", clip=1.0)


def unregularised(model: nn.Module, recipe: Recipe) -> list[Candidate]:
    """Candidates without dropout and without weight decay, where there is any."""
    found = []
    if any(_dropouts(m) for m in model.modules()):
        step = Step("switch dropout off", _NO_DROPOUT, _without_dropout)
        much = any(_dropouts(m, DROPOUT) for m in model.modules())
        found.append(Candidate("without dropout", "regularisation", (step,), suspect=much))
    if recipe.weight_decay > 0:
        much = recipe.weight_decay > DECAY
        found.append(Candidate("without weight decay", "regularisation", decay=False, suspect=much))
    return found


def _dropouts(module: nn.Module, above: float = 0.0) -> list[str]:
    """Which attributes of the module are a probability of dropout above this."""
    if not isinstance(module, SequenceModule | torch_internals.Dropout):
        return []
    return [name for name in ("p", "dropout") if vars(module).get(name, 0.0) > above]


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name in _dropouts(module):
            setattr(module, name, 0.0)
    return model


def of_reach(model: nn.Module, lag: int, seed: int) -> list[Candidate]:
    """Cures that let the gradient of every recurrent module reach over `lag` steps, the most promising first."""
    gated, plain = _recurrent(model)
    if not gated and not plain:
        return []
    longest = float(max(2, lag + 1))
    found: list[Candidate] = []
    everywhere = _paths(model, [*gated, *plain])
    if plain and _replaceable(model):
        gates = _carrying({**gated, "": nn.GRUCell(1, 1)})
        chrono = (_chrono(path, longest, seed, gates) for path in everywhere)
        name = f"gated successor with chrono_(max_lag={longest:g})"
        found.append(Candidate(name, "reach", (_replaced(plain, seed), *chrono)))
    if gated:
        chrono = (_chrono(path, longest, seed, _carrying(gated)) for path in _paths(model, [*gated]))
        found.append(Candidate(f"chrono_(max_lag={longest:g})", "reach", tuple(chrono)))
    orthogonal = tuple(_orthogonal(path, seed) for path in everywhere)
    # Of matrices that are too large these are the same cure as a smaller radius.
    kind: Kind = "radius" if any(_radius(m) > RADIUS for m in plain.values()) else "reach"
    relu = plain and not gated and all(cell_of(m).rectifies for m in plain.values())
    if relu:
        found.append(Candidate("identity_()", kind, tuple(_identity(path) for path in everywhere)))
    if gated and not plain:
        value = round(math.log(max(lag, 2)), 2)
        bias = tuple(_forget_bias(path, value, _carrying(gated)) for path in everywhere)
        found.append(Candidate(f"forget_bias_({value:g})", "reach", bias))
    found.append(Candidate("orthogonal_()", kind, orthogonal))
    return found


def of_growth(model: nn.Module) -> list[Candidate]:
    """A smaller spectral radius, where one exceeds `RADIUS`."""
    steps = [
        Step(
            f"bring the spectral radius of W_hh{f' of {path}' if path else ''} down to 1",
            f"uv.cures.spectral_radius_({_where(path)}, 1.0)",
            _at(path, lambda m: cures.spectral_radius_(m, 1.0)),
        )
        for path, module in _all(model).items()
        if not is_parametrized(module) and _radius(module) > RADIUS
    ]
    return [Candidate("spectral_radius_(1)", "radius", tuple(steps))] if steps else []


def of_input(model: nn.Module, found: dict[str, Fed]) -> list[Candidate]:
    """Standardised inputs, where they are off scale."""
    modules = _all(model)
    steps = [_standardised(path, entry) for path, entry in found.items() if path in modules and entry.off_scale]
    return [Candidate("standardised inputs", "input", tuple(steps))] if steps else []


Modules = dict[str, RecurrentModule]


def _all(model: nn.Module) -> Modules:
    return {p: m for p, m in model.named_modules() if isinstance(m, RecurrentModule)}


def _recurrent(model: nn.Module) -> tuple[Modules, Modules]:
    """(gated, plain) modules that a cure can be written into."""
    gated: Modules = {}
    plain: Modules = {}
    for path, module in _all(model).items():
        if not is_parametrized(module):
            cell = cell_of(module)
            if not cell.carries:
                plain[path] = module
            elif module.bias and cell.carry_gate is not None:
                gated[path] = module
    return gated, plain


def _paths(model: nn.Module, paths: list[str]) -> list[str]:
    """Where to write a cure of these modules: into the model as a whole where they are all that it has."""
    return [""] if len(paths) == len(_all(model)) else paths


def _replaceable(model: nn.Module) -> bool:
    """Whether every plain RNN of the model can have a gated successor: it is torch's or ours, as it was made."""
    plain = [m for m in _all(model).values() if not cell_of(m).carries]
    return all(type(m) in REPLACEABLE and not is_parametrized(m) and not hooked(m) for m in plain)


def hooked(m: nn.Module) -> bool:
    """Whether replacing this module would lose hooks."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def _where(path: str) -> str:
    return f'model.get_submodule("{path}")' if path else "model"


def _at(path: str, act: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """The change of one submodule, in place."""

    def change(model: nn.Module) -> nn.Module:
        act(model.get_submodule(path))
        return model

    return change


def _drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _carrying(modules: Modules) -> str:
    """The gates that carry their memory, in words: "forget gates", "forget gates and update gates"."""
    return " and ".join(dict.fromkeys(f"{cell_of(m).carry_title}s" for m in modules.values()))


def _chrono(path: str, longest: float, seed: int, gates: str) -> Step:
    return Step(
        f"spread the time constants of the {gates} over {longest:g} steps",
        f"uv.cures.chrono_({_where(path)}, max_lag={longest:g}, generator=torch.Generator().manual_seed({seed}))",
        _at(path, lambda m: cures.chrono_(m, max_lag=longest, generator=_drawn(seed))),
    )


def _forget_bias(path: str, value: float, gates: str) -> Step:
    return Step(
        f"start the {gates} at a bias of {value:g}",
        f"uv.cures.forget_bias_({_where(path)}, {value:g})",
        _at(path, lambda m: cures.forget_bias_(m, value)),
    )


def _orthogonal(path: str, seed: int) -> Step:
    return Step(
        "make the recurrent matrices orthogonal, so that they keep a gradient's length",
        f"uv.cures.orthogonal_({_where(path)}, generator=torch.Generator().manual_seed({seed}))",
        _at(path, lambda m: cures.orthogonal_(m, generator=_drawn(seed))),
    )


def _identity(path: str) -> Step:
    return Step(
        "start the relu units as integrators: W_hh = I, biases 0",
        f"uv.cures.identity_({_where(path)})",
        _at(path, cures.identity_),
    )


def _replaced(plain: Modules, seed: int) -> Step:
    ours = any(isinstance(m, EngineSequence) for m in plain.values())
    given = "uv.restore(model)" if ours else "model"

    def act(model: nn.Module) -> nn.Module:
        with seeded(seed):
            return cures.replace_(layers.restore(model) if ours else model, "gru")

    names = ", ".join(path or "the model" for path in plain)
    return Step(
        f"replace the plain RNN ({names}) by a GRU with the same interface",
        f'torch.manual_seed({seed})\nmodel = uv.cures.replace_({given}, "gru")',
        act,
    )


def _radius(module: nn.Module) -> float:
    """The largest over its layers' and gates' square blocks of W_hh; 0 where there is none that is finite."""
    matrices = [w.detach() for n, w in module.named_parameters(recurse=False) if n.startswith("weight_hh")]
    square = [w for w in matrices if w.dim() == 2 and w.shape[0] % w.shape[1] == 0 and bool(w.isfinite().all())]
    blocks = [block for w in square for block in w.double().split(w.shape[1])]
    return max((float(torch.linalg.eigvals(block).abs().max()) for block in blocks), default=0.0)


def _standardised(path: str, entry: Fed) -> Step:
    mean, spread = entry.mean, entry.spread
    if len(mean) > FEATURES:
        everywhere = float((spread.square() + (mean - mean.mean()).square()).mean().sqrt())
        mean, spread = mean.mean().expand(1), torch.tensor([everywhere])
    means, spreads = ([float(f"{v:.4g}") for v in values.tolist()] for values in (mean, spread))
    return Step(
        f"standardise the input of {path or 'the model'}; here by a hook before the module, better once in the data",
        "from unvanish.diagnosis.interventions.standardise import standardise_\n"
        f"standardise_({_where(path)}, mean={means}, spread={spreads})",
        _at(path, lambda m: standardise_(m, means, spreads)),
    )
