"""A tapped call recomputed on the CPU, in a dtype of choice, by the reference rung and autograd."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.cells import State, Weights
from unvanish.engine.precision import full_precision
from unvanish.flow.tapped import TappedCall
from unvanish.nn.modules import (
    LayerDirection,
    RecurrentModule,
    SequenceModule,
    cell_of,
    directions_of_a_cell,
    drawn_again,
    final_error,
    initial_states,
    layer_directions,
    output_error,
    run_layers,
    time_major,
)

SPAN = 32
"""steps that are run at a time: autograd's cost of reading one step of many grows with their number"""

Gradients = dict[str, Tensor]
""" "x", "h0", "c0" and torch's names of the weights → ∂E/∂(it)"""


@dataclass(frozen=True)
class Errors:
    """The gradients that arrived at the outputs of a call: ∂E/∂y and ∂E/∂(final states); None where none did."""

    y: Tensor | None
    final: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Noise:
    """Every number v becomes v (1 ± size), the signs drawn from `seed`: how far rounding moves a result."""

    size: float
    seed: int


def _noisy(call: TappedCall, errors: Errors, noise: Noise) -> tuple[TappedCall, Errors]:
    generator = torch.Generator().manual_seed(noise.seed)

    def change(v: Any) -> Any:
        if v is None:
            return None
        if isinstance(v, PackedSequence):
            return v._replace(data=change(v.data))
        v = v.detach().cpu().double()
        signs = torch.randint(0, 2, v.shape, generator=generator, device="cpu") * 2 - 1
        return v * (1 + noise.size * signs)

    weights = {name: change(w) for name, w in call.weights.items()}
    made = replace(call, x=change(call.x), hx=tuple(map(change, call.hx)), weights=weights)
    return made, Errors(change(errors.y), tuple(map(change, errors.final)))


@dataclass(frozen=True)
class _Ran:
    y: Tensor
    final: State


def recomputed(
    module: RecurrentModule, call: TappedCall, errors: Errors, dtype: torch.dtype, noise: Noise | None = None
) -> tuple[Gradients, tuple[Tensor, ...]]:
    """The gradients of a call for those that arrived at its outputs, and the outputs (y, *final); `noise` perturbs
    every input."""
    if noise is not None:
        call, errors = _noisy(call, errors, noise)
    with torch.enable_grad(), full_precision():
        x, leaf = _input(call.x, dtype)
        hx = tuple(_leaf(s, dtype) for s in call.hx)
        weights = {name: _leaf(w, dtype) for name, w in call.weights.items()}
        if isinstance(module, SequenceModule):
            outputs, arrived = _layers(module, call, errors, x, hx, weights)
        else:
            outputs, arrived = _step(module, errors, x, hx, weights)
        leaves = {"x": leaf, **weights}
        leaves |= dict(zip(("h0", "c0"), hx, strict=False))
        pairs = [(out, d) for out, d in zip(outputs, arrived, strict=True) if d is not None]
        found = torch.autograd.grad(
            [out for out, _ in pairs], list(leaves.values()), [d for _, d in pairs], allow_unused=True
        )
        gradients = {
            name: torch.zeros_like(leaf) if d is None else d
            for (name, leaf), d in zip(leaves.items(), found, strict=True)
        }
    return gradients, tuple(out.detach() for out in outputs)


def outputs_of(module: RecurrentModule, call: TappedCall) -> tuple[Tensor, ...]:
    """(y, *final) as the backend returned them, in the layout of `recomputed`'s, float64 on the CPU."""
    if not isinstance(module, SequenceModule):
        return tuple(s.detach().cpu().double() for s in call.final)
    inputs = time_major(module, _input(call.x, torch.float64)[0], call.lengths)
    y = output_error(module, inputs, _on_cpu(call.y))
    final = [final_error(inputs, _on_cpu(s)) for s in call.final]
    return tuple(v.detach() for v in (y, *final) if v is not None)


