"""Which rung runs a sequence, and why."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from unvanish.cells import Cell, State, Weights
from unvanish.engine import fused, fused_pass, manual, native, native_trace, operators, recording, reference
from unvanish.engine.checks import check_cut, check_errors, check_layer, whole_lengths
from unvanish.engine.sequence import transform

RUNGS = {"native": operators.run, "fused": fused_pass.run, "manual": manual.run, "reference": reference.run}
"""Fastest first; the dispatch takes the first that supports the call."""

# A plain global: torch.compile guards on it, which it can't do with a context variable.
_forced: str | None = None


@dataclass(frozen=True)
class Choice:
    """The rung that runs, and why each faster one does not."""

    rung: str
    declined: dict[str, str]
    how: str | None = None
    """how the rung runs, where it has more than one way"""

    def __str__(self) -> str:
        lines = [f"{name}: not used, {why}" for name, why in self.declined.items()]
        return "\n".join([*lines, f"{self.rung}: runs" + ("" if self.how is None else f" {self.how}")])


def _obstacle(
    rung: str, cell: Cell, x: Tensor, others: Sequence[Tensor | None], clip: float | None, cut: bool
) -> str | None:
    """Why `rung` can't run this cell over x, with `others` as states and weights, or None if it can."""
    if rung == "native":
        return native.obstacle(cell, x, others)
    if rung == "fused":
        return fused.obstacle(cell, x, others, clip, cut)
    if rung == "manual":
        if not x.dtype.is_floating_point:
            return f"its adjoint is for real floating dtypes, the input is {x.dtype}"
        return transform()
    return None


def _disadvantage(rung: str, x: Tensor) -> str | None:
    """Why a later rung should run instead of `rung`, although `rung` can, unless it is forced."""
    if rung == "fused" and x.device.type == "cpu":
        return "on the CPU the manual rung is faster"
    if rung == "fused" and len(x) == 1:
        return "a single step takes no loop, and no identity product"
    return None


def _known(rung: str) -> str:
    if rung not in RUNGS:
        raise ValueError(f"rung: expected one of {', '.join(RUNGS)}, got {rung!r}")
    return rung


@contextmanager
def force(rung: str) -> Iterator[None]:
    """Run every sequence of the process on `rung` within the block: "native", "fused", "manual" or "reference"; raises
    an error where it can't.
    """
    global _forced
    before, _forced = _forced, _known(rung)
    try:
        yield
    finally:
        _forced = before


def forced() -> bool:
    """Whether `force` is in effect."""
    return _forced is not None


def _how(rung: str, cell: Cell, x: Tensor) -> str | None:
    return manual.how(cell, x) if rung == "manual" else None


def explain(
    cell: Cell,
    x: Tensor,
    rung: str | None = None,
    others: Sequence[Tensor | None] = (),
    clip: float | None = None,
    cut: bool = False,
) -> Choice:
    """The rung that `run` uses for this cell, an input like x, states and weights like `others`, this `clip`, with or
    without `cut` steps; and why no faster one. Tensors that are not passed are assumed to be ordinary.

    Raises:
        ValueError: `rung` names no rung.
        RuntimeError: a forced rung can't run this input.
    """
    forced = _known(rung) if rung is not None else _forced
    if forced is not None:
        why = _obstacle(forced, cell, x, others, clip, cut)
        if why is not None:
            raise RuntimeError(f"rung {forced!r} was forced, but can't run here: {why}; force another or none")
        declined = {name: "another rung was forced" for name in RUNGS if name != forced}
        return Choice(forced, declined, _how(forced, cell, x))
    declined: dict[str, str] = {}
    for name in RUNGS:
        why = _obstacle(name, cell, x, others, clip, cut) or _disadvantage(name, x)
        if why is None:
            return Choice(name, declined, _how(name, cell, x))
        declined[name] = why
    raise AssertionError("the reference rung runs everything")


