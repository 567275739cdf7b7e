"""Noise in the recurrence that regularises without shortening the memory: zoneout and recurrent dropout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish.cells import Cell, State
from unvanish.cells.noisy import Noisy
from unvanish.cures.layer_weights import finite, layers_of, recurrent_modules
from unvanish.cures.stand_in import StandIn, check_place, take_places
from unvanish.cures.state_read import whole
from unvanish.nn.layers import ADDED
from unvanish.nn.modules import SequenceModule, TimeMajor, as_states, time_major
from unvanish.nn.recurrent import Recurrent


@dataclass(frozen=True)
class Noise:
    """How much noise a layer's recurrence has."""

    zoneout: Mapping[str, float] = field(default_factory=dict)
    """state → the probability that a unit keeps its old value in a step"""
    dropout: float = 0.0
    """the probability that a unit is not read by the matrices of a whole sequence"""

    def of(self, cell: Cell) -> Noisy:
        """The cell with this noise."""
        return Noisy(cell, tuple(self.zoneout), self.dropout > 0)


def zoneout_(model: nn.Module, p: float | Mapping[str, float]) -> nn.Module:
    """In training, let each unit keep its old state at each step with probability p:

        s_t = s_{t-1} + m_t ⊙ (s̃_t − s_{t-1}),  m_t = 0 with probability p, else 1;  in evaluation m_t = 1 − p

    s̃_t is what the cell computes. A unit that is zoned out passes on its state and its gradient unchanged:
    ∂s_t/∂s_{t-1} = 1. So unlike dropout of the state, zoneout both regularises and lengthens the memory: over a lag ℓ
    the expectation of the carry is (p + (1 − p) f)^ℓ.

    Layers become `NoisyLayers` of `unvanish.nn.Recurrent` with the same parameters; an nn.RNNCell, LSTMCell or
    GRUCell gets a hook. Masks are drawn for every sample, unit, step, state and layer. `layer.draw(x)` returns masks,
    and `layer(x, masks=…)` runs with them; otherwise `torch.manual_seed` makes them reproducible.

    Args:
        model: any module with recurrent layers, changed in place; or such a layer itself, which stays as it is.
        p: a probability below 1, of every state; or state → probability, {"h": 0.05, "c": 0.5} for an LSTM as in the
            paper. 0 everywhere removes it.

    Returns:
        model; the new layer if model was a layer over sequences itself. Call it again to change p.

    Raises:
        TypeError: model is not a module, or p is not a probability or a dict of probabilities.
        ValueError: p is out of range or names a state that a cell does not have; there is no recurrent layer; one is
            of a subclass, parametrized, has hooks or a projection.

    Source: Krueger et al. 2017, "Zoneout: regularizing RNNs by randomly preserving hidden activations".

    Limits: runs on the manual rung (on the CPU in the kernels); W_ih grows by an identity block that passes the masks
    through: two to three times the time of nn.LSTM with masks for both states. Masks differ from piece to piece of
    truncated BPTT. With p at c the LSTM's h̃ is computed from c̃, as in the paper.

    >>> layer = zoneout_(nn.LSTM(3, 4), {"c": 0.5})
    >>> layer(torch.zeros(5, 2, 3))[0].shape
    torch.Size([5, 2, 4])
    """
    found = dict(p) if isinstance(p, Mapping) else p
    for state, value in found.items() if isinstance(found, dict) else [("p", found)]:
        if not 0 <= finite(state, value) < 1:
            raise ValueError(f"p: expected probabilities from 0 to below 1, got {value} for {state!r}")

    def noise(cell: Cell, now: Noise) -> Noise:
        rates = found if isinstance(found, dict) else dict.fromkeys(cell.states, float(found))
        unknown = [state for state in rates if state not in cell.states]
        if unknown:
            raise ValueError(f"p: a {cell.name} has the states {', '.join(cell.states)}, got {', '.join(unknown)}")
        return replace(now, zoneout={state: rates[state] for state in cell.states if rates.get(state, 0.0) > 0})

    return _with_noise(model, "zoneout_", noise, _zone_cell)


