"""Dropout that evaluation does not switch off."""

from unvanish.diagnosis.exact.testbench import Bench
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.trace import DROPPING


def dropout_in_evaluation(bench: Bench) -> list[Finding]:
    """Functional dropout in eval mode: its default is training=True."""
    calls = [
        (call, float(p))
        for call in bench.evaluation().functions
        # torch.nn.functional's say training=, torch's own train=.
        if call.name in DROPPING
        and call.argument(2, "training", call.options.get("train", True))
        and (p := call.argument(1, "p", 0.5)) > 0
    ]
    if not calls:
        return []
    call, p = max(calls, key=lambda found: found[1])
    where = f"`{call.path}`" if call.path else "the model's forward"
    return [
        Finding(
            "regularised_away", "warning", call.path,
            "Dropout stays on in evaluation: the answers to the same input are random.",
            f"In eval mode {where} calls {call.name} with p={p:g} and training=True.",
            f"Say when it applies, `torch.nn.functional.{call.name}(x, {p:g}, self.training)`, or use nn.Dropout. If "
            "the randomness is meant (Monte Carlo dropout), nothing.",
        )
    ]  # fmt: skip
