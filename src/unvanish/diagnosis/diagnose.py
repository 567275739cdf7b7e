"""Why a model does not learn: exact tests, a measurement of the gradient's reach, and interventions on copies."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unvanish.capture.named_states import Getter
from unvanish.diagnosis import exact, interventions
from unvanish.diagnosis.exact.growth import growth
from unvanish.diagnosis.finding import Finding, ranked
from unvanish.diagnosis.interventions import Outcome
from unvanish.diagnosis.layer_inputs import Given, capture
from unvanish.diagnosis.measure import Measured, half_width, measure
from unvanish.diagnosis.prescribe import prescribe
from unvanish.diagnosis.results import Diagnosis, LayerDiagnosis, Prescription
from unvanish.diagnosis.states import of_states
from unvanish.diagnosis.status_line import shown
from unvanish.diagnosis.subject import Subject
from unvanish.diagnosis.verdict import judge
from unvanish.nn.modules import RecurrentModule

LR = 3e-3
"""Adam's, to judge sensitivity by where the user gives no optimizer"""


def diagnose(
    model: nn.Module,
    *batch: Any,
    loss: Callable[..., Tensor] | None = None,
    step: Callable[[nn.Module], Tensor] | None = None,
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    budget: float = 60.0,
    lag: int | None = None,
    samples: int = 16,
    states: Mapping[str, Getter] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Find out why a model does not learn, with proofs, and what to change.

        d = uv.diagnose(model, x, y, loss=loss_fn)     # loss_fn(model(x), y)
        d = uv.diagnose(model, step=step)              # step(model) → loss
        d = uv.diagnose(lightning_module, batch)       # its training_step
        d.findings; d.plan.code; d.verify(d.plan.apply(model))

    Three parts, in this order:

    - Exact tests: a few passes each, without any training. An error among them comes first and ends the diagnosis.
    - The measurement: ‖∂E_k/∂s_{k−ℓ}‖ relative to lag 0 in every recurrent layer, s = c for the LSTM, h for the others.
      `d.layers` says how far the gradient reaches. A short reach is not a fault by itself: it matters if the answer
      needs more steps and no other path (pooling, attention, skip connections) carries the gradient.
    - Interventions: copies trained on the model's own loss, each with one change, judged on held-out samples against
      the best constant answer. The change that makes the loss fall names the cause, and becomes the plan.

    The model, its gradients, its mode and the random numbers stay as they are.

    Args:
        model: any module that can be copied; recurrent or not, only recurrent layers are measured.
        batch: the model's inputs, then the target; a single item is the input, and `loss` takes the output alone.
        loss: (output, target) → scalar.
        step: model → scalar, in place of batch and loss; may draw a fresh batch per call.
        optimizer: the one that trains the model, or a function parameters → optimizer; None: Adam. An instance is also
            checked for missing parameters.
        budget: seconds for interventions; 0: none.
        lag: longest lag that the task needs, in steps; None: the longest in the batch.
        samples: number of samples in the measurement.
        states: module name → where its state is, as in `unvanish.watch`, for modules of other libraries that are called
            once per step. Their rate, reach and verdict are measured by autograd alone, as are those of states shown
            by `unvanish.mark`.
        seed: seed of dropout, random cures and the training of copies.
        progress: called with a sentence on what is being done; None: a line on stderr after two seconds, if that is a
            terminal.

    Raises:
        TypeError: the model is not a module or can't be copied, or loss, step or optimizer is not a function.
        ValueError: neither or both of loss and step are given, the batch is empty, or lag, samples or budget is out of
            range.
        RuntimeError: it is called within torch.inference_mode.
    """
    _check(model, batch, loss, step, budget, lag, samples)
    if optimizer is not None and not isinstance(optimizer, Optimizer) and not callable(optimizer):
        raise TypeError(
            "optimizer: expected a torch.optim.Optimizer, or a function that makes one from parameters, got "
            f"{type(optimizer).__name__}"
        )
    inputs, target = (batch[:-1], batch[-1]) if len(batch) > 1 and loss is not None else (batch, None)
    has_target = len(batch) > 1 and loss is not None
    settings = {"optimizer": optimizer, "budget": budget, "lag": None if lag is None else int(lag),
                "samples": int(samples), "states": dict(states or {}), "seed": seed}  # fmt: skip

    def of(changed: nn.Module, **other: Any) -> Diagnosis:
        subject = Subject(changed, inputs, target, loss, step=step, has_target=has_target)
        with shown(progress) as say:
            return _diagnosed(subject, say, **{**settings, **other})

    found = of(model)
    # An optimizer of the old parameters says nothing about a changed model.
    kind = None if isinstance(optimizer, Optimizer) else optimizer
    return replace(found, again=lambda changed: of(_module(changed), optimizer=kind))


def _diagnosed(
    subject: Subject,
    say: Callable[[str], None],
    *,
    optimizer: Any,
    budget: float,
    lag: int | None,
    samples: int,
    states: Mapping[str, Getter],
    seed: int,
) -> Diagnosis:
    proved, notes = exact.run(subject, lag=lag, optimizer=optimizer, progress=say)
    say("reach of the gradient in each recurrent layer")
    lr = float(optimizer.param_groups[0]["lr"]) if isinstance(optimizer, Optimizer) else LR

    def measured(model: nn.Module) -> tuple[list[Given], dict[str, LayerDiagnosis], tuple[str, ...]]:
        given, unseen = capture(model, subject.loss, seed)
        records = [_record(g.name(m.place), m) for g in given for m in measure(g, lag, samples, seed, lr)]
        return given, {record.name: record for record in records}, unseen

    given: list[Given] = []
    layers, told = of_states(subject, states, lag, samples, seed)
    notes = (*notes, *told)
    try:
        if not layers or any(isinstance(m, RecurrentModule) for m in subject.model.modules()):
            given, found, unseen = measured(subject.model)
            layers, notes = found | layers, (*notes, *unseen)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        notes = (*notes, f"the gradient's reach was not measured: {error}")
    proved = ranked((*proved, *growth(layers)))
    if any(f.severity == "error" for f in proved):
        budget = 0.0
    try:
        outcome = interventions.run(
            subject, budget=budget, optimizer=optimizer, exact=proved, layers=layers, progress=say, seed=seed, lag=lag
        )
    except (RuntimeError, IndexError, NotImplementedError) as error:
        outcome = Outcome(notes=(f"no intervention could be tried: {type(error).__name__}: {error}",))
    if any(f.severity == "error" for f in proved):
        outcome = Outcome(notes=("no copy was trained: an exact test proved a fault; repair it first",))
    elif budget == 0:
        outcome = Outcome()
    findings = _together(proved, outcome, notes)
    kept = subject.twin()

    def cures() -> tuple[Prescription, ...]:
        return prescribe(kept, given, layers, lambda changed: measured(changed)[1], seed)

    return Diagnosis(
        type(subject.model).__name__, findings, layers, outcome.plan, (*notes, *outcome.notes), outcome.tried,
        outcome.chance, cures, _unset,
    )  # fmt: skip


def _unset(model: nn.Module) -> Diagnosis:
    raise AssertionError("set by diagnose")


def _together(proved: tuple[Finding, ...], outcome: Outcome, notes: tuple[str, ...]) -> tuple[Finding, ...]:
    """All findings, ranked. If the model was seen to learn, `healthy` comes first and the others become notes."""
    learnt = [f for f in outcome.findings if f.code == "healthy"]
    if learnt:
        # A falling loss does not refute that the target is visible in the input: it is the consequence.
        leaks = [f for f in proved if f.code == "target_in_input"]
        rest = [replace(f, severity="note") if f.severity == "warning" else f for f in proved if f not in leaks]
        told = [f for f in leaks if f.severity != "note"]
        rest += [f for f in leaks if f not in told]
        return (*told, *learnt, *ranked((*rest, *(f for f in outcome.findings if f.code != "healthy"))))
    everything = ranked((*proved, *outcome.findings))
    if any(f.severity != "note" for f in everything) or outcome.findings:
        return everything
    if outcome.tried:
        return (
            Finding(
                "healthy", "note", "",
                "No exact test found a fault, and no copy learnt within the budget, with or without a change: nothing "
                "is proved.",
                f"{len(outcome.tried)} {'copy was' if len(outcome.tried) == 1 else 'copies were'} trained.",
                "Pass a longer budget and more samples.",
            ),
            *everything,
        )  # fmt: skip
    untested = sum(note.startswith("not tested") for note in notes)
    return (
        Finding(
            "healthy", "note", "",
            "No exact test found a fault. No copy was trained, so it is not proved that the model learns.",
            f"{len(exact.TESTS) + 1 - untested} exact tests passed, {untested} could not be run.",
            "Pass a budget of some seconds, so that copies are trained and show whether the loss falls.",
        ),
        *everything,
    )  # fmt: skip


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _check(model: Any, batch: tuple[Any, ...], loss: Any, step: Any, budget: Any, lag: Any, samples: Any) -> None:
    _module(model)
    for name, number, what in (("lag", lag, "step"), ("samples", samples, "")):
        if number is not None and (isinstance(number, bool) or not isinstance(number, Integral) or number < 1):
            raise ValueError(f"{name}: expected a whole number of at least 1{f' {what}' if what else ''}, got {number}")
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"budget: expected seconds as a number, got {type(budget).__name__}")
    if not (math.isfinite(budget) and budget >= 0):
        raise ValueError(f"budget: expected a finite number of seconds, 0 or more, got {budget}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("diagnose: can't compute gradients within torch.inference_mode; call it outside")
    for name, given in (("loss", loss), ("step", step)):
        if given is not None and not callable(given):
            raise TypeError(f"{name}: expected a function, got {type(given).__name__}")
    if step is not None and (loss is not None or batch):
        raise ValueError("step: replaces the batch and the loss; pass either step= alone or both of those")
    if step is None and not batch:
        raise ValueError("batch: expected the model's input and its target")
    for number, item in enumerate(batch):
        if isinstance(item, Tensor) and item.numel() == 0:
            raise ValueError(
                f"batch: expected at least one sample and one step, got a tensor of shape {tuple(item.shape)} as item "
                f"{number}"
            )


def _record(name: str, m: Measured) -> LayerDiagnosis:
    verdict, cause = judge(m)
    curve = tuple(m.curve.tolist())
    # A single step or sample has no rate, so none is reported.
    if m.evidence["offered"] < 2 or len(m.slopes) < 2:
        return LayerDiagnosis(
            name, m.place.cell.name, verdict, cause, math.nan, (math.nan, math.nan), None, m.decay.reach, m.lag,
            m.evidence, curve,
        )  # fmt: skip
    half = half_width(m.slopes[m.slopes.isfinite()])
    interval = (m.decay.rate - half, m.decay.rate + half)
    return LayerDiagnosis(
        name, m.place.cell.name, verdict, cause, m.decay.rate, interval, m.decay.half_life, m.decay.reach, m.lag,
        m.evidence, curve,
    )  # fmt: skip
