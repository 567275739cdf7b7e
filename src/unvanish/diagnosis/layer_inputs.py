"""The input of each recurrent layer or cell of a model and the gradients at its output, from one training pass.

The pass runs on a copy: the user's model, its gradients, buffers, mode and random numbers stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from unvanish.capture import Call, Capture, Returned, link, returned
from unvanish.diagnosis.cell_loop import CellLoop
from unvanish.diagnosis.structure import detached_copy
from unvanish.diagnosis.subject import on_engine, out_of_eval_mode
from unvanish.nn.accelerate import accelerate
from unvanish.nn.modules import (
    CellModule,
    LayerDirection,
    SequenceModule,
    as_states,
    evaluating,
    layer_directions,
    on_gradient,
    time_major,
)
from unvanish.nn.recurrent import Recurrent
from unvanish.seeding import seeded


@dataclass
class Given:
    """One recurrent module: its input over all steps, and the gradient at its output; time-major, the user's order."""

    path: str
    layer: SequenceModule
    """in float64, without dropout"""
    x: Tensor
    """[T, B, I]"""
    hx: Any
    lengths: Tensor
    """[B]"""
    error: Tensor
    """[T, B, D·R] ∂E/∂h_t of the last layer, from outside the module"""
    cuts: tuple[int, ...] = ()
    """steps whose incoming state was detached from the step before"""
    elsewhere: bool = False
    """whether a gradient also arrived through the returned final states, those of c or of lower layers"""
    cell: bool = False
    """whether it is a cell that the model steps by hand"""

    def name(self, place: LayerDirection) -> str:
        """ "encoder.lstm.l0"; of a cell its path."""
        return self.path if self.cell else f"{self.path}.{place.name}".removeprefix(".")


@dataclass
class _Call:
    x: Tensor
    lengths: Tensor
    hx: tuple[Tensor, ...] | None
    goes_on: bool
    """whether it starts from exactly the state that the previous call returned"""
    cut: bool
    """whether that state arrived without its graph"""
    final: tuple[Tensor, ...]
    packed: PackedSequence | None
    batch_first: bool
    y: Tensor
    error: Tensor | None = None
    final_error: dict[int, Tensor] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Whether a gradient came back to it."""
        came = (*self.final_error.values(), *(() if self.error is None else (self.error,)))
        return any(bool((error != 0).any()) for error in came)

    def full_error(self) -> Tensor:
        """[T, B, D·R]"""
        if self.error is None:
            T, B = self.x.shape[:2]
            return self.x.new_zeros(T, B, self.y.shape[-1])
        if self.packed is not None:
            return pad_packed_sequence(self.packed._replace(data=self.error))[0]
        error = self.error.unsqueeze(1) if self.error.dim() == 2 else self.error
        return error.transpose(0, 1) if self.batch_first and self.error.dim() == 3 else error


def capture(model: nn.Module, loss: Callable[[nn.Module], Tensor], seed: int) -> tuple[list[Given], tuple[str, ...]]:
    """Run `loss(copy of model)` forward and backward, and observe every nn.RNN, nn.LSTM and nn.GRU, and their cells.

    Returns:
        The layers found, and notes on recurrent parts that could not be followed.

    Raises:
        TypeError: model is not a module.
        ValueError: there is no recurrent layer, a weight or a layer's input is not finite, the loss is no finite
            scalar or depends on no recurrent layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    twin = out_of_eval_mode(on_engine(detached_copy(model)))
    calls: dict[str, list[_Call]] = {}
    last: dict[str, Returned] = {}
    seen = Capture(
        twin,
        lambda call: loops[call.name].after(call) if call.name in loops else _keep(call, calls, last),
        lambda call: loops[call.name].before(call) if call.name in loops else True,
    )
    modules = {name: m for name, m in seen.parts.modules.items() if isinstance(m, SequenceModule)}
    loops = {name: CellLoop(name, m) for name, m in seen.parts.modules.items() if isinstance(m, nn.RNNCellBase)}
    if not seen.parts.modules:
        raise ValueError(
            "model: expected an nn.RNN, nn.LSTM, nn.GRU, one of their cells or unvanish.nn.Recurrent in it, found none"
        )
    for name, parameter in twin.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(f"model: weight {name!r} holds a NaN or infinity; nothing can be measured of it")
        parameter.requires_grad_(True)
        parameter.grad = None
    with seeded(seed), torch.enable_grad():
        with seen:
            value = loss(twin)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"loss: expected a scalar tensor, got {getattr(value, 'shape', type(value).__name__)}")
        if not bool(value.isfinite()):
            raise ValueError(f"loss: expected a finite number, got {value.item()}")
        if not value.requires_grad:
            raise ValueError("loss: it does not depend on the model's weights; was the graph detached?")
        value.backward()
        found = [_joined(name, module, calls[name]) for name, module in modules.items() if calls.get(name)]
        notes = tuple(f"{name or 'the model'}: not measured: {why}" for name, why in seen.problems.items())
        notes += tuple(loop.unseen for loop in loops.values() if loop.unseen)
        found += [_looped(loop) for loop in loops.values() if loop.chains and not loop.unseen]
    found = [given for given in found if given.elsewhere or bool((given.error != 0).any())]
    if not found:
        raise ValueError(
            "; ".join(notes)
            or "loss: expected one that depends on a recurrent layer, but no error comes back to any; it does not "
            "depend on them: was a state detached, or its output left unused?"
        )
    return found, notes