def _layers(
    module: SequenceModule,
    call: TappedCall,
    errors: Errors,
    x: Tensor | PackedSequence,
    hx: tuple[Tensor, ...],
    weights: dict[str, Tensor],
) -> tuple[list[Tensor], list[Tensor | None]]:
    inputs = time_major(module, x, call.lengths)
    layers = (
        layer_directions(module, [weights[n] for n in module._flat_weights_names if n in weights])
        if isinstance(module, nn.RNNBase)
        else directions_of_a_cell(module, weights)
    )
    # Masks are drawn in the dtype that the backend drew them in.
    drawn = inputs._replace(x=inputs.x.detach().to(call.drawn_in))
    masks, cuts = drawn_again(module, drawn, call.rng)
    masks = [m.to(inputs.x.dtype) for m in masks]
    cut_of = {(d.layer, d.reverse): cut for d, cut in zip(layers, cuts, strict=True)}
    clip = getattr(module, "clip", None)

    def run(d: LayerDirection, x: Tensor, state: State) -> _Ran:
        spans, cut = x.split(SPAN), cut_of[d.layer, d.reverse]
        y: list[Tensor] = [x] * len(spans)
        for k in reversed(range(len(spans))) if d.reverse else range(len(spans)):
            part = spans[k]
            lengths = None if inputs.lengths is None else (inputs.lengths - k * SPAN).clamp(0, len(part))
            here = None if cut is None else cut[k * SPAN : k * SPAN + len(part)]
            y[k], state = engine.run(
                d.cell, part, state, d.weights, lengths, d.reverse, clip, rung="reference", cut=here
            )
        return _Ran(torch.cat(y), state)

    # A single state is torch's bare tensor.
    given = hx[0] if len(hx) == 1 else (hx or None)
    ran = run_layers(layers, inputs.x, initial_states(module, given, inputs), run, masks)
    last = ran[-2:] if module.bidirectional else ran[-1:]
    y = torch.cat([r.y for r in last], dim=-1)
    final = [torch.stack(s) for s in zip(*(r.final for r in ran), strict=True)]
    ends = [final_error(inputs, _on_cpu(d)) for d in errors.final]
    return [y, *final[: len(ends)]], [output_error(module, inputs, _on_cpu(errors.y)), *ends]


def _step(
    module: nn.RNNCellBase, errors: Errors, x: Tensor | PackedSequence, hx: tuple[Tensor, ...], w: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    assert isinstance(x, Tensor)
    cell = cell_of(module)
    used = Weights(w["weight_ih"], w["weight_hh"], w.get("bias_ih"), w.get("bias_hh"))
    state = hx or tuple(x.new_zeros(*x.shape[:-1], module.hidden_size) for _ in cell.states)
    out = cell.advance(cell.project(x, used), state, used)
    return list(out), [None if d is None else d.cpu().to(x.dtype) for d in errors.final]


def _leaf(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.detach().cpu().to(dtype, copy=True).requires_grad_()


def _input(x: Tensor | PackedSequence, dtype: torch.dtype) -> tuple[Tensor | PackedSequence, Tensor]:
    """(x as a module takes it, its leaf)."""
    if isinstance(x, Tensor):
        leaf = _leaf(x, dtype)
        return leaf, leaf
    leaf = _leaf(x.data, dtype)
    places = (None if p is None else p.cpu() for p in (x.sorted_indices, x.unsorted_indices))
    return PackedSequence(leaf, x.batch_sizes, *places), leaf


def _on_cpu(v: "Tensor | PackedSequence | None") -> Tensor | None:
    if isinstance(v, PackedSequence):
        v = v.data
    return None if v is None else v.detach().cpu()


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """‖found − reference‖ / ‖reference‖ over all pairs; inf where only the reference is finite or zero, NaN where it
    is not finite itself."""
    found, reference = (torch.cat([v.detach().cpu().double().flatten() for v in vs]) for vs in zip(*pairs, strict=True))
    if not bool(reference.isfinite().all()):
        return math.nan
    if not bool(found.isfinite().all()):
        return math.inf
    # Squares of a vanished gradient underflow in float64 too.
    scale = reference.abs().max() if reference.numel() else reference.new_zeros(())
    if scale == 0:
        return math.inf if bool(found.any()) else 0.0
    return float(torch.linalg.vector_norm((found - reference) / scale) / torch.linalg.vector_norm(reference / scale))


def step_norms(module: RecurrentModule, call: TappedCall, d: Tensor) -> Tensor:
    """‖d_t‖ of each step, `[T]` float64, of a gradient in the layout of the call's input."""
    d = d.detach().cpu().double()
    if not isinstance(module, SequenceModule):
        return torch.linalg.vector_norm(d).reshape(1)
    inputs = time_major(module, _input(call.x, torch.float64)[0], call.lengths)
    by_step = output_error(module, inputs, d)
    assert by_step is not None
    return torch.linalg.vector_norm(by_step.flatten(1), dim=1)