def recurrent_dropout_(model: nn.Module, p: float) -> nn.Module:
    """In training, hide a random share p of the units from the recurrent matrices, the same units for a whole sequence:

        q_t = W (d ⊙ h_{t-1}) + b,  d = 0 with probability p, else 1/(1 − p);  in evaluation d = 1

    The carry is not affected, so the memory stays long: dropping units of h itself, different ones at each step, would
    shorten it to about 1/p steps. Layers become `NoisyLayers`, see `zoneout_`, with which it can be combined.

    Args:
        model: any module with recurrent layers, changed in place; or such a layer itself, which stays as it is.
        p: a probability below 1; 0 removes it.

    Returns:
        model; the new layer if model was a layer over sequences itself.

    Raises:
        TypeError: model is not a module, p not a number, or a cell has no recurrent matrix or is one of torch's single
            cells, which do not know where a sequence begins.
        ValueError: as `zoneout_`.

    Source: Gal & Ghahramani 2016, "A theoretically grounded application of dropout in recurrent neural networks".

    Limits: a plain RNN has no carry, so the gradient of a dropped unit ends. Masks on the candidate alone (Semeniuta,
    Severyn & Barth 2016) are not available. For dropout of the input use nn.Dropout.

    >>> layer = recurrent_dropout_(nn.GRU(3, 4), 0.25)
    >>> [mask.shape for mask in layer.draw(torch.zeros(5, 2, 3))]
    [torch.Size([5, 2, 4])]
    """
    if not 0 <= finite("p", p) < 1:
        raise ValueError(f"p: expected a probability from 0 to below 1, got {p}")

    def noise(cell: Cell, now: Noise) -> Noise:
        if not cell.sources:
            raise TypeError(f"model: recurrent_dropout_ does not fit a {cell.name}, which has no recurrent matrix")
        return replace(now, dropout=float(p))

    return _with_noise(model, "recurrent_dropout_", noise, None)


class NoisyLayers(StandIn):
    """Recurrent layers with noise: `layers` holds an `unvanish.nn.Recurrent` for each, whose input ends in the
    masks."""

    def __init__(self, like: SequenceModule, noise: Noise) -> None:
        super().__init__(like)
        self.noise = noise
        self.layers = nn.ModuleList(self._layer(like, k) for k in range(like.num_layers))
        self.train(like.training)

    def _layer(self, like: SequenceModule, k: int) -> Recurrent:
        D = 2 if self.bidirectional else 1
        width = self.input_size if k == 0 else D * self.hidden_size
        weight = next(like.parameters())
        made = Recurrent(
            self.noise.of(self.cell), width, self.hidden_size, bias=self.bias, bidirectional=self.bidirectional,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        for name in list(made._parameters):
            made._parameters[name] = like._parameters[name.replace("_l0", f"_l{k}")]
        for option in ADDED:
            setattr(made, option, getattr(like, option, None))
        return made

    def draw(self, x: Tensor | PackedSequence) -> list[Tensor]:
        """The masks of a call with an input like x: per layer `[T, B, D·M·H]`, in training drawn, in evaluation their
        expectation."""
        return self._draw(time_major(self, x).x)  # type: ignore[arg-type]

    def _draw(self, x: Tensor) -> list[Tensor]:
        T, B, H = *x.shape[:2], self.hidden_size

        def zoned(p: float) -> Tensor:
            if not self.training:
                return x.new_full((1, 1, 1), 1 - p).expand(T, B, H)
            return (torch.rand(T, B, H, device=x.device) >= p).to(x.dtype)

        def dropped(p: float) -> Tensor:
            if not self.training:
                return x.new_ones(1, 1, 1).expand(T, B, H)
            return ((torch.rand(B, H, device=x.device) >= p) / (1 - p)).to(x.dtype).expand(T, B, H)

        masks = []
        for layer in self.layers:
            cell: Any = layer.cell
            rates = [self.noise.zoneout[s] for s in cell.zoned]
            one = [[*map(zoned, rates), *(dropped(self.noise.dropout) for _ in cell._read)] for _ in self._directions]
            nothing = x.new_empty(T, B, 0)
            masks.append(torch.cat([nothing, *(mask for direction in one for mask in direction)], dim=-1))
        return masks

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        masks: list[Tensor] | None = None,
    ) -> tuple[Any, Any]:
        """As the layer's; `masks` as `draw` returned them, for samples in the order of the input (of a packed one: the
        longest first).

        Raises:
            ValueError: there are other masks than `draw` would return.
        """
        x = time_major(self, input, lengths).x  # type: ignore[arg-type]
        drawn = self._draw(x) if masks is None else masks
        expected = [(*x.shape[:2], layer.columns - layer.input_size) for layer in self.layers]  # type: ignore[operator]
        if [tuple(mask.shape) for mask in drawn] != expected:
            raise ValueError(f"masks: expected {expected}, got {[tuple(mask.shape) for mask in drawn]}")

        def run(k: int, below: Tensor, rows: list[State] | None, inputs: TimeMajor) -> tuple[Tensor, State]:
            layer, mask = self.layers[k], drawn[k]
            start = None if rows is None else self._start(layer, rows, mask)
            y, final = layer(torch.cat([below, mask.to(below.dtype)], dim=-1), start, lengths=inputs.lengths)
            return y, as_states(final)[: len(self.cell.states)]

        return self._run(input, hx, lengths, run)

    def _start(self, layer: Any, rows: list[State], mask: Tensor) -> Any:
        """The initial states of a layer from its cell's, with the same dropout for the matrices as in every step."""
        cell, H = layer.cell, self.hidden_size
        zoned, read, M = len(cell.zoned), cell._read, len(cell.given)
        full = []
        for d, row in enumerate(rows):
            own = mask[0].split(H, dim=-1)[d * M + zoned : (d + 1) * M]
            full.append((*row, *(m * row[cell.cell.states.index(s)] for m, s in zip(own, read, strict=True))))
        states = tuple(torch.stack(s) for s in zip(*full, strict=True))
        return states if len(cell.states) > 1 else next(iter(states))

    def extra_repr(self) -> str:
        """The noise."""
        rates = [*(f"zoneout of {s}: {p:g}" for s, p in self.noise.zoneout.items())]
        return ", ".join([*rates, *([f"recurrent dropout: {self.noise.dropout:g}"] if self.noise.dropout else [])])


