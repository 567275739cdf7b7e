"""The origin of a NaN or an infinity: layer, step, sample and gate; first in the forward pass, then in the backward."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from unvanish import engine
from unvanish.flow.summary import by_gate


class NonFiniteOrigin(NamedTuple):
    """The origin of a NaN or an infinity."""

    forward: bool
    """whether it is in the forward pass; otherwise it is in the backward pass"""
    name: str
    """of the record"""
    says: str
    """NaN or infinity; or the whole sentence, if no step is known"""
    step: int | None = None
    sample: int | None = None
    place: str = ""

    @property
    def sentence(self) -> str:
        """For a person."""
        if self.step is None:
            return f"{self.name}: {self.says}"
        which = "forward" if self.forward else "backward"
        sample = "" if self.sample is None else f", sample {self.sample}"
        return (
            f"{self.name}: {self.says} first appears in the {which} pass at step {self.step}{sample}, in {self.place}"
        )

    def later(self, steps: Tensor) -> "NonFiniteOrigin":
        """The same origin, for a call that follows this many earlier steps of each sample, `[B]`."""
        return self if self.step is None else self._replace(step=self.step + int(steps[self.sample or 0]))


def first_origin(origins: Iterable[NonFiniteOrigin | None]) -> NonFiniteOrigin | None:
    """The origin from which the others follow: the first one in the order of computation, forward before backward."""
    found = [origin for origin in origins if origin is not None]
    return next((origin for origin in found if origin.forward), found[-1] if found else None)


def origin_of_nonfinite(
    name: str,
    tr: engine.Trace,
    dy: Tensor | None,
    flow: engine.Deltas,
    first_step: int = 0,
    order: Tensor | None = None,
) -> NonFiniteOrigin:
    """The first non-finite value of a layer's pass, which must contain one.

    Forward, in the layer's reading order, a step is searched in the order of computation: input, previous state,
    gates, state. Backward, from the last step read to the first: the gradient that arrives at h_t, then δ of the
    states, then δ of each gate.
    `first_step` is the number of the trace's first step, `order` `[B]` the user's number of each of its samples.
    """
    for label, weight in zip(tr.weights._fields, tr.weights, strict=True):
        if weight is not None and not _finite(weight):
            return NonFiniteOrigin(True, name, f"weight {label} holds {_kind(weight)} before the pass")
    gates = tr.gates
    before = [("the state before the step", v) for v in tr.before]
    forward = [("the input x", tr.x), *before]
    forward += [(f"gate {gate}", gates[..., i, :]) for i, gate in enumerate(tr.cell.gates)]
    forward += [(f"the state {state}", v) for state, v in zip(tr.cell.states, tr.after, strict=True)]
    found = _first(forward, tr.active, tr.reverse)
    if found is not None:
        return _origin(True, name, found, first_step, order)
    da = by_gate(tr.cell, flow.da, flow.da_hh)
    backward = [] if dy is None else [("the gradient arriving at h from outside", dy)]
    backward += [(f"δ{state}", d) for state, d in zip(tr.cell.states, flow.dstate, strict=True)]
    backward += [(f"δ of gate {gate}", da[..., i, :]) for i, gate in enumerate(tr.cell.gates)]
    found = _first(backward, tr.active, not tr.reverse)
    if found is not None:
        return _origin(False, name, found, first_step, order)
    return NonFiniteOrigin(False, name, "the gradient at the final or initial state is not finite")


def _origin(
    forward: bool, name: str, found: tuple[int, int, str, str], first_step: int, order: Tensor | None
) -> NonFiniteOrigin:
    t, b, label, kind = found
    return NonFiniteOrigin(forward, name, kind, first_step + t, b if order is None else int(order[b]), label)


def _finite(v: Tensor) -> bool:
    return bool(v.isfinite().all())


def _kind(v: Tensor) -> str:
    return "NaN" if bool(v.isnan().any()) else "infinity"


def _first(
    parts: Iterable[tuple[str, Tensor]], active: Tensor | None, reverse: bool
) -> tuple[int, int, str, str] | None:
    """(step, sample, what, kind of number)"""
    best: tuple[int, int, str, str] | None = None
    for label, v in parts:
        bad = ~v.isfinite()
        if active is not None:
            bad &= active
        steps = bad.flatten(1).any(1).nonzero().flatten()
        if len(steps) == 0:
            continue
        t = int(steps[-1 if reverse else 0])
        if best is None or (t > best[0] if reverse else t < best[0]):
            b = int(bad[t].any(-1).nonzero()[0])
            best = (t, b, label, _kind(v[t, b]))
    return best
