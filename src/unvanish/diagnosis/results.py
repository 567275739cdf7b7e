"""The result of a diagnosis: findings, a measurement per layer, the plan, and the comparison after a change."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.interventions.chance import HORIZON
from unvanish.diagnosis.plan import Plan
from unvanish.diagnosis.verdict import Verdict
from unvanish.extras import extra
from unvanish.flow.files import write_page

if TYPE_CHECKING:
    import pandas as pd

    from unvanish.diagnosis.interventions import Tried

ARRIVED = 0.01
"""fraction of the gradient at lag 0 down to which it counts as reaching"""
BAD = ("vanishes", "explodes", "chaotic", "saturated", "dead")


@dataclass(frozen=True)
class LayerDiagnosis:
    """The measured reach of the gradient in one recurrent layer and direction.

    All values describe ‖∂E_k/∂s_{k−ℓ}‖ over the lag ℓ in steps, relative to its value at ℓ = 0, where s is the state
    that serves as the cell's memory (c for the LSTM, h for the others).
    """

    name: str
    """module path, layer, direction: "encoder.lstm.l0" """
    cell: str
    verdict: Verdict
    cause: str
    """the reasons for the verdict, in words, with the numbers"""
    rate: float
    """slope of ln‖∂E_k/∂s_{k−ℓ}‖ over ℓ, in nats per step; −∞ where nothing remains after one step; NaN for a single
    sample or fewer than two steps"""
    rate_interval: tuple[float, float]
    """95 % confidence interval of the rate over samples; NaN for a single sample"""
    half_life: float | None
    """ln 2 / −rate, in steps; None where the gradient does not fade"""
    reach: int
    """the largest lag, in steps, at which at least 1 % of the gradient remains"""
    lag: int
    """the largest lag measured, in steps: the given one, or the longest in the batch"""
    evidence: dict[str, float]
    """the numbers behind the verdict, by name"""
    curve: tuple[float, ...] = field(repr=False, default=())
    """ln‖∂E_k/∂s_{k−ℓ}‖ relative to ℓ = 0, one value per lag: the median over errors and samples of the values that are
    not 0, times the square root of their share"""

    @property
    def rate_in_words(self) -> str:
        """The rate with its unit and, if known, its interval; "no rate" if it is unknown."""
        if math.isnan(self.rate):
            return "no rate"
        low, high = self.rate_interval
        return f"{self.rate:+.3g} nats per step" + ("" if math.isnan(low) else f" [{low:+.2g}, {high:+.2g}]")


@dataclass(frozen=True)
class Prescription:
    """One change to one recurrent module, measured on a copy."""

    cure: str
    """"chrono_(max_lag=100)" """
    path: str
    """the module: "encoder.lstm" """
    reason: str
    predicted: dict[str, LayerDiagnosis]
    """the measurement of a copy after the change, by layer"""
    act: Callable[[nn.Module], nn.Module] | None = field(repr=False, compare=False, default=None)
    """module → the changed module, which is the same one or its replacement; None: advice without code"""
    _undo: dict[int, tuple[nn.Module, Callable[[], None]]] = field(repr=False, compare=False, default_factory=dict)
    """by a model's id, which stays its own as long as the model is kept here"""

    @property
    def heals(self) -> bool:
        """Whether every layer of the copy with a verdict was healthy afterwards."""
        return bool(self.told) and all(d.verdict == "healthy" for d in self.told)

    @property
    def cures_its_module(self) -> bool:
        """Whether every layer of the changed module with a verdict was healthy afterwards."""
        own = [d for d in self.told if not self.path or d.name == self.path or d.name.startswith(f"{self.path}.")]
        return bool(own) and all(d.verdict == "healthy" for d in own)

    @property
    def limit(self) -> str:
        """What the change does not cure, to append to its reason; "" if it cures all layers, or none has a verdict."""
        if self.heals or not self.told:
            return ""
        if self.cures_its_module:
            return "; cures this module alone"
        return "; does not cure"

    @property
    def told(self) -> list[LayerDiagnosis]:
        """The layers of the copy that have a verdict."""
        return [d for d in self.predicted.values() if d.verdict != "undecided"]

    def apply(self, model: nn.Module) -> nn.Module:
        """Make the change in place and return the model; where `model` itself is the module and is replaced, its
        replacement.

        Raises:
            ValueError: this is advice without code, the model has no such module, or the change has been applied to
                this model already and not been undone.
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
        """Undo `apply`: the module's weights are bitwise what they were before it, whatever was trained since; the
        other modules keep what they have learnt. The optimizer's state is left as it is.

        Raises:
            ValueError: the change was not applied to this model.
        """
        if id(model) not in self._undo:
            raise ValueError(f"{self.cure}: was not applied to this model, so there is nothing to take back")
        self._undo.pop(id(model))[1]()
        return model


def _restore(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    module.load_state_dict(before)


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """In every parent, since a module may be used in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


