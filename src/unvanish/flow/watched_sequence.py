"""One watched forward pass: its calls, the gradients that came back to them, and the resulting record.

A sequence is a list of segments that follow one another, each starting from the state the one before returned: calls
of a module, steps of a cell, marked states. Everything kept is detached, so a sequence lives as long as the graph
whose hooks hold it, and never keeps a graph alive.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unvanish import engine
from unvanish.capture import Call, Link
from unvanish.cells import State, Weights, calculus
from unvanish.engine.precision import full_precision
from unvanish.flow.nonfinite import NonFiniteOrigin, first_origin, origin_of_nonfinite
from unvanish.flow.record import LayerFlow
from unvanish.flow.sketch import sketches_of
from unvanish.flow.summary import healthy, summarise
from unvanish.flow.transfer import numbers
from unvanish.nn.modules import (
    CellModule,
    LayerDirection,
    RecurrentModule,
    SequenceModule,
    as_states,
    cell_of,
    evaluating,
    on_gradient,
)

Errors = dict[Hashable, Any]
"""where an error arrived (segment and output) → ∂E/∂(that output), or what was measured of it in the backward pass"""


@dataclass
class Measured:
    """One layer's record, and its own ∂E/∂W to compare with autograd's."""

    flow: LayerFlow
    gradients: dict[Hashable, Tensor] = field(default_factory=dict)
    """weight key → Σ_t g_t, whole for a `RecordedSequence`, as its `sketch` for any other"""
    nonfinite: NonFiniteOrigin | None = None
    """where a NaN or infinity first appeared"""


class Sequence(ABC):
    """Segments of one module, and the gradients that came back to them."""

    def __init__(self, name: str, catch: Callable[["Sequence", Hashable, Any], None]) -> None:
        self.name = name
        self.errors: Errors = {}
        """summed over all backward passes so far, as `.grad` is"""
        self.handles: list[RemovableHandle] = []
        self.detached: list[int] = []
        self.resets: dict[int, Tensor] = {}
        """step → [B] samples whose state was set to zero before it"""
        self.ragged = False
        """whether samples of a call so far had different lengths"""
        self.number = 0
        self.era: tuple[int, ...] = (0, 0)
        self.differentiated = False
        """whether a gradient of it has been kept as part of a graph, to be differentiated again"""
        self.rounding = 0.0
        """the largest relative difference to the run that rounding explains"""
        self._catch = catch

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps so far."""

    @abstractmethod
    def measure(self, errors: Errors) -> list[Measured]:
        """The records for these gradients. A segment that no gradient reached has zero flow."""

    @full_precision()
    def arrive(self, errors: Errors) -> list[Measured]:
        """The records of all gradients so far, including these; their ∂E/∂W are of these alone."""
        found = self.measure(errors)
        if not self.errors:
            self.errors = errors
            return found
        # A second backward through the same graph: gradients add up, as in .grad.
        for key, error in errors.items():
            self.errors[key] = self.errors[key] + error if key in self.errors else error
        total = self.measure(self.errors)
        return [replace(part, gradients=now.gradients) for part, now in zip(total, found, strict=True)]

    def goes_on(self, link: Link) -> None:
        """The next step starts from the state of the last."""
        if link.cut:
            self.detached.append(self.steps)
        if link.resets is not None:
            self.resets[self.steps] = link.resets.cpu()

    def observe(self, tensor: Tensor, key: Hashable) -> None:
        """Be notified of the gradient that reaches `tensor`."""
        if tensor.requires_grad:
            self.handles.append(on_gradient(tensor, lambda grad: self._catch(self, key, grad.detach())))

    def reset_steps(self, T: int, B: int) -> Tensor | None:
        """[T, B] where samples were reset."""
        if not self.resets:
            return None
        found = torch.zeros(T, B, dtype=torch.bool)
        for t, which in self.resets.items():
            found[t, : len(which)] = which
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


