"""What a diagnosis says: facts per layer, what to do, and how it went."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from unvanish.diagnosis.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd

LIKELY = 0.5
"""chance of learning from which nothing is prescribed"""
BAD = ("vanishes", "explodes", "chaotic", "saturated", "dead")


@dataclass(frozen=True)
class LayerDiagnosis:
    """One recurrent layer and direction."""

    name: str
    """module path, layer, direction: "encoder.lstm.l0" """
    cell: str
    verdict: Verdict
    cause: str
    """why, in words"""
    rate: float
    """nats per step of ‖∂E_k/∂s_{k−ℓ}‖ over the lag; −∞ where it is zero after one step; NaN where one sample or fewer
    than two steps can't tell it"""
    rate_interval: tuple[float, float]
    """95 %, over samples; NaN for one sample"""
    half_life: float | None
    """steps; None where the error does not fade"""
    reach: int
    """steps: the largest lag at which 1 % of the error at lag 0 is left"""
    lag: int
    """what was asked for, or the longest that the data offer"""
    evidence: dict[str, float]
    curve: tuple[float, ...] = field(repr=False, default=())
    """ln‖∂E_k/∂s_{k−ℓ}‖ relative to lag 0: the median over sources and samples of those that are not 0, times the root
    of their share"""

    @property
    def rate_in_words(self) -> str:
        """The rate in words, with its interval if there is one; "no rate" if it is unknown."""
        if math.isnan(self.rate):
            return "no rate"
        low, high = self.rate_interval
        return f"{self.rate:+.3g} nats per step" + ("" if math.isnan(low) else f" [{low:+.2g}, {high:+.2g}]")


@dataclass(frozen=True)
class Prescription:
    """A cure for one recurrent module, tried on a copy."""

    cure: str
    """"chrono_(max_lag=100)" """
    path: str
    """the module: "encoder.lstm" """
    reason: str
    predicted: dict[str, LayerDiagnosis]
    """what a copy of the model measures after it"""
    act: Callable[[nn.Module], nn.Module] | None = field(repr=False, compare=False, default=None)
    """the module → the cured one (the same, changed in place, or its successor); None: only advice"""
    chance: float | None = None
    """of learning after it; None without a trial"""
    _undo: dict[int, tuple[nn.Module, Callable[[], None]]] = field(repr=False, compare=False, default_factory=dict)
    """by a model's id, which is its own as long as the model is held"""

    @property
    def heals(self) -> bool:
        """Whether every layer of the copy that can be judged was healthy afterwards."""
        return bool(self.told) and all(d.verdict == "healthy" for d in self.told)

    @property
    def cures_its_module(self) -> bool:
        """Whether every layer of its own module that can be judged was healthy afterwards."""
        own = [d for d in self.told if not self.path or d.name == self.path or d.name.startswith(f"{self.path}.")]
        return bool(own) and all(d.verdict == "healthy" for d in own)

    @property
    def limit(self) -> str:
        """What it leaves undone, to be put behind its reason; "" if it heals, or nothing could be told."""
        if self.heals or not self.told:
            return ""
        if self.cures_its_module:
            return "; cures this module alone"
        return "; does not cure" if self.chance is None else "; does not cure, but is likelier to learn"

    @property
    def told(self) -> list[LayerDiagnosis]:
        """The layers of the copy about which something could be told."""
        return [d for d in self.predicted.values() if d.verdict != "undecided"]

    def apply(self, model: nn.Module) -> nn.Module:
        """Cure the model in place, and return it; where the module itself is `model` and is replaced, its successor.

        Raises:
            ValueError: this is advice that no code can follow, the model has no such module, or it has been applied to
                this model and not been taken back.
        """
        if id(model) in self._undo:
            raise ValueError(f"{self.cure}: was applied to this model already; take it back with undo first")
        if self.act is None:
            raise ValueError(f"{self.cure}: nothing to apply to a model; {self.reason}")
        try:
            module = model.get_submodule(self.path)
        except AttributeError as error:
            raise ValueError(f"model: expected the diagnosed one, with a module {self.path!r}") from error
        before = {name: value.detach().clone() for name, value in module.state_dict().items()}
        cured = self.act(module)
        if cured is module:
            self._undo[id(model)] = model, lambda: _restore(module, before)
            return model
        if not self.path:
            return cured
        _exchange(model, module, cured)
        self._undo[id(model)] = model, lambda: _exchange(model, cured, module)
        return model

    def undo(self, model: nn.Module) -> nn.Module:
        """Take the cure back: the module's weights are bitwise what they were before `apply`, whatever was trained
        since; the other modules keep what they have learnt. The optimizer's own state is left as it is.

        Raises:
            ValueError: it was not applied to this model.
        """
        if id(model) not in self._undo:
            raise ValueError(f"{self.cure}: was not applied to this model, so there is nothing to take back")
        self._undo.pop(id(model))[1]()
        return model


