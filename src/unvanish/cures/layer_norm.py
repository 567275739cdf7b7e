"""Layer normalisation inside the recurrence: every gate's share has mean 0 and the same size at every step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import PackedSequence

from unvanish.cells import State, Weights
from unvanish.cures.layer_weights import ReadsWeights, finite, recurrent_layers, recurrent_modules
from unvanish.cures.stand_in import StandIn, check_place, take_places
from unvanish.engine.sequence import active_steps, steps, without_padding
from unvanish.nn.modules import LayerDirection, SequenceModule, TimeMajor, layer_directions


def layer_norm_(model: nn.Module, gain: float = 1.0, eps: float = 1e-5) -> nn.Module:
    """Normalise what each gate reads, over its units:

        p_t^γ = α_γ ⊙ LN(W_ih^γ x_t) + b_ih^γ        q_t^γ = β_γ ⊙ LN(W_hh^γ s_{t-1}) + b_hh^γ
        LN(a) = (a − mean_u a) / √(var_u a + ε)

    α and β `[G·H]` are learnt and start at `gain`. The sizes of W_ih, W_hh and the input no longer matter: none of them
    can saturate a gate, and the gradient through a matrix is divided by the size of what the matrix contributed.

    Layers become `NormalisedLayers` around the original layer, whose weights they use, with two more parameters for
    each layer and direction, `gain_ih_l0` and `gain_hh_l0`: create the optimizer afterwards.

    Args:
        model: any module with nn.RNN, nn.LSTM, nn.GRU or `unvanish.nn.Recurrent` in it, changed in place; or such a
            layer itself, which is left alone.
        gain: the first value of α and β. Below 1 gates start in their linear range; Cooijmans et al. 2017 use 0.1.
        eps: ε.

    Returns:
        model; the new layer if model was a layer itself.

    Raises:
        TypeError: model is not a module, gain is not a number, or model contains one of torch's single cells or a cell
            without a recurrent matrix.
        ValueError: there is no recurrent layer; one is of a subclass, parametrized, has hooks, a projection, or an
            option of `unvanish.nn`'s; gain or eps is not positive.

    Source: Ba, Kiros & Hinton 2016, "Layer normalization", section 5.4 and appendix; each gate by itself here, where
    they normalise all gates of an LSTM together, and without the norm of c before the output, which is the step's own.

    Limits: the norm mixes units, so a step is no longer elementwise: the layer runs as a loop of torch operations (four
    to twenty times the time of nn.LSTM on a CPU), its gates are not recorded, and `clip`, `h_detach` and noise are not
    available. With fewer than about ten units, normalisation loses much of the information. The states are recorded by
    name, in reading order: `uv.watch(model, states={"rnn.step_l0": 0})` has ‖∂E/∂h_t‖ of the first layer of a module
    `rnn`; with 1 instead of 0, its ‖∂E/∂c_t‖.

    >>> layer = layer_norm_(nn.LSTM(3, 16))
    >>> y, (h, c) = layer(torch.zeros(5, 2, 3))
    >>> y.shape
    torch.Size([5, 2, 16])
    """
    gain, eps = finite("gain", gain, above=0.0), finite("eps", eps, above=0.0)
    found = recurrent_modules(model, "layer_norm_", called=True)
    recurrent_layers(model, "layer_norm_", lambda cell: bool(cell.sources), "it has no recurrent matrix")
    for path, m in found.items():
        if isinstance(m, nn.RNNCellBase):
            raise TypeError(
                f"model: layer_norm_ does not fit {path or 'it'}, a {type(m).__name__}; use the layer that runs "
                "sequences whole"
            )
        check_place(path or "it", m, "layer_norm_")
        used = [option for option in ("clip", "h_detach", "checkpoint_every") if getattr(m, option, None) is not None]
        if used:
            raise ValueError(f"model: {path or 'it'} uses {', '.join(used)}, which layer_norm_ does not know; unset it")
    return take_places(model, {id(m): NormalisedLayers(m, gain, eps) for m in found.values()})  # type: ignore[arg-type]


class NormalisedLayers(StandIn, ReadsWeights):
    """Recurrent layers whose gates' shares are normalised, with the weights of the original layer, `inner`."""

    def __init__(self, like: SequenceModule, gain: float, eps: float) -> None:
        super().__init__(like)
        self.inner, self.eps = like, eps
        w, H = next(like.parameters()), self.hidden_size
        for d in layer_directions(like):
            for kind, gates in (("ih", self.cell.input_gates), ("hh", tuple(self.cell.sources))):
                value = torch.full((len(gates) * H,), gain, dtype=w.dtype, device=w.device)
                self.register_parameter(f"gain_{kind}{_suffix(d)}", nn.Parameter(value))
            self.add_module(f"step{_suffix(d)}", NormalisedStep())
        self.train(like.training)

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, *, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Any, Any]:
        """As the layer's."""
        layers, n_dir = layer_directions(self.inner), len(self._directions)  # type: ignore[arg-type]

        def run(k: int, below: Tensor, rows: list[State] | None, inputs: TimeMajor) -> tuple[Tensor, State]:
            here = layers[k * n_dir : (k + 1) * n_dir]
            sizes = (self.hidden_size,) * len(self.cell.states)
            starts = rows or [self.cell.start(below, sizes)] * n_dir
            ran = [self._direction(d, below, s, inputs.lengths) for d, s in zip(here, starts, strict=True)]
            final = tuple(torch.stack(s) for s in zip(*(f for _, f in ran), strict=True))
            return torch.cat([y for y, _ in ran], dim=-1), final

        return self._run(input, hx, lengths, run)

    def _direction(self, d: LayerDirection, x: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        T = x.shape[0]
        active = active_steps(lengths, T, x.device)
        share = _Shares(d, getattr(self, f"gain_ih{_suffix(d)}"), getattr(self, f"gain_hh{_suffix(d)}"), self.eps)
        projected = share.of_input(without_padding(x, active)).unbind(0)
        step = getattr(self, f"step{_suffix(d)}")
        y: list[Tensor] = [x] * T
        for t in steps(T, d.reverse):
            new = step(share, projected[t], state)
            y[t] = new[0]
            if active is not None:
                y[t] = torch.where(active[t], new[0], 0.0)
                new = tuple(torch.where(active[t], a, old) for a, old in zip(new, state, strict=True))
            state = new
        return torch.stack(y), state

    def extra_repr(self) -> str:
        """ε."""
        return f"eps={self.eps:g}"


class NormalisedStep(nn.Module):
    """One step of a layer and direction: a module, so that hooks and watches see each state."""

    def forward(self, share: "_Shares", p: Tensor, s: State) -> State:
        """The states at t, from the input's share `[B, G·H]` and the states before."""
        return share.advance(p, s)


class _Shares:
    """The normalised shares of one layer and direction, and the step that uses them."""

    def __init__(self, d: LayerDirection, gain_ih: Tensor, gain_hh: Tensor, eps: float) -> None:
        self.cell, self.w, self.eps = d.cell, d.weights, eps
        self.bare: Weights = d.weights._replace(b_ih=None, b_hh=None)
        G, Q = len(d.cell.input_gates), len(d.cell.sources)
        self.gain_ih, self.gain_hh = gain_ih.unflatten(0, (G, -1)), gain_hh.unflatten(0, (Q, -1))

    def of_input(self, x: Tensor) -> Tensor:
        """p `[T, B, G·H]`."""
        return self._normalised(self.cell.project(x, self.bare), self.gain_ih, self.w.b_ih)

    def of_states(self, s: State, gates: tuple[str, ...] | None = None) -> Tensor:
        """q `[B, Q·H]`, or the part for some of the gates."""
        raw = self.cell.recur(s, self.bare, gates)
        assert raw is not None
        rows = slice(None) if gates is None else [i for i, g in enumerate(self.cell.sources) if g in gates]
        bias = None if self.w.b_hh is None else self.w.b_hh.unflatten(0, self.gain_hh.shape)[rows].flatten()
        return self._normalised(raw, self.gain_hh[rows], bias)

    def advance(self, p: Tensor, s: State) -> State:
        """One step."""
        cell, q = self.cell, self.of_states(s)
        new = cell.evaluate(p, q, s, self.w.v)
        if not cell.same_step:
            return new
        found = dict(zip(cell.sources, q.chunk(len(cell.sources), dim=-1), strict=True))
        late = self.of_states(new, cell.same_step).chunk(len(cell.same_step), dim=-1)
        found |= dict(zip((g for g in cell.sources if g in cell.same_step), late, strict=True))
        return cell.evaluate(p, torch.cat(list(found.values()), dim=-1), s, self.w.v)

    def _normalised(self, raw: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        blocks = raw.unflatten(-1, gain.shape)
        out = (gain * layer_norm(blocks, blocks.shape[-1:], eps=self.eps)).flatten(-2)
        return out if bias is None else out + bias


def _suffix(d: LayerDirection) -> str:
    return f"_l{d.layer}" + "_reverse" * d.reverse
