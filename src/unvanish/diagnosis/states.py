"""How far the gradient reaches through states outside torch's layers: named by their module, or marked.

Only their autograd graph is known, so there is a rate, a reach and a verdict, but no cause.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from unvanish import flow
from unvanish.capture.named_states import Getter, NamedStates
from unvanish.diagnosis.measure import FRACTION, half_width, middle, slope
from unvanish.diagnosis.results import LayerDiagnosis
from unvanish.diagnosis.subject import Subject, on_engine
from unvanish.diagnosis.verdict import Verdict
from unvanish.flow.state_reach import log_norms_of_states
from unvanish.flow.watcher import marks_go_to

Found = tuple[dict[str, LayerDiagnosis], tuple[str, ...]]


def of_states(subject: Subject, states: Mapping[str, Getter], lag: int | None, samples: int, seed: int) -> Found:
    """(name → its reach, notes on those that could not be measured), from one forward pass of a copy.

    Raises:
        ValueError, TypeError: as `unvanish.watch` of `states`.
    """
    shown: dict[str, list[Tensor]] = {}

    def show(name: str, h: object) -> None:
        if isinstance(h, Tensor):
            shown.setdefault(name, []).append(h)

    twin, problems = on_engine(subject.twin()), dict[str, str]()
    named = NamedStates(twin, states, show, problems)
    with subject.rng(seed), torch.enable_grad(), marks_go_to(show):
        named.open()
        try:
            subject.loss(twin)
        finally:
            named.close()
        found, notes = {}, [f"{name}: not measured: {why}" for name, why in problems.items()]
        notes += [f"{name}: not measured: {why}" for name, why in named.unrecorded.items() if name in states]
        for name, seen in shown.items():
            why = _unusable(seen)
            if why is None:
                curves = log_norms_of_states(seen, seed)[:, :samples].T.cpu()
                if bool((curves.isnan() | (curves == math.inf)).any()):
                    why = "the gradient that comes back to it is NaN or infinite"
                else:
                    found[name] = _diagnosed(name, curves, lag)
            if why is not None:
                notes.append(f"{name}: not measured: {why}")
    return found, tuple(notes)


def _unusable(seen: list[Tensor]) -> str | None:
    if len(seen) < 3:
        return f"its calls in one pass: {len(seen)}; a rate needs at least 3"
    if not seen[-1].requires_grad:
        return (
            f"seen {len(seen)} times, and the last one requires no gradient: a non-differentiable step, detach() or "
            "no_grad()?"
        )
    return None


def _diagnosed(name: str, curves: Tensor, lag: int | None) -> LayerDiagnosis:
    """The reach, from ln‖∂E_T/∂h_{T−ℓ}‖ relative to lag 0 `[B, T]`."""
    offered = curves.shape[1] - 1
    wanted = offered if lag is None else min(lag, offered)
    curve, arriving = middle(curves[:, : wanted + 1])
    decay = flow.decay(curve, FRACTION)
    slopes = torch.tensor([slope(row[: wanted + 1]) for row in curves], dtype=torch.float64)
    half = half_width(slopes[slopes.isfinite()])
    verdict, cause = _judged(decay.reach, float(curve[-1]), wanted, lag, offered)
    evidence = {"steps": float(offered + 1), "arriving": float(arriving[-1])}
    interval = (decay.rate - half, decay.rate + half)
    return LayerDiagnosis(
        name, "state", verdict, cause, decay.rate, interval, decay.half_life, decay.reach, wanted, evidence,
        tuple(curve.tolist()),
    )  # fmt: skip


def _judged(reach: int, end: float, wanted: int, lag: int | None, offered: int) -> tuple[Verdict, str]:
    if lag is not None and lag > offered:
        return "undecided", f"the longest lag in the batch is {offered} steps, not {lag}; pass longer sequences"
    if end > -math.log(FRACTION):
        return "explodes", f"the gradient grows to {math.exp(min(end, 700.0)):.2g} times its size over {wanted} steps"
    if reach >= wanted:
        return "healthy", f"over {wanted} steps a fraction of {math.exp(min(end, 0.0)):.2g} of the gradient remains"
    return "vanishes", (
        f"after {reach} of {wanted} steps 1 % of the gradient remains; the cell's equations are not known, so the "
        "cause stays open: write its step as an unvanish.Cell to learn it"
    )