def _restore(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    module.load_state_dict(before)


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In every place, as a module may stand in several."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


@dataclass(frozen=True)
class Verification:
    """The same measurement before and after."""

    before: dict[str, LayerDiagnosis]
    after: dict[str, LayerDiagnosis]

    @property
    def cured(self) -> bool:
        """Whether every layer is healthy now."""
        return all(d.verdict == "healthy" for d in self.after.values())

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per layer: verdict, rate and reach before and after."""
        import pandas as pd

        rows = []
        for name, now in self.after.items():
            was = self.before.get(name)
            row: dict[str, Any] = {"layer": name}
            for when, d in (("before", was), ("after", now)):
                row |= {f"{k}_{when}": None if d is None else getattr(d, k) for k in ("verdict", "rate", "reach")}
            rows.append(row)
        return pd.DataFrame(rows)

    # Looked up by name: drawing stands above measuring.
    def plot(self, ax: Any = None) -> Any:
        """The error over the lag in every layer; returns the matplotlib Axes."""
        return import_module("unvanish.report.plot").diagnosis(self, ax=ax)

    def _repr_html_(self) -> str:
        return import_module("unvanish.report.notebook").card(self)

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {_brief(self.before.get(name))} → {_brief(now)}" for name, now in self.after.items())


@dataclass(frozen=True, repr=False)
class Diagnosis(Mapping[str, LayerDiagnosis]):
    """Layer name → verdict, with what to do about it."""

    layers: dict[str, LayerDiagnosis]
    prescribe: Callable[[], tuple[Prescription, ...]] = field(repr=False, compare=False)
    """tries the cures"""
    measure: Callable[[nn.Module], dict[str, LayerDiagnosis]] = field(repr=False, compare=False)
    """the same measurement, of another state of the model"""
    notes: tuple[str, ...] = ()
    """what recurs in the model and could not be followed, and why"""
    chance: float | None = None
    """of learning in the setting of benchmarks/diagnosis.py; None without a trial, or if all layers are undecided"""
    readable: float | None = None
    """share of the target's variance that a linear read-out finds in the states after the trial; None as there"""

    @cached_property
    def prescriptions(self) -> tuple[Prescription, ...]:
        """The most promising first; none where there is nothing to cure.

        Each cure is tried on a copy of the model as it was diagnosed, when this is asked for first: that takes a
        diagnosis per cure, and with a trial its training.
        """
        return self.prescribe()

    @property
    def healthy(self) -> bool:
        """Nothing to cure: the error arrives in every layer."""
        return not self.notes and all(d.verdict == "healthy" for d in self.layers.values())

    @property
    def nothing(self) -> str:
        """Why there is no prescription; "" if there is one, or too little evidence."""
        if self.prescriptions:
            return ""
        if self.chance is None:
            return "nothing to cure" if self.healthy else ""
        if self.chance < LIKELY:
            return "no cure that was tried raises the chance"
        return "nothing to cure" if self.healthy else "nothing prescribed: it is likely to learn as it is"

    def verify(self, model: nn.Module) -> Verification:
        """Measure again, on the same batch.

        Raises:
            TypeError, ValueError: as `diagnose`.
        """
        return Verification(self.layers, self.measure(model))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per layer, the evidence in columns of its own."""
        import pandas as pd

        names = ("name", "cell", "verdict", "cause", "rate", "half_life", "reach", "lag")
        rows = [{n: getattr(d, n) for n in names} | d.evidence for d in self.layers.values()]
        return pd.DataFrame(rows).rename(columns={"name": "layer"})

    # Looked up by name: drawing stands above measuring.
    def plot(self, ax: Any = None) -> Any:
        """The error over the lag in every layer; returns the matplotlib Axes."""
        return import_module("unvanish.report.plot").diagnosis(self, ax=ax)

    def _repr_html_(self) -> str:
        return import_module("unvanish.report.notebook").card(self)

    def __getitem__(self, name: str) -> LayerDiagnosis:
        if name not in self.layers:
            raise KeyError(f"no layer {name!r} in this diagnosis; it has {', '.join(self.layers)}")
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        lines = []
        for name, d in self.layers.items():
            lines.append(f"{name}: {_brief(d)}, over a lag of {d.lag}")
            lines.append(f"  {d.cause}")
        if self.chance is not None:
            lines.append(f"chance of learning as it is: {self.chance:.0%}")
        lines += [f"{i}. {p.cure}{f' on {p.path}' if p.path else ''}: {p.reason}{_effect(p)}"
                  for i, p in enumerate(self.prescriptions, 1)]  # fmt: skip
        return "\n".join([*lines, *self.notes, *([self.nothing] if self.nothing else [])])


def _effect(p: Prescription) -> str:
    if not p.told:
        return ""
    worst = min(p.told, key=lambda d: (d.verdict == "healthy", d.reach / max(d.lag, 1)))
    return f"{p.limit}; predicted: {_brief(worst)}" + (
        "" if p.chance is None else f", chance of learning {p.chance:.0%}"
    )


def _brief(d: LayerDiagnosis | None) -> str:
    if d is None:
        return "not there"
    if d.verdict == "undecided":
        return d.verdict
    return f"{d.verdict}, {d.rate_in_words}, reach {d.reach}"
