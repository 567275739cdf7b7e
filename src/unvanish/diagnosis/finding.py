"""A finding: what keeps a model from learning, or is noteworthy, with the proof and the change to make."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Severity = Literal["error", "warning", "note"]

CODES = (
    "nan",
    "state_carried",
    "samples_mixed",
    "axes_mixed",
    "target_mismatch",
    "output_not_logits",
    "targets_ignored",
    "output_range",
    "padding_read",
    "state_cut",
    "ids_as_numbers",
    "input_scale",
    "target_in_input",
    "needs_future",
    "symmetric",
    "dead",
    "saturated",
    "depth",
    "explodes",
    "chaotic",
    "parameters_unmoved",
    "input_ignored",
    "target_scale",
    "loss_unbalanced",
    "regularised_away",
    "learning_rate",
    "reach_too_short",
    "readout",
    "needs_more_capacity",
    "not_learnable_from_input",
    "healthy",
)
"""Ranked: a cause comes before its symptoms. Inputs of size 1,000 saturate the gates, which leaves weights
without a gradient and answers that do not move with the input: `input_scale` comes first."""


@dataclass(frozen=True, repr=False)
class Finding:
    """One cause, or one remark, with the evidence for it."""

    code: str
    """one of `CODES`"""
    severity: Severity
    """ "error": proved to prevent or spoil learning; "warning": likely to; "note": worth knowing"""
    where: str
    """path of the module, name of the parameter or item of the batch; "" for the model as a whole"""
    says: str
    """what is wrong, in one sentence to act on"""
    proof: str
    """what was done, and the number that came out"""
    do: str
    """the change to make"""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"code: expected one of {', '.join(CODES)}, got {self.code!r}")
        if self.severity not in get_args(Severity):
            raise ValueError(f"severity: expected error, warning or note, got {self.severity!r}")

    @property
    def page(self) -> str:
        """The page of the documentation about this kind of finding."""
        return f"findings/{self.code}"

    def __repr__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        lines = [f"{self.severity}: {self.code}{where}", f"  {self.says}", f"  proof: {self.proof}"]
        if self.do:
            lines.append(f"  do: {_indented(self.do)}")
        return "\n".join([*lines, f"  more: {self.page}"])


def ranked(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors before warnings before notes; within each, causes before their symptoms."""
    severities = get_args(Severity)
    return tuple(sorted(findings, key=lambda f: (severities.index(f.severity), CODES.index(f.code))))


def _indented(text: str) -> str:
    return text.rstrip().replace("\n", "\n      ")
