"""The result of an audit: for each layer, how far the backend's gradients are from the reference."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from unvanish.extras import extra

if TYPE_CHECKING:
    import pandas as pd


class StepError(NamedTuple):
    """∂E/∂x step by step: a backend that truncates the gradient is wrong only where it is small."""

    worst: float
    """the largest ‖found_t − reference_t‖ / ‖reference_t‖ of a step t"""
    explained: float
    """the part of it that the dtype explains"""


@dataclass(frozen=True)
class LayerAudit:
    """One recurrent layer: how far its gradients are from the reference."""

    name: str
    """module path: "encoder.lstm"; of a model that is a layer itself, its class"""
    kind: str
    """its class"""
    dtype: str
    """what the backend computed in: "float32", "bfloat16", …; "TF32" where a GPU rounds float32 to it"""
    calls: int
    """calls that a gradient reached"""
    errors: dict[str, float]
    """relative error of ∂E/∂W_ih, ∂E/∂W_hh, …, ∂E/∂x, ∂E/∂h0; "W_hh l1.reverse" where there are several layers"""
    explained: float
    """relative error that the dtype explains"""
    output: float | None = None
    """relative error of the outputs; None inside a compiled graph, where they cannot be seen"""
    step: StepError | None = None
    """of ∂E/∂x at single steps; None inside a compiled graph"""

    def rows(self) -> dict[str, tuple[float, float]]:
        """What was compared → (relative error, what the dtype explains): "∂E/∂W_hh", …, "output"."""
        found = {f"∂E/∂{q}": (e, self.explained) for q, e in self.errors.items()}
        if self.step is not None:
            found["∂E/∂x, single steps"] = (self.step.worst, self.step.explained)
        return found if self.output is None else found | {"output": (self.output, self.explained)}

    @property
    def worst(self) -> float:
        """The largest error of a gradient; NaN if the reference is not finite."""
        return self.errors[self.worst_at]

    @property
    def worst_at(self) -> str:
        """Which gradient has the largest error: "W_hh", "x", …"""
        return max(self.errors, key=lambda q: math.inf if math.isnan(self.errors[q]) else self.errors[q])

    @property
    def ok(self) -> bool:
        """Whether the dtype explains every error, also those of the outputs and of single steps."""
        return all(error <= explained for error, explained in self.rows().values())

    @property
    def says(self) -> str:
        """One sentence; "" if the dtype explains every error."""
        if self.ok:
            return ""
        if math.isnan(self.worst) or (self.output is not None and math.isnan(self.output)):
            return f"{self.name}: the float64 reference is not finite; find the origin with uv.watch"
        explains = f"{self.dtype} explains {self.explained:.0e}"
        off = sorted((q for q, e in self.errors.items() if e > self.explained), key=lambda q: -self.errors[q])
        if self.output is not None and not self.output <= self.explained:
            rest = f", its gradients by up to {self.worst:.0e}" if off else ""
            return f"{self.name}: the output is off by {self.output:.0e}{rest}, {explains}; the forward pass is wrong"
        if not off and self.step is not None:
            return (
                f"{self.name}: ∂E/∂x is off by {self.step.worst:.0e} at single steps, where it is small, "
                f"{self.dtype} explains {self.step.explained:.0e}; is the gradient cut in the backward pass?"
            )
        first, *others = off
        also = f" (also {', '.join(f'∂E/∂{q} by {self.errors[q]:.0e}' for q in others)})" if others else ""
        agrees = (
            "" if self.output is None else f"; the output agrees to {self.output:.0e}, so the backward pass is wrong"
        )
        return f"{self.name}: ∂E/∂{first} is off by {self.errors[first]:.0e}{also}, {explains}{agrees}"


@dataclass(frozen=True, repr=False)
class Audit:
    """Layer by layer, the backend's gradients against a float64 reference."""

    layers: dict[str, LayerAudit]
    """one row per recurrent layer that was compared"""
    skipped: dict[str, str] = field(default_factory=dict)
    """layer, or one of its weights → why it was not compared"""

    @property
    def worst(self) -> float:
        """The largest relative error of a gradient in any layer; NaN if no layer was compared."""
        errors = [layer.worst for layer in self.layers.values()]
        return math.nan if not errors or any(map(math.isnan, errors)) else max(errors)

    @property
    def ok(self) -> bool:
        """Whether layers were compared, and the dtype explains every error found."""
        return bool(self.layers) and all(layer.ok for layer in self.layers.values())

    @property
    def says(self) -> str:
        """What was found, in words: a sentence per layer whose error is more than its dtype explains."""
        if not self.layers:
            return "No recurrent layer could be audited."
        off = [layer.says for layer in self.layers.values() if not layer.ok]
        if off:
            return "\n".join(off)
        worst = max(self.layers.values(), key=lambda layer: layer.worst)
        return (
            f"The gradients of {_count(len(self.layers), 'recurrent layer')} agree with the float64 reference: the "
            f"largest relative error is {worst.worst:.0e} (∂E/∂{worst.worst_at} of {worst.name}), {worst.dtype} "
            f"explains {worst.explained:.0e}."
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per layer and gradient: layer, kind, dtype, quantity, error, explained, ok; "output" is one too.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        with extra("report"):
            import pandas as pd

        rows = [
            {"layer": a.name, "kind": a.kind, "dtype": a.dtype, "quantity": q, "error": error, "explained": explained}
            for a in self.layers.values()
            for q, (error, explained) in a.rows().items()
        ]
        frame = pd.DataFrame(rows, columns=["layer", "kind", "dtype", "quantity", "error", "explained"])
        return frame.assign(ok=frame["error"] <= frame["explained"])

    def __repr__(self) -> str:
        heads = ("layer", "kind", "dtype", "worst gradient", "error", "output", "explained", "")
        rows = [
            (a.name, a.kind, a.dtype, f"∂E/∂{a.worst_at}", *map(_number, (a.worst, a.output, a.explained)), _mark(a))
            for a in self.layers.values()
        ]
        widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
        table = ["  ".join(v.ljust(n) for v, n in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)]
        left = [f"not audited: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join([*(table if rows else []), *left, self.says])


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _number(v: float | None) -> str:
    return "–" if v is None else f"{v:.1e}"


def _mark(layer: LayerAudit) -> str:
    return "" if layer.ok else "off"