def run(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None = None,
    reverse: bool = False,
    clip: float | None = None,
    rung: str | None = None,
    record: recording.Recorder | None = None,
    cut: Tensor | None = None,
) -> tuple[Tensor, State]:
    """One layer and direction over one sequence, s_t = φ(p_t, q_t, s_{t-1}), differentiable in x, state and w.

    Args:
        cell: any `unvanish.cells.Cell`.
        x: `[T, B, I]`, time-major.
        state: the initial states, h `[B, R]` first, the others `[B, H]`.
        w: the weights.
        lengths: `[B]`, the number of steps of each sample; None: T for all. After its last step a sample's state is
            held and y is 0; what x holds there is not read.
        reverse: read from the last step to the first; y stays in input order.
        clip: the largest 2-norm, per sample, of the gradient passed from a step to the one before; None: unbounded.
        rung: force "native", "fused", "manual" or "reference"; None: the fastest that supports the call.
        record: notified of gate statistics and gradient norms; on the native rung, where gradients are enabled.
        cut: `[T]` bool on the CPU, True at steps t whose matrices pass no gradient to t − 1, which it then reaches
            only through the carry: h-detach (Kanuparthi et al. 2019). On every rung but the fused one.

    Returns:
        y `[T, B, R]` and the final state.

    Raises:
        ValueError: a shape, `lengths` or `cut` does not fit, or `rung` or `clip` is not valid.
        RuntimeError: states, weights and x differ in dtype or device; the forced rung can't run this input, or the one
            that runs can't record.
    """
    check_layer(cell, x, state, w)
    lengths = None if lengths is None else whole_lengths(lengths, x)
    if clip is not None and (isinstance(clip, bool) or not (isinstance(clip, int | float) and clip > 0)):
        raise ValueError(f"clip: expected a positive norm or None, got {clip!r}")
    check_cut(cut, x)
    cut = None if cut is None else cut.contiguous()
    runs = explain(cell, x, rung, (*state, *w), clip, cut is not None).rung
    if record is None:
        return RUNGS[runs](cell, x, state, w, lengths, reverse, clip, cut)
    if runs != "native":
        raise RuntimeError(f"record: only the native rung records, and {runs!r} runs here; replay with engine.trace")
    return recording.run_recorded(record, cell, x, state, w, lengths, reverse, clip, cut)


def trace(
    cell: Cell,
    x: Tensor,
    state: State,
    w: Weights,
    lengths: Tensor | None = None,
    reverse: bool = False,
    adjoint_follows: bool = False,
) -> manual.Trace:
    """`run` with every state and gate kept. Differentiable, on the fused or the manual rung, where an input requires
    gradients.

    adjoint_follows: keep what makes `adjoint` cheaper, at the cost of memory until it has run (the fused rung keeps
    the kernel's graph).
    """
    check_layer(cell, x, state, w)
    lengths = None if lengths is None else whole_lengths(lengths, x)
    inputs = (x, *state, *w)
    rung = explain(cell, x, others=(*state, *w)).rung
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs):
        return (fused_pass if rung == "fused" else manual).trace(cell, x, state, w, lengths, reverse)
    if rung == "fused":
        return fused.trace(cell, x, state, w, lengths, reverse, adjoint_follows)
    return (native_trace if rung == "native" else manual).trace(cell, x, state, w, lengths, reverse)


def adjoint(
    tr: manual.Trace,
    dy: Tensor | None,
    dfinal: tuple[Tensor | None, ...],
    clip: float | None = None,
    cut: Tensor | None = None,
) -> manual.Deltas:
    """δ at every step of a trace, from dy `[T, B, R]` = ∂E_t/∂h_t and dfinal = ∂E/∂(final state); None is zero.

    Raises:
        ValueError: a shape is not that of the output, or `cut` does not fit; see `run`.
        RuntimeError: a dtype or device is not that of the input; the fused rung is forced, which can't clip or cut.
    """
    check_errors(tr.x, tr.y, tr.final, dy, dfinal)
    check_cut(cut, tr.x)
    cut = None if cut is None else cut.contiguous()
    if tr.native is not None:
        return native_trace.adjoint(tr, dy, dfinal, clip, cut)
    if cut is None and tr.fused is not None and clip is None:
        return fused.adjoint(tr, dy, dfinal)
    # The manual rung, which clips and cuts, takes any rung's trace; an error where another rung is forced.
    if tr.fused is not None and _forced is not None:
        explain(tr.cell, tr.x, clip=clip, cut=cut is not None)
    return manual.adjoint(tr, dy, dfinal, clip, cut)


def gradients_of_weights(
    tr: manual.Trace, dy: Tensor | None, dfinal: tuple[Tensor | None, ...], clip: float | None = None
) -> Weights:
    """∂E/∂W = Σ_t g_t of every weight present, with errors as `adjoint` takes them; δ is not kept where it need not be.

    Raises:
        ValueError, RuntimeError: as `adjoint`.
    """
    if tr.native is None:
        return manual.weight_gradients(tr, adjoint(tr, dy, dfinal, clip))
    check_errors(tr.x, tr.y, tr.final, dy, dfinal)
    return native_trace.gradients_of_weights(tr, dy, dfinal, clip)