def _with_noise(model: nn.Module, cure: str, noise: Any, of_cell: Any) -> nn.Module:
    """Give every recurrent layer in the model the noise that `noise(cell, its present noise)` returns."""
    found = recurrent_modules(model, cure, called=True)
    inside = {id(layer) for m in model.modules() if isinstance(m, NoisyLayers) for layer in m.layers}
    noisy: list[Any] = [m for m in model.modules() if isinstance(m, NoisyLayers)]
    plain: list[tuple[str, Any]] = [(path, m) for path, m in found.items() if id(m) not in inside]
    for path, m in plain:
        _check(path or "it", m, cure, of_cell is not None)
    wanted = {id(m): noise(m.cell, m.noise) for m in noisy}
    wanted |= {id(m): noise(layers_of(m)[0].cell, Noise()) for _, m in plain}
    new: dict[int, nn.Module] = {}
    for _, m in plain:
        if isinstance(m, nn.RNNCellBase):
            of_cell(m, wanted[id(m)])
        else:
            new[id(m)] = NoisyLayers(m, wanted[id(m)])
    for m in noisy:
        m.noise = wanted[id(m)]
        for layer in m.layers:
            layer.cell = m.noise.of(m.cell)
    return take_places(model, new)


def _check(path: str, module: Any, cure: str, cells: bool) -> None:
    if isinstance(module, nn.RNNCellBase):
        if not cells:
            raise TypeError(
                f"model: {cure} does not fit {path}, a {type(module).__name__}: a single cell does not know where a "
                "sequence begins; use the layer that runs them whole"
            )
        return
    check_place(path, module, cure)


class _Zone:
    """A forward hook: in training a unit of the state that a cell returns keeps its old value with probability p."""

    def __init__(self, rates: Mapping[str, float], states: tuple[str, ...]) -> None:
        self.rates, self.states = rates, states

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        new = output if isinstance(output, tuple) else (output,)
        hx = args[1] if len(args) > 1 else kwargs.get("hx")
        old = [whole(s) for s in as_states(hx)] or [torch.zeros_like(s) for s in new]
        found = tuple(
            s0 + self._mask(module, s, name) * (s - s0) for name, s0, s in zip(self.states, old, new, strict=True)
        )
        return found if isinstance(output, tuple) else next(iter(found))

    def _mask(self, module: nn.Module, like: Tensor, state: str) -> Tensor | float:
        p = self.rates.get(state, 0.0)
        if p == 0 or not module.training:
            return 1 - p
        return (torch.rand(like.shape, device=like.device) >= p).to(like.dtype)


def _zone_cell(cell: nn.RNNCellBase, noise: Noise) -> None:
    for key, hook in list(cell._forward_hooks.items()):
        if isinstance(hook, _Zone):
            del cell._forward_hooks[key]
            cell._forward_hooks_with_kwargs.pop(key, None)
    if noise.zoneout:
        states = layers_of(cell)[0].cell.states
        cell.register_forward_hook(_Zone(noise.zoneout, states), with_kwargs=True)
