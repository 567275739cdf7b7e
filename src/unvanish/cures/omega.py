"""Ω, the vanishing-gradient regulariser: an error should keep its length from one step to the one before."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.cells import Point, State, Weights, calculus
from unvanish.cures.layers import layers_of, recurrent_modules
from unvanish.flow.stack import reading_order
from unvanish.nn.modules import (
    LayerDirection,
    as_states,
    detached_call,
    dropout_masks,
    evaluating,
    final_error,
    full_precision,
    hear_gradient,
    layer_directions,
    output_error,
    run_layers,
)


@dataclass
class _Call:
    """One forward call of a recurrent module, detached, and the error that came back to its outputs."""

    module: Any
    x: Any
    hx: Any
    lengths: Any
    rng: Tensor | None
    """the generator before the call, where it drew dropout"""
    attached: bool
    """whether the state it started from was part of the graph"""
    output: Any = None
    fused: bool = False
    """h_t and c_t of one autograd node: ∂E/∂c_t then lacks the path through h_t"""
    errors: dict[int, Tensor] = field(default_factory=dict)
    """output (0: y or h, then the final states) → its error"""

    def listen(self, outputs: tuple[Tensor, ...]) -> None:
        for i, output in enumerate(outputs):
            if output.requires_grad:
                hear_gradient(output, self._catcher(i))

    def _catcher(self, i: int) -> Callable[[Tensor], None]:
        def catch(d: Tensor) -> None:
            self.errors[i] = self.errors[i] + d.detach() if i in self.errors else d.detach()

        return catch


class Omega:
    """Ω = Σ_t ( ‖J_tᵀ δ_t‖ / ‖δ_t‖ − 1 )²,  J_t = ∂s_t/∂s_{t-1},  δ_t = ∂E/∂s_t: the error keeps its length.

        norms="plain"    Ω_t = ( ‖J_tᵀ δ_t‖ / ‖δ_t‖ − 1 )²       equation 9
        norms="squared"  Ω_t = ( ‖J_tᵀ δ_t‖² / ‖δ_t‖² − 1 )²     equation 10

    As in the paper only the immediate derivative is taken: states, gates and δ are constants, and ∂⁺Ω/∂W sees W_hh
    where it stands in J_tᵀ δ_t = W_hhᵀ δa_t + (the carry's share). So no second backward pass through the network is
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
        TypeError: model is no module.
        ValueError: there is no recurrent layer, or `norms` is neither.

    Source: Pascanu, Mikolov & Bengio 2013, section 3.3, equations 9 and 10. The paper's state is a_t, with h = φ(a);
    here it is h_t, the same recurrence half a step later.

    Limits: δ is the summed error of all steps, so Ω keeps the *sum* alive, not each source's part. It takes an error at
    every step seriously, however small. With clipping in the recurrence, δ are the clipped ones.

    >>> rnn, x = nn.RNN(2, 3), torch.randn(5, 1, 2)
    >>> with Omega(rnn) as omega:
    ...     rnn(x)[0][-1].sum().backward()
    >>> omega.penalty().backward()
    """

    def __init__(self, model: nn.Module, norms: Literal["plain", "squared"] = "plain") -> None:
        if norms not in ("plain", "squared"):
            raise ValueError(f"norms: expected 'plain' (equation 9) or 'squared' (equation 10), got {norms!r}")
        self._modules = recurrent_modules(model, "Omega")
        self._norms = norms
        self._calls: list[_Call] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "Omega":
        if self._handles:
            raise RuntimeError("Omega: already listening; one `with` at a time")
        self._calls.clear()
        for module in self._modules.values():
            self._handles += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after),
            ]
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if raised[0] is not None:
            self._calls.clear()

    def penalty(self) -> Tensor:
        """Ω of the pass inside the `with`, a scalar whose backward gives ∂⁺Ω/∂W_hh.

        Raises:
            RuntimeError: no error came back to any recurrent layer inside the `with`.
        """
        heard = [call for call in self._calls if call.errors]
        if not heard:
            raise RuntimeError(
                "Omega: no error came back to a recurrent layer; call the model and loss.backward() inside the `with`"
            )
        # The sum of many small numbers: in float64, then in the weights' own dtype.
        with full_precision():
            parts = [self._of_cell(c) if isinstance(c.module, nn.RNNCellBase) else self._of_module(c) for c in heard]
        return torch.stack(parts).sum().to(next(heard[0].module.parameters()).dtype)

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        x = args[0] if args else kwargs["input"]
        hx = args[1] if len(args) > 1 else kwargs.get("hx")
        draws = isinstance(module, nn.RNNBase) and module.training and module.dropout > 0 and module.num_layers > 1
        if draws and next(module.parameters()).device.type != "cpu":
            raise RuntimeError("Omega: dropout drawn inside cuDNN can't be drawn again; use one module per layer")
        rng = torch.get_rng_state() if draws else None
        attached = any(s.requires_grad for s in as_states(hx))
        self._calls.append(_Call(module, _detached(x), _detached(hx), kwargs.get("lengths"), rng, attached))

    def _after(self, module: Any, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        call = next(c for c in reversed(self._calls) if c.module is module)
        call.output = _detached(output)
        if isinstance(module, nn.RNNCellBase):
            states = as_states(output)
            call.fused = len(states) == 2 and states[0].grad_fn is states[1].grad_fn
            call.listen(states)
        else:
            y, final = output
            y = y.data if isinstance(y, PackedSequence) else y
            call.listen((y, *as_states(final)))

    def _of_cell(self, call: _Call) -> Tensor:
        """One step of a loop. Its δ are the outputs' own: autograd has summed every use of them."""
        if not call.attached:
            return torch.zeros((), dtype=torch.float64, device=call.x.device)
        (layer,) = layers_of(call.module)
        with evaluating(call.module):
            w = layer.weights()
        x, *batched = (v.to(w.w_ih.dtype).reshape(-1, v.shape[-1]) for v in (call.x, *as_states(call.hx)))
        with torch.no_grad():
            new = layer.cell.advance(layer.cell.project(x, w), tuple(batched), w)
            at = Point(layer.cell, w.detach(), x, tuple(batched), new)
            d = [
                call.errors.get(i, torch.zeros_like(s)).to(x.dtype).reshape(batched[0].shape)
                for i, s in enumerate(as_states(call.output))
            ]
            if not call.fused:
                d = list(_arrived(at, tuple(d)))
        return self._omega(at, w, tuple(d), None)

    def _of_module(self, call: _Call) -> Tensor:
        """Every layer and direction of one call, from the last to the first."""
        module = call.module
        # With gradients enabled: a parametrized weight is computed here.
        with evaluating(module):
            layers = layer_directions(module)
        with torch.no_grad():
            inputs, states = detached_call(module, call.x, call.hx, call.lengths)
            masks = dropout_masks(module, inputs, call.rng)

            def run(layer: LayerDirection, x: Tensor, state: State) -> engine.Trace:
                return engine.trace(layer.cell, x, state, layer.weights.detach(), inputs.lengths, layer.reverse)

            traces = run_layers(layers, inputs.x, states, run, masks)
        D = 2 if module.bidirectional else 1
        dy = output_error(module, inputs, call.errors.get(0))
        dfinal = [final_error(inputs, call.errors.get(i + 1)) for i in range(len(traces[0].final))]
        total = torch.zeros((), dtype=torch.float64, device=inputs.x.device)
        for first in range(len(layers) - D, -1, -D):
            below = []
            for place in range(first, first + D):
                tr, layer = traces[place], layers[place]
                with torch.no_grad():
                    dy_d = None if dy is None else dy.tensor_split(D, dim=-1)[place - first]
                    ends = tuple(None if d is None else d[place] for d in dfinal)
                    flow = engine.adjoint(tr, dy_d, ends, getattr(module, "clip", None))
                    below.append(flow.da @ tr.weights.w_ih)
                    d = _arrived(tr, flow.dstate)
                total = total + self._omega(tr, layer.weights, d, _counted(tr))
            dy = torch.stack(below).sum(0)
            if first and masks:
                dy = dy * masks[first // D - 1]
        return total

    def _omega(self, at: Point, w: Weights, d: State, counted: Tensor | None) -> Tensor:
        """Σ_t Ω_t, mean over samples; d `[..., B, ·]` is the adjoint of the full state, counted `[..., B]`."""
        immediate = Weights(w.w_ih.detach(), w.w_hh, None, None, w.w_hr, w.v)
        norm = torch.stack([torch.linalg.vector_norm(s, dim=-1, dtype=torch.float64) for s in d]).norm(dim=0)
        present = norm > 0 if counted is None else counted & (norm > 0)
        # A unit vector: the ratio's numerator is then of order 1, however far the error has vanished.
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
    """[T, B] True at the steps a sample reads, but for its first."""
    T, B = tr.x.shape[:2]
    on = tr.x.new_ones(T, B, dtype=torch.bool) if tr.active is None else tr.active.squeeze(-1).clone()
    if tr.reverse:
        lengths = on.sum(0)
        return on & (torch.arange(T, device=on.device)[:, None] < lengths - 1)
    on[next(reading_order(tr))] = False
    return on
