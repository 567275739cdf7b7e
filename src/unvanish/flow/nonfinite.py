"""Where a NaN or an infinity was born: the layer, the step, the sample and the gate; forward first, then backward."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from unvanish import engine
from unvanish.flow.summary import by_gate


class NonFiniteOrigin(NamedTuple):
    """Where a NaN or an infinity was born."""

    forward: bool
    """or in the backward pass"""
    sentence: str


def origin_of_nonfinite(
    name: str,
    tr: engine.Trace,
    dy: Tensor | None,
    flow: engine.Deltas,
    first_step: int = 0,
    order: Tensor | None = None,
) -> NonFiniteOrigin:
    """The first non-finite value of a layer's pass, which has one.

    Forward, in the layer's reading order, a step is searched in the order of computation: input, previous state,
    gates, state. Backward, from the last step read to the first: the error that arrives at h_t, then δ of the states,
    then δ of each gate.
    `first_step` is the number of the trace's first step, `order` `[B]` the user's number of each of its samples.
    """
    for label, weight in zip(tr.weights._fields, tr.weights, strict=True):
        if weight is not None and not _finite(weight):
            return NonFiniteOrigin(True, f"{name}: weight {label} holds a {_kind(weight)} before the pass")
    gates = tr.gates
    before = [("the state before the step", v) for v in tr.before]
    forward = [("the input x", tr.x), *before]
    forward += [(f"gate {gate}", gates[..., i, :]) for i, gate in enumerate(tr.cell.gates)]
    forward += [(f"the state {state}", v) for state, v in zip(tr.cell.states, tr.after, strict=True)]
    found = _first(forward, tr.active, tr.reverse)
    if found is not None:
        return NonFiniteOrigin(True, _sentence(name, "forward", found, first_step, order))
    da = by_gate(tr.cell, flow.da, flow.da_hh)
    backward = [] if dy is None else [("the error arriving at h from outside", dy)]
    backward += [(f"δ{state}", d) for state, d in zip(tr.cell.states, flow.dstate, strict=True)]
    backward += [(f"δ of gate {gate}", da[..., i, :]) for i, gate in enumerate(tr.cell.gates)]
    found = _first(backward, tr.active, not tr.reverse)
    if found is not None:
        return NonFiniteOrigin(False, _sentence(name, "backward", found, first_step, order))
    return NonFiniteOrigin(False, f"{name}: the error at the final or initial state is not finite")


def _sentence(name: str, way: str, found: tuple[int, int, str, str], first_step: int, order: Tensor | None) -> str:
    t, b, label, kind = found
    sample = b if order is None else int(order[b])
    return f"{name}: {kind} born {way} at step {first_step + t}, sample {sample}, in {label}"


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
