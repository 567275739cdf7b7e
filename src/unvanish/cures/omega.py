"""Ω, the vanishing-gradient regulariser: the gradient should keep its length from one step to the step before."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.capture import Call, Capture
from unvanish.cells import Point, State, Weights, calculus
from unvanish.cures.layer_weights import layers_of, recurrent_layers, recurrent_modules
from unvanish.engine.precision import full_precision
from unvanish.flow.stack import reading_order
from unvanish.nn.modules import (
    CellModule,
    LayerDirection,
    as_states,
    descend_layers,
    detached_call,
    drawn_again,
    evaluating,
    final_error,
    layer_directions,
    on_gradient,
    output_error,
    run_layers,
    weights_dtype,
)


@dataclass
class _ObservedCall:
    """One call of a recurrent module, detached, and the gradient that arrived at its outputs."""

    call: Call
    attached: bool
    """whether the state it started from was part of the graph"""
    fused: bool
    """h_t and c_t of one autograd node: ∂E/∂c_t then lacks the path through h_t"""
    errors: dict[int, Tensor] = field(default_factory=dict)
    """output (0: y or h, then the final states) → the gradient that arrived at it"""

    def observe(self, outputs: tuple[Tensor, ...]) -> None:
        for i, output in enumerate(outputs):
            if output.requires_grad:
                on_gradient(output, self._catcher(i))

    def _catcher(self, i: int) -> Callable[[Tensor], None]:
        def catch(d: Tensor) -> None:
            self.errors[i] = self.errors[i] + d.detach() if i in self.errors else d.detach()

        return catch


class Omega:
    """Ω = Σ_t ( ‖J_tᵀ δ_t‖ / ‖δ_t‖ − 1 )²,  J_t = ∂s_t/∂s_{t-1},  δ_t = ∂E/∂s_t: the gradient keeps its length.

        norms="plain"    Ω_t = ( ‖J_tᵀ δ_t‖ / ‖δ_t‖ − 1 )²       equation 9
        norms="squared"  Ω_t = ( ‖J_tᵀ δ_t‖² / ‖δ_t‖² − 1 )²     equation 10

    As in the paper only the immediate derivative is taken: states, gates and δ are constants, and ∂⁺Ω/∂W sees W_hh
    where it occurs in J_tᵀ δ_t = W_hhᵀ δa_t + (the carry's share). So no second backward pass through the network is
    needed:

        omega = Omega(model)
        with omega:
            loss_fn(model(x), y).backward()
        (0.5 * omega.penalty()).backward()          # adds to .grad of every W_hh
        optimizer.step()

    The state is s = h for the RNN. **LSTM and GRU** are this library's generalisation: the full state, s = (h, c) for
    the LSTM, under the exact one-step Jacobian; the carry f ⊙ δc (z ⊙ δh) is in the product but has no immediate
    derivative, so Ω acts on what passes through W_hh (and the projection W_hr), not on the gates' biases.

    Counted are the steps t whose s_{t-1} was itself computed by the layer (t = 2 … T in reading order) and whose error
    is not exactly zero. Ω is summed over steps, layers and directions and averaged over samples; it does not change
    when the loss is multiplied by a constant. Call `penalty` before the optimizer moves the weights; with a GradScaler
    scale it as the loss is scaled.

    Args:
        model: nn.RNN, nn.LSTM, nn.GRU of any kind (layers, directions, packed, dropout on the CPU), cells in a loop,
            or any module that contains some.
        norms: "plain" or "squared".

    Raises:
        TypeError: model is not a module, or has a cell without a recurrent matrix, like the IndRNN.
        ValueError: there is no recurrent layer, or `norms` is neither.

    Source: Pascanu, Mikolov & Bengio 2013, section 3.3, equations 9 and 10. The paper's state is a_t, with h = φ(a);
    here it is h_t, the same recurrence half a step later.

    Limits: δ is the gradient of the sum over all errors, so Ω preserves the *sum*, not the part of each source. Every
    step with an error counts, however small the error. With clipping in the recurrence, δ is the clipped gradient.

    >>> rnn, x = nn.RNN(2, 3), torch.randn(5, 1, 2)
    >>> with Omega(rnn) as omega:
    ...     rnn(x)[0][-1].sum().backward()
    >>> omega.penalty().backward()
    """

    def __init__(self, model: nn.Module, norms: Literal["plain", "squared"] = "plain") -> None:
        if norms not in ("plain", "squared"):
            raise ValueError(f"norms: expected 'plain' (equation 9) or 'squared' (equation 10), got {norms!r}")
        recurrent_modules(model, "Omega", called=True)
        recurrent_layers(model, "Omega", lambda cell: bool(cell.sources), "it has no recurrent matrix for Ω to act on")
        self._capture = Capture(model, self._after)
        self._norms = norms
        self._calls: list[_ObservedCall] = []
        self._observing = False

    def __enter__(self) -> "Omega":
        if self._observing:
            raise RuntimeError("Omega: already observing; one `with` at a time")
        self._calls.clear()
        self._capture.problems.clear()
        self._capture.__enter__()
        self._observing = True
        return self

    def __exit__(self, *raised: object) -> None:
        self._capture.__exit__()
        self._observing = False
        if raised[0] is not None:
            self._calls.clear()

    def penalty(self) -> Tensor:
        """Ω of the pass inside the `with`, a scalar whose backward gives ∂⁺Ω/∂W_hh.

        Raises:
            RuntimeError: no gradient reached any recurrent layer inside the `with`, or a call could not be captured.
        """
        for name, why in self._capture.problems.items():
            raise RuntimeError(f"Omega: {name or 'the model'}: {why}")
        observed = [call for call in self._calls if call.errors]
        if not observed:
            raise RuntimeError(
                "Omega: no gradient reached a recurrent layer; call the model and loss.backward() inside the `with`"
            )
        # The sum of many small numbers: in float64, then in the weights' own dtype.
        with full_precision():
            parts = [
                self._of_cell(h) if isinstance(h.call.module, nn.RNNCellBase) else self._of_module(h) for h in observed
            ]
        return torch.stack(parts).sum().to(weights_dtype(observed[0].call.module))

    def _after(self, call: Call) -> None:
        states, cell = call.states, isinstance(call.module, nn.RNNCellBase)
        attached = any(s.requires_grad for s in as_states(call.hx))
        fused = cell and not call.h_comes_from_returned_c
        outputs = states if cell else (call.y, *states)
        call.x, call.hx, call.output = _detached(call.x), _detached(call.hx), _detached(call.output)
        observed = _ObservedCall(call, attached, fused)
        self._calls.append(observed)
        observed.observe(outputs)

    def _of_cell(self, observed: _ObservedCall) -> Tensor:
        """One step of a loop. Its δ are the outputs' own: autograd has summed every use of them."""
        call = observed.call
        if not observed.attached:
            return torch.zeros((), dtype=torch.float64, device=call.x.device)
        (layer,) = layers_of(call.module)
        with evaluating(call.module):
            w = layer.weights()
        x, *batched = (v.to(w.w_ih.dtype).reshape(-1, v.shape[-1]) for v in (call.x, *as_states(call.hx)))
        with torch.no_grad():
            new = layer.cell.advance(layer.cell.project(x, w), tuple(batched), w)
            at = Point(layer.cell, w.detach(), x, tuple(batched), new)
            d = [
                observed.errors.get(i, torch.zeros_like(s)).to(x.dtype).reshape(batched[0].shape)
                for i, s in enumerate(as_states(call.output))
            ]
            if not observed.fused:
                d = list(_arrived(at, tuple(d)))
        return self._omega(at, w, tuple(d), None)

    def _of_module(self, observed: _ObservedCall) -> Tensor:
        """Every layer and direction of one call, from the last to the first."""
        call, module = observed.call, observed.call.module
        assert isinstance(module, nn.RNNBase | CellModule)
        # With gradients enabled: a parametrized weight is computed here.
        with evaluating(module):
            layers = layer_directions(module)
        with torch.no_grad():
            inputs, states = detached_call(module, call.x, call.hx, call.lengths)
            masks = drawn_again(module, inputs, call.rng).masks

            def run(layer: LayerDirection, x: Tensor, state: State) -> engine.Trace:
                weights = layer.weights.detach()
                return engine.trace(layer.cell, x, state, weights, inputs.lengths, layer.reverse, adjoint_follows=True)

            traces = run_layers(layers, inputs.x, states, run, masks)
        dy = output_error(module, inputs, observed.errors.get(0))
        dfinal = [final_error(inputs, observed.errors.get(i + 1)) for i in range(len(traces[0].final))]
        parts: list[Tensor] = []

        def back(place: int, own: Tensor | None, ends: tuple[Tensor | None, ...], want_dx: bool) -> Tensor | None:
            tr = traces[place]
            with torch.no_grad():
                deltas = engine.adjoint(tr, own, ends, getattr(module, "clip", None))
                d, dx = _arrived(tr, deltas.dstate), deltas.da @ tr.weights.w_ih if want_dx else None
            parts.append(self._omega(tr, layers[place].weights, d, _counted(tr)))
            return dx

        descend_layers(layers, dy, dfinal, masks, back)
        return torch.stack(parts).sum()

    def _omega(self, at: Point, w: Weights, d: State, counted: Tensor | None) -> Tensor:
        """Σ_t Ω_t, mean over samples; d `[..., B, ·]` is the adjoint of the full state, counted `[..., B]`."""
        immediate = Weights(w.w_ih.detach(), w.w_hh, None, None, w.w_hr, w.v)
        norm = torch.stack([torch.linalg.vector_norm(s, dim=-1, dtype=torch.float64) for s in d]).norm(dim=0)
        present = norm > 0 if counted is None else counted & (norm > 0)
        # A unit vector, so that the ratio's numerator is of order 1, however far the gradient has vanished.
        safe = torch.where(norm > 0, norm, 1.0).unsqueeze(-1)
        unit = tuple((s.double() / safe).to(s.dtype) for s in d)
        with torch.no_grad():
            partials = at.partials
        back = torch.cat(calculus.adjoint(at.cell, partials, unit, immediate).previous, dim=-1)
        # Absent rows are zero vectors, whose norm would have no derivative.
        gain = torch.linalg.vector_norm(torch.where(present.unsqueeze(-1), back, 1.0), dim=-1, dtype=torch.float64)
        deviation = gain - 1 if self._norms == "plain" else gain**2 - 1
        return torch.where(present, deviation**2, 0.0).sum() / norm.shape[-1]


def _detached(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.detach())
    if isinstance(value, tuple | list):
        return tuple(map(_detached, value))
    return value.detach() if isinstance(value, Tensor) else value


def _arrived(at: Point, total: State) -> State:
    """The adjoint of s_t as independent coordinates, from the total derivatives: without what passes through another
    state of the same step (for the LSTM the part of δc_t that passes through h_t)."""
    states, w = at.cell.states, at.weights
    found = dict(zip(states, total, strict=True))
    unprojected = dict(found)
    if w.w_hr is not None:
        unprojected[states[0]] = total[0] @ w.w_hr
    for (a, b), u in at.partials.made.items():
        found[b] = found[b] - u * unprojected[a]
    return tuple(found[a] for a in states)


def _counted(tr: engine.Trace) -> Tensor:
    """[T, B] True at the steps a sample reads, except its first."""
    T, B = tr.x.shape[:2]
    on = tr.x.new_ones(T, B, dtype=torch.bool) if tr.active is None else tr.active.squeeze(-1).clone()
    if tr.reverse:
        lengths = on.sum(0)
        return on & (torch.arange(T, device=on.device)[:, None] < lengths - 1)
    on[next(reading_order(tr))] = False
    return on