def _keep(call: Call, calls: dict[str, list[_Call]], last: dict[str, Returned]) -> None:
    module, x, y = call.module, call.x, call.output[0]
    assert isinstance(module, SequenceModule)
    packed = x if isinstance(x, PackedSequence) else None
    with torch.no_grad():
        if packed is not None:
            padded, lengths = pad_packed_sequence(packed)
        else:
            inputs = time_major(module, x, call.lengths)
            padded, lengths = inputs.x, inputs.lengths
        T, B = padded.shape[:2]
        lengths = torch.full((B,), T) if lengths is None else lengths.cpu()
    given, before = as_states(call.hx), last.get(call.name)
    found = link(given, before)
    # Only the effect of the inputs is measured: a state that was changed in between starts a new sequence.
    unchanged = found is not None and before is not None and _same(given, before.states)
    last[call.name] = returned(call.states)
    kept = _Call(
        padded.detach(), lengths, tuple(_rows(h.detach()) for h in given) or None, unchanged,
        found is not None and found.cut, tuple(_rows(s.detach()) for s in call.states), packed, module.batch_first,
        call.y.detach(),
    )  # fmt: skip
    if packed is not None:
        kept.packed = PackedSequence(y.data.detach(), y.batch_sizes, y.sorted_indices, y.unsorted_indices)
    calls.setdefault(call.name, []).append(kept)
    on_gradient(call.y, lambda grad: setattr(kept, "error", grad.detach()))
    for i, state in enumerate(call.states):
        on_gradient(state, lambda grad, i=i: kept.final_error.__setitem__(i, _rows(grad.detach())))


def _rows(h: Tensor) -> Tensor:
    """[L·D, B, ·]"""
    return h.unsqueeze(1) if h.dim() == 2 else h


def _joined(path: str, module: SequenceModule, calls: list[_Call]) -> Given:
    """Calls that continue from each other's last state, as one sequence: the longest chain that a gradient reaches."""
    chains: list[list[_Call]] = []
    for call in calls:
        goes_on = chains and call.goes_on and not module.bidirectional
        (chains[-1].append if goes_on else lambda c: chains.append([c]))(call)
    chain = max(chains, key=lambda c: (any(call.reached for call in c), sum(len(call.x) for call in c)))
    D = 2 if module.bidirectional else 1
    errors, elsewhere, cuts, t = [], False, [], 0
    for number, call in enumerate(chain):
        if number and call.cut:
            cuts.append(t)
        t += len(call.x)
        error = call.full_error().double()
        last = number == len(chain) - 1
        for i, grad in call.final_error.items():
            if i == 0 and last:
                top = grad[-D:].double()
                error = _at_the_end(error, top, call.lengths)
                elsewhere |= bool((grad[:-D] != 0).any())
            elif last:
                elsewhere |= bool((grad != 0).any())
        errors.append(error)
    x = _finite(path, torch.cat([call.x for call in chain]).double())
    with evaluating(module):
        layer = _plain(module)
    hx = chain[0].hx
    states = None if hx is None else tuple(h.double() for h in hx)
    return Given(
        path,
        layer,
        x,
        states if states is None or len(states) != 1 else states[0],
        torch.stack([call.lengths for call in chain]).sum(0),
        torch.cat(errors),
        tuple(cuts),
        elsewhere,
    )


def _looped(loop: CellLoop) -> Given:
    """The longest chain of a cell's calls."""
    x, error, start, at_c = loop.sequence()
    with evaluating(loop.cell):
        layer = loop.layer()
    hx = start if start is None or len(start) != 1 else start[0]
    lengths = torch.full(x.shape[1:2], len(x))
    cuts = tuple(loop.longest.cuts)
    return Given(loop.path, layer, _finite(loop.path, x), hx, lengths, error, cuts, at_c, cell=True)


def _finite(path: str, x: Tensor) -> Tensor:
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"batch: the input of {path or 'the layer'} holds a NaN or infinity; nothing can be measured of it"
        )
    return x


def _same(given: tuple[Tensor, ...], final: tuple[Tensor, ...]) -> bool:
    return all(g.shape == f.shape and torch.equal(g, f) for g, f in zip(given, final, strict=True))


def _at_the_end(error: Tensor, top: Tensor, lengths: Tensor) -> Tensor:
    """Adds ∂E/∂h_n of the last layer to the step it belongs to: a sample's own last, or for the reverse its first."""
    error, R, B = error.clone(), top.shape[-1], error.shape[1]
    samples = torch.arange(B)
    error[(lengths - 1).clamp_min(0), samples, :R] += top[0]
    if len(top) == 2:
        error[0, :, R:] += top[1]
    return error


def _plain(module: SequenceModule) -> SequenceModule:
    """A layer of the same weights in float64 on our engine, time-major, free of parametrizations and dropout."""
    if isinstance(module, CellModule):
        return _plain_of_a_cell(module)
    family = next(base for base in type(module).__mro__ if base.__module__ in _FAMILIES)
    options = {key: getattr(module, key) for key in ("nonlinearity",) if hasattr(module, key)}
    layer = family(
        module.input_size, module.hidden_size, module.num_layers, bias=module.bias,
        bidirectional=module.bidirectional, **({"proj_size": module.proj_size} if module.proj_size else {}), **options,
    ).double()  # fmt: skip
    with torch.no_grad():
        for to, given in zip(layer_directions(layer), layer_directions(module), strict=True):
            for mine, theirs in zip(to.weights, given.weights, strict=True):
                if mine is not None and theirs is not None:
                    mine.copy_(theirs)
    return accelerate(layer.to(next(module.parameters()).device).requires_grad_(False), strict=True)


def _plain_of_a_cell(module: CellModule) -> Recurrent:
    layer = Recurrent(
        module.cell, module.input_size, module.hidden_size, module.num_layers, module.bias,
        bidirectional=module.bidirectional, dtype=torch.float64, device=next(module.parameters()).device,
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            weight.copy_(getattr(module, name))
    return layer.requires_grad_(False)


_FAMILIES = ("unvanish.nn.layers", "torch.nn.modules.rnn")