class CellSequence(Sequence):
    """Steps of an nn.RNNCell, nn.LSTMCell or nn.GRUCell in the user's own loop."""

    def __init__(self, name: str, module: nn.RNNCellBase, catch: Any, want_partial: bool) -> None:
        super().__init__(name, catch)
        self.want_partial = want_partial
        self.module = module
        self.cell = cell_of(module)
        self.x: list[Tensor] = []
        self.previous: list[State] = []
        self.weights: Weights | None = None
        self._used: tuple[Tensor | None, ...] = ()
        self.last: State = ()
        """the states that the last step returned"""
        self._versions: tuple[int, ...] = ()
        self.exposed: list[bool] = []

    @property
    def steps(self) -> int:
        return len(self.x)

    def add(self, call: Call) -> None:
        """A step that has just returned."""
        t, module, x, states = self.steps, self.module, call.x, call.states
        self.rounding = max(self.rounding, rounding(call.y))
        given = as_states(call.hx) or tuple(torch.zeros_like(s) for s in states)
        p = module._parameters
        used = tuple(p.get(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        # Detached weights share their memory with the parameters: they are read once, unless they are computed.
        if self.weights is None or used[0] is None or any(a is not b for a, b in zip(used, self._used, strict=True)):
            with torch.no_grad(), evaluating(module):
                self.weights = Weights(module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh).detach()
            self._used = used
        # Under autocast a step may be given another dtype than the weights'.
        dtype = self.weights.w_ih.dtype
        self.x.append(_batched(x.detach().to(dtype)))
        self.previous.append(tuple(_batched(s.detach().to(dtype)) for s in given))
        self.exposed.append(call.h_comes_from_returned_c)
        self.last = tuple(_batched(s.detach()) for s in states)
        self._versions = tuple(s._version for s in self.last)
        for i, state in enumerate(states):
            self.observe(state, (t, i))

    def measure(self, errors: Errors) -> list[Measured]:
        assert self.weights is not None
        T, B = self.steps, max(x.shape[0] for x in self.x)
        lengths = torch.tensor([sum(x.shape[0] > b for x in self.x) for b in range(B)])
        ragged = any(x.shape[0] != B for x in self.x)
        active = engine.active_steps(lengths, T, self.x[0].device) if ragged else None
        x = _stack(self.x, B)
        previous = tuple(_stack(list(column), B) for column in zip(*self.previous, strict=True))
        state = self.cell.advance(self.cell.project(x, self.weights), previous, self.weights)
        tr = engine.Trace(self.cell, self.weights, x, previous, state, tuple(s[-1] for s in state), active, False)
        d = tuple(
            _stack(
                [_batched(errors[t, i]).to(s.dtype) if (t, i) in errors else torch.zeros_like(s[t]) for t in range(T)],
                B,
            )
            for i, s in enumerate(state)
        )
        for (a, b), u in tr.partials.made.items():
            # Autograd's ∂E/∂c_t includes the path through h_t of the same step, which the adjoint adds itself.
            total = torch.tensor(self.exposed, device=x.device)[:, None, None]
            i, j = self.cell.states.index(b), self.cell.states.index(a)
            d = (*d[:i], torch.where(total, d[i] - u * d[j], d[i]), *d[i + 1 :])
        step = calculus.adjoint(self.cell, tr.partials, d, self.weights)
        flow = engine.Deltas(step.state, step.da, step.da_hh, tuple(s[0] for s in step.previous))
        record = summarise(self.name, tr, flow, self.want_partial, lengths)
        places = {name: key for name, (key, _) in observable_weights(self.module).items()}
        mine = zip(("weight_ih", "weight_hh"), sketches_of(tr, flow), strict=True)
        gradients = {places[name]: g for name, g in mine if name in places and g is not None}
        # A tensor changed in place since then says nothing about the run.
        kept = [i for i, s in enumerate(self.last) if s._version == self._versions[i]]
        last = tuple(self.last[i] for i in kept)
        problem = apart(
            last, tuple(state[i][-1][: len(real)] for i, real in zip(kept, last, strict=True)), self.rounding
        )
        resets = self.reset_steps(T, B)
        record = replace(record, detached=tuple(self.detached), resets=resets, problem=problem)
        return [
            Measured(record, gradients, None if healthy(record) else origin_of_nonfinite(self.name, tr, d[0], flow))
        ]


class MarkSequence(Sequence):
    """States shown one per step, by `uv.mark` or by name."""

    def __init__(self, name: str, catch: Any) -> None:
        super().__init__(name, catch)
        self.like: list[Tensor] = []

    @property
    def steps(self) -> int:
        return len(self.like)

    def add(self, h: Tensor) -> None:
        """The state of the next step."""
        self.observe(h, self.steps)
        self.like.append(_batched(h.detach()))

    def measure(self, errors: Errors) -> list[Measured]:
        B = max(h.shape[0] for h in self.like)
        lengths = torch.tensor([sum(h.shape[0] > b for h in self.like) for b in range(B)])
        d = [_batched(errors[t]) if t in errors else torch.zeros_like(h) for t, h in enumerate(self.like)]
        norms = [torch.linalg.vector_norm(step.flatten(1), dim=1, dtype=torch.float64) for step in d]
        record = LayerFlow(self.name, "mark", (), lengths, _stack(norms, B).cpu())
        whole = torch.stack([h.isfinite().all() for h in self.like]).all()
        sound = bool(record.dh.isfinite().all()) and bool(whole)
        return [Measured(record, nonfinite=None if sound else self._origin(norms))]

    def _origin(self, norms: list[Tensor]) -> NonFiniteOrigin | None:
        """The origin of a NaN or infinity: the state in the forward pass, its gradient in the backward pass."""
        for t, h in enumerate(self.like):
            if not bool(h.isfinite().all()):
                return NonFiniteOrigin(True, self.name, _kind(h), t, place="the state")
        for t in reversed(range(len(norms))):
            if not bool(norms[t].isfinite().all()):
                return NonFiniteOrigin(False, self.name, _kind(norms[t]), t, place="the gradient at the state")
        return None


def _kind(v: Tensor) -> str:
    return "NaN" if bool(v.isnan().any()) else "infinity"


def apart(real: State, replayed: State, rounding: float) -> str | None:
    """The problem to report if a replay's final state differs from the run's by more than rounding explains; else
    None."""
    for a, b in zip(real, replayed, strict=True):
        if a.shape != b.shape:
            return f"the replay ends in a state of shape {tuple(b.shape)}, the run in one of {tuple(a.shape)}"
        largest = [v.abs().max() for v in (a.double(), a.double() - b.double())] if a.numel() else []
        size, off = numbers(largest) or (0.0, 0.0)
        allowed = rounding * max(size, 1.0)
        if off > allowed:
            return (
                f"the replay of the layer ends {off:.1e} from where the run ended (rounding explains {allowed:.0e}): "
                "part of what it computed is hidden, or it amplifies rounding, as a chaotic layer does"
            )
    return None


def rounding(y: Tensor) -> float:
    """The largest difference that rounding explains in a long sequence, relative to the size of its states.

    Args:
        y: what the run has just returned, in the dtype and under the autocast that it ran in.
    """
    least = 1e-2 if y.is_cuda and y.dtype == torch.float32 else 0.0  # products in TF32
    dtypes, device = [y.dtype], y.device.type
    # Under autocast torch's GRU may return float32 and yet multiply in bfloat16.
    if y.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max(least, min(0.1, 2e3 * max(torch.finfo(dtype).eps for dtype in dtypes)))


def observable_weights(module: RecurrentModule) -> dict[str, tuple[Hashable, Tensor]]:
    """Name → (key, tensor) of the weights that the last forward pass used and whose ∂E/∂W can be observed.

    A cell recomputes a parametrised weight at each step, where no hook can be set: the residual leaves it out.
    """
    if isinstance(module, nn.RNNBase):
        found = zip(module._flat_weights_names, module._flat_weights, strict=True)
    elif isinstance(module, CellModule):
        found = module._parameters.items()
    else:
        found = ((name, module._parameters.get(name)) for name in ("weight_ih", "weight_hh"))
    return {
        name: (weight_key(module, name, w), w)
        for name, w in found
        if w is not None and name.startswith(("weight_ih", "weight_hh"))
    }


def weight_key(module: nn.Module, name: str, weight: Tensor) -> Hashable:
    """A leaf is its own key, shared wherever it is; a parametrised weight is new at each call, so its name is."""
    return id(weight) if weight.is_leaf else (id(module), name)


def weight_keys(module: SequenceModule, layer: LayerDirection) -> dict[Hashable, int]:
    """Key → 0 for W_ih, 1 for W_hh, of one layer and direction; without those whose ∂E/∂W can't be observed."""
    observed, suffix = observable_weights(module), f"l{layer.layer}{'_reverse' if layer.reverse else ''}"
    names = (f"weight_ih_{suffix}", f"weight_hh_{suffix}")
    return {observed[name][0]: i for i, name in enumerate(names) if name in observed}


def _batched(v: Tensor) -> Tensor:
    return v.unsqueeze(0) if v.dim() == 1 else v


def _stack(rows: list[Tensor], B: int) -> Tensor:
    """Stack over steps; a step with fewer samples is filled with zeros."""
    if all(r.shape[0] == B for r in rows):
        return torch.stack(rows)
    return torch.stack([torch.cat([r, r.new_zeros(B - r.shape[0], *r.shape[1:])]) for r in rows])


def _in_order(v: Tensor, order: Tensor) -> Tensor:
    """A field `[T, B]` or `[T, B, G]` with the steps of each sample in the order `[T, B]`."""
    return v.take_along_dim(order if v.dim() == 2 else order[..., None], 0)


def join(pieces: Iterable[Measured], sequence: Sequence) -> Measured:
    """One record of consecutive calls of a sequence, end to end."""
    pieces, detached = tuple(pieces), tuple(sequence.detached)
    flows = [piece.flow for piece in pieces]
    if len(pieces) == 1 and not detached:
        return pieces[0]
    resets = sequence.reset_steps(sum(len(flow.dh) for flow in flows), flows[0].dh.shape[1])
    first = replace(flows[0], detached=detached, resets=resets)
    if len(pieces) == 1:
        return replace(pieces[0], flow=first)
    total: dict[Hashable, Tensor] = defaultdict(lambda: torch.zeros(()))
    for piece in pieces:
        for key, gradient in piece.gradients.items():
            total[key] = total[key] + gradient
    timed = ("dh", "dc", "dgates", "dweight", "gates", "saturation")
    joined = {
        name: torch.cat([getattr(flow, name) for flow in flows])
        for name in timed
        if getattr(flows[0], name) is not None
    }
    given = torch.cat([torch.arange(len(flow.dh))[:, None] < flow.lengths for flow in flows])
    if not given.all():
        # Where the earlier calls were padded, a sample's own steps follow one another; the padding comes after them.
        order = (~given).byte().argsort(dim=0, stable=True)
        joined = {name: v if name == "dweight" else _in_order(v, order) for name, v in joined.items()}
        first = replace(first, resets=None if resets is None else _in_order(resets, order))
    lengths = torch.stack([flow.lengths for flow in flows])
    if first.log_carry is not None:
        share = lengths.sum(1) / lengths.sum()
        joined["log_carry"] = sum(s * flow.log_carry for s, flow in zip(share, flows, strict=True))  # type: ignore[operator]
    problem = next((flow.problem for flow in flows if flow.problem is not None), None)
    record = replace(first, lengths=lengths.sum(0), problem=problem, **joined)
    before = lengths.cumsum(0) - lengths
    origins = [p.nonfinite and p.nonfinite.later(steps) for p, steps in zip(pieces, before, strict=True)]
    return Measured(record, dict(total), first_origin(origins))
