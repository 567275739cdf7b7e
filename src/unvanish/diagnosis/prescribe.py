"""Which cures fit a verdict; each tried on a copy of the model before it is named."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from unvanish import cures
from unvanish import nn as layers
from unvanish.cures.replace import REPLACEABLE
from unvanish.diagnosis.layer_inputs import Given
from unvanish.diagnosis.results import BAD, LayerDiagnosis, Prescription
from unvanish.diagnosis.structure import detached_copy
from unvanish.nn.layers import EngineSequence
from unvanish.nn.modules import RecurrentModule, cell_of, layer_directions
from unvanish.seeding import seeded

Act = Callable[[nn.Module], nn.Module]


class _Candidate(NamedTuple):
    cure: str
    reason: str
    act: Act | None


def prescribe(
    model: nn.Module,
    given: list[Given],
    found: dict[str, LayerDiagnosis],
    measure: Callable[[nn.Module], dict[str, LayerDiagnosis]],
    seed: int,
) -> tuple[Prescription, ...]:
    """Cures for every module with a bad layer: those that heal first, then in order of the least disturbance."""
    untried = _untried(model, given, found, seed)
    advice = [p for p in untried if p.act is None]
    return (*advice, *_best_first(_predicted(p, model, measure) for p in untried if p.act is not None))


def _untried(model: nn.Module, given: list[Given], found: dict[str, LayerDiagnosis], seed: int) -> list[Prescription]:
    """All cures that fit, not yet measured."""
    out: list[Prescription] = []
    for module in given:
        names = {module.name(place) for place in layer_directions(module.layer)}
        own = [d for name, d in found.items() if name in names]
        bad = [d for d in own if d.verdict in BAD]
        if not bad:
            continue
        worst = min(bad, key=lambda d: d.reach / max(d.lag, 1))
        candidates = _candidates(model.get_submodule(module.path), module, worst, seed)
        out += [Prescription(c.cure, module.path, c.reason, {}, c.act) for c in candidates]
    return out


def _predicted(
    p: Prescription, model: nn.Module, measure: Callable[[nn.Module], dict[str, LayerDiagnosis]]
) -> Prescription:
    """The change with its effect on a copy; without the record of its application, which would keep the copy alive."""
    return replace(p, predicted=measure(p.apply(detached_copy(model))), _undo={})


def _best_first(measured: Iterator[Prescription]) -> Iterator[Prescription]:
    """Those that heal, then those that cure their own module, then the others; each by how far the worst layer reaches,
    and among equals the order stays. No more are measured than are taken."""
    others: list[Prescription] = []
    for p in measured:
        if p.heals:
            yield p
        else:
            others.append(p)
    yield from sorted(others, key=lambda p: (not p.cures_its_module, -_left(p)))


def _left(p: Prescription) -> float:
    """How far the worst layer reaches, in tenths of the lag."""
    return min((round(10 * min(1.0, d.reach / max(d.lag, 1))) for d in p.told), default=0)


def _candidates(module: nn.Module, given: Given, worst: LayerDiagnosis, seed: int) -> Iterator[_Candidate]:
    lag = worst.lag
    if worst.cause.startswith("detached"):
        yield _Candidate("longer truncation", f"let the state's graph run over {lag} steps before it is detached", None)
    if worst.cause.startswith("padding"):
        yield _Candidate(
            "pack the sequences", "torch.nn.utils.rnn.pack_padded_sequence, or `lengths=` of unvanish.nn layers: the "
            "gradient then starts at each sample's own last step", None
        )  # fmt: skip
    scale = worst.evidence.get("input_scale", 0.0)
    if worst.verdict == "saturated" and scale > 1 and not is_parametrized(module):
        for inner in _cell_cures(module, worst, seed):
            yield inner._replace(
                cure=f"{inner.cure}, weight_ih / {scale:.3g}",
                reason=f"the input drives the units into saturation: standardise it, or scale W_ih; {inner.reason}",
                act=_both(inner.act, lambda m: _scale_input(m, 1 / scale)),
            )
        return
    yield from _cell_cures(module, worst, seed)


def _both(first: Act | None, second: Act) -> Act:
    return second if first is None else lambda m: second(first(m))


def _cell_cures(module: nn.Module, worst: LayerDiagnosis, seed: int) -> Iterator[_Candidate]:
    """The changes to the recurrence itself."""
    lag = worst.lag

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    if is_parametrized(module):
        yield _Candidate("remove the parametrization", "no cure can be written into weights that are computed", None)
        return
    if not isinstance(module, RecurrentModule) or not module.bias:
        return
    cell = cell_of(module)
    longest = max(2.0, lag + 1.0)
    if worst.verdict in ("explodes", "chaotic"):
        for radius in (1.0, 1.2):
            ends = "ends the growth" if radius == 1 else "a little above 1, for what φ' takes"
            yield _Candidate(f"spectral_radius_({radius})", ends, _with(cures.spectral_radius_, radius))
    elif cell.carries:
        if cell.carry_gate is None:
            return
        spread = f"spreads the {cell.carry_title}s' time constants over the lag"
        yield _Candidate(
            f"chrono_(max_lag={longest:g})", spread, lambda m: cures.chrono_(m, max_lag=longest, generator=drawn())
        )
        value = round(math.log(max(lag, 2)), 2)
        keeps = f"{cell.carry_title}s that keep 1/e over the lag"
        yield _Candidate(f"forget_bias_({value})", keeps, _with(cures.forget_bias_, value))
        return
    elif cell.rectifies:
        yield _Candidate("identity_()", "an integrator: a unit that is on keeps state and error", cures.identity_)
    orthogonal = _Candidate(
        "orthogonal_()", "W_hh then keeps every length", lambda m: cures.orthogonal_(m, generator=drawn())
    )
    if type(module) not in REPLACEABLE:
        yield orthogonal
        return
    # An orthogonal RNN passes the error on as well; a gated one learnt more tasks of benchmarks/diagnosis.py.
    cure = f"replace by a chrono GRU (max_lag={longest:g})"
    yield _Candidate(cure, "a state that is carried, behind the same interface", lambda m: _gru(m, longest, seed))
    yield orthogonal


def _with(cure: Callable[[nn.Module, float], nn.Module], value: float) -> Act:
    return lambda m: cure(m, value)


def _scale_input(module: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.rpartition(".")[2] in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse"):
                weight.mul_(factor)
    return module


def _gru(module: nn.Module, max_lag: float, seed: int) -> nn.Module:
    """The successor of a module; one of unvanish's for a module of unvanish."""
    with seeded(seed):
        ours = isinstance(module, EngineSequence)
        successor = cures.replace_(layers.restore(copy.deepcopy(module)) if ours else module, "gru")
    cures.chrono_(successor, max_lag=max_lag, generator=torch.Generator().manual_seed(seed))
    return layers.accelerate(successor) if ours else successor