@dataclass(frozen=True, repr=False)
class Verification:
    """The same diagnosis before and after."""

    earlier: "Diagnosis"
    later: "Diagnosis"

    @property
    def before(self) -> dict[str, LayerDiagnosis]:
        """The layers as they were."""
        return self.earlier.layers

    @property
    def after(self) -> dict[str, LayerDiagnosis]:
        """The layers now."""
        return self.later.layers

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings after the change."""
        return self.later.findings

    @property
    def cured(self) -> bool:
        """Whether a copy learns now; where none was trained, whether nothing is found and every layer is healthy."""
        if self.later.trained:
            return self.later.healthy
        return self.later.healthy and all(d.verdict == "healthy" for d in self.after.values())

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per layer: verdict, rate and reach before and after."""
        with extra("report"):
            import pandas as pd

        rows = []
        for name, now in self.after.items():
            was = self.before.get(name)
            row: dict[str, Any] = {"layer": name}
            for when, d in (("before", was), ("after", now)):
                row |= {f"{k}_{when}": None if d is None else getattr(d, k) for k in ("verdict", "rate", "reach")}
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: Any = None) -> Any:
        """The gradient over the lag in every layer; returns the matplotlib Axes."""
        curves = {f"{name}, before: {d.verdict}": d.curve for name, d in self.before.items()}
        curves |= {f"{name}, after: {d.verdict}": d.curve for name, d in self.after.items()}
        from unvanish import draw

        return draw.over_lag(curves, ax, mark=ARRIVED)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page with both diagnoses: the gradient before and after, what is found now, the later plan; and
        beside it its card, 1200 × 630, as PNG and SVG ("page-card.png").

        Raises:
            OSError: the file can't be written.
        """
        from unvanish.diagnosis.diagnosis_page import verification_page, verification_preview

        write_page(path, verification_page(self), verification_preview(self))

    def _repr_html_(self) -> str:
        from unvanish import draw

        return draw.card(self.plot(), type(self).__name__, repr(self))

    def __repr__(self) -> str:
        codes = [", ".join(dict.fromkeys(f.code for f in d.findings)) or "nothing" for d in (self.earlier, self.later)]
        lines = [f"findings: {codes[0]} → {codes[1]}"]
        lines += [f"{name}: {_brief(self.before.get(name))} → {_brief(now)}" for name, now in self.after.items()]
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class Diagnosis(Mapping[str, LayerDiagnosis]):
    """Findings with their proofs, the measurement of each layer, and the plan; a mapping from layer name to
    measurement."""

    model: str
    """class of the diagnosed model"""
    findings: tuple[Finding, ...]
    """ranked: what keeps the model from learning comes first"""
    layers: dict[str, LayerDiagnosis]
    """how far the gradient reaches in each recurrent layer: a measurement, not a cause"""
    plan: Plan
    """every change at once, as interventions proved it; false where there is nothing to change or nothing was proved"""
    notes: tuple[str, ...]
    """what could not be tested or measured, and why"""
    tried: tuple["Tried", ...]
    """the copies that were trained"""
    chance: float | None
    """probability that the unchanged model learns within `interventions.chance.HORIZON` updates, estimated from the
    training of a copy; None if no copy was trained"""
    prescribe: Callable[[], tuple[Prescription, ...]] = field(repr=False, compare=False)
    """measures single changes that extend the reach"""
    again: Callable[[nn.Module], "Diagnosis"] = field(repr=False, compare=False)
    """changed model → its diagnosis, with the same batch and settings"""

    @cached_property
    def prescriptions(self) -> tuple[Prescription, ...]:
        """Single changes for the layers whose gradient does not reach, the most promising first.

        Each is measured on a copy of the diagnosed model when this is first accessed. They are not trained: `plan` is
        what interventions proved.
        """
        return self.prescribe()

    @property
    def headline(self) -> str:
        """The result in a sentence: that of the first finding."""
        return self.findings[0].says

    @property
    def trained(self) -> bool:
        """Whether any copy was trained."""
        return bool(self.tried)

    @property
    def chance_in_words(self) -> str:
        """A sentence; "" where no copy was trained."""
        if self.chance is None:
            return ""
        percent = "under 1" if self.chance < 0.01 else "over 99" if self.chance > 0.99 else f"{100 * self.chance:.0f}"
        return f"chance that the model as it is learns within {HORIZON} updates: {percent} %"

    @property
    def healthy(self) -> bool:
        """Whether nothing that keeps the model from learning was found."""
        return all(f.severity == "note" for f in self.findings)

    def verify(self, model: nn.Module) -> Verification:
        """Diagnose the changed model, with the same batch, budget and seed.

        Raises:
            TypeError, ValueError: as `diagnose`.
        """
        return Verification(self, self.again(model))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per layer, the evidence in columns of its own."""
        with extra("report"):
            import pandas as pd

        names = ("name", "cell", "verdict", "cause", "rate", "half_life", "reach", "lag")
        rows = [{n: getattr(d, n) for n in names} | d.evidence for d in self.layers.values()]
        return pd.DataFrame(rows).rename(columns={"name": "layer"})

    def plot(self, ax: Any = None) -> Any:
        """The gradient over the lag in every layer; returns the matplotlib Axes."""
        curves = {f"{name}: {d.verdict}": d.curve for name, d in self.layers.items()}
        from unvanish import draw

        return draw.over_lag(curves, ax, mark=ARRIVED)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the diagnosis as one self-contained page: headline, gradient per layer, findings with proofs, plan,
        copies that were trained, layers, notes. It needs neither network nor script. Its card, 1200 × 630, is written
        next to it as PNG and SVG ("page-card.png").

        Raises:
            OSError: the file can't be written.
        """
        from unvanish.diagnosis.diagnosis_page import diagnosis_page, diagnosis_preview

        write_page(path, diagnosis_page(self), diagnosis_preview(self))

    def _repr_html_(self) -> str:
        from unvanish import draw

        return draw.card(self.plot(), type(self).__name__, repr(self))

    def __getitem__(self, name: str) -> LayerDiagnosis:
        if name not in self.layers:
            raise KeyError(f"no layer {name!r} in this diagnosis; it has {', '.join(self.layers) or 'none'}")
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        lines = [repr(finding) for finding in self.findings]
        if self.plan:
            lines += ["plan:", *(f"  {line}" for line in str(self.plan).rstrip().splitlines())]
        lines += [self.chance_in_words] if self.chance_in_words else []
        for name, d in self.layers.items():
            lines.append(f"gradient reach of {name}: {_brief(d)}, over a lag of {d.lag}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _brief(d: LayerDiagnosis | None) -> str:
    if d is None:
        return "not measured"
    if d.verdict == "undecided":
        return d.verdict
    return f"{d.verdict}, {d.rate_in_words}, reach {d.reach}"
