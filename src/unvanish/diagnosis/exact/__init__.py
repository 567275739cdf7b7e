"""Exact tests: a few deterministic passes through copies, each proving one kind of fault.

Every test is a function Bench → list of findings, with a number in each proof. None touches the model or the random
numbers.
"""

from collections.abc import Callable
from typing import Any

from unvanish.diagnosis.exact.cuts import state_carried, state_cut
from unvanish.diagnosis.exact.depth import depth
from unvanish.diagnosis.exact.dropout import dropout_in_evaluation
from unvanish.diagnosis.exact.flow import input_ignored, parameters_unmoved, steps_dropped
from unvanish.diagnosis.exact.growth import explosion
from unvanish.diagnosis.exact.logits import loss_unbalanced, output_not_logits, targets_ignored
from unvanish.diagnosis.exact.nan import nan
from unvanish.diagnosis.exact.padding import padding_read
from unvanish.diagnosis.exact.pairing import compared_with_others
from unvanish.diagnosis.exact.samples import samples_mixed
from unvanish.diagnosis.exact.scale import dead, ids_as_numbers, input_scale, symmetric
from unvanish.diagnosis.exact.targets import output_range, target_mismatch, target_scale
from unvanish.diagnosis.exact.testbench import Bench
from unvanish.diagnosis.exact.time_axis import axes_mixed, needs_future, target_in_input
from unvanish.diagnosis.finding import Finding, ranked
from unvanish.diagnosis.subject import Subject

TESTS: dict[str, Callable[[Bench], list[Finding]]] = {
    "NaN and infinity": nan,
    "states kept between batches": state_carried,
    "independence of the samples": samples_mixed,
    "order of answers and targets": compared_with_others,
    "order of axes": axes_mixed,
    "shapes of answers and targets": target_mismatch,
    "what the loss is given": output_not_logits,
    "targets left out": targets_ignored,
    "range of the answers": output_range,
    "padding": padding_read,
    "cuts of the state": state_cut,
    "ids": ids_as_numbers,
    "scale of the inputs": input_scale,
    "targets in the input": target_in_input,
    "targets from the future": needs_future,
    "copies of units": symmetric,
    "dead units": dead,
    "depth": depth,
    "growth from step to step": explosion,
    "dependence on the input": input_ignored,
    "steps that are read": steps_dropped,
    "scale of the targets": target_scale,
    "terms of the loss": loss_unbalanced,
    "dropout in evaluation": dropout_in_evaluation,
}


def run(
    subject: Subject,
    *,
    lag: int | None = None,
    optimizer: Any = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
    """(findings, notes) of all tests, ranked. A test that a model can't be put to becomes a note, not an error.

    Raises:
        Exception: whatever the model or the loss raises on the user's own batch.
    """
    bench = Bench(subject, lag)
    bench.training  # noqa: B018 (what the user's own pass raises is raised here)
    found: list[Finding] = []
    tests = {**TESTS, "parameters": lambda bench: parameters_unmoved(bench, optimizer)}
    for name, test in tests.items():
        if progress is not None:
            progress(f"exact test: {name}")
        try:
            found += test(bench)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError,
                NotImplementedError, ArithmeticError) as error:  # fmt: skip
            first = (str(error).strip().splitlines() or ["no message"])[0][:160]
            bench.notes.append(f"not tested: {name} ({type(error).__name__}: {first})")
    finite = bench.training.loss is None or bool(bench.training.loss.isfinite().all())
    if not finite or any(f.code == "nan" and f.severity == "error" for f in found):
        # Comparisons with NaN prove nothing.
        kept = ("nan", "explodes", "state_carried", "target_mismatch", "parameters_unmoved")
        found = [f for f in found if f.code in kept]
    return ranked(found), tuple(dict.fromkeys(bench.notes))
