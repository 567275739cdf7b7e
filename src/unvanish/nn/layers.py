"""torch.nn.RNN, LSTM and GRU, run by the engine: options, errors, weights and state_dict are torch's; only the
computation of a sequence differs.

They add four options:

    layer(x, hx, lengths=[...])     samples of different length without packing; zero is allowed
    layer.clip = c                  the gradient passed from a step to the step before has at most 2-norm c per sample
    layer.checkpoint_every = n      store one state in n and recompute the others in the backward: memory for 10⁶ steps
    layer.h_detach = p              in training the gradient skips the recurrent matrices of a step with probability p

`layer.states(x)` returns every h_t, c_t and gate of every layer.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unvanish import engine
from unvanish.cells import State
from unvanish.nn import torch_forward
from unvanish.nn.checkpointing import run_in_pieces
from unvanish.nn.low_precision import in_float32, rounded_to
from unvanish.nn.modules import (
    LayerDirection,
    SequenceModule,
    TimeMajor,
    draw_cuts,
    draws_cuts,
    evaluating,
    in_layout,
    initial_states,
    layer_directions,
    run_layers,
    time_major,
    used_weights,
)
from unvanish.nn.observing import Recorders, observed
from unvanish.nn.torch_tools import TorchTools

ADDED = ("clip", "checkpoint_every", "h_detach")
"""a layer's options in addition to torch's; None where one is not used"""


@dataclass(frozen=True)
class LayerStates:
    """Every state and gate of one layer and direction, time-major, samples in the user's order."""

    states: dict[str, Tensor]
    """state → its values `[T, B, H]` (h `[T, B, R]`), in the cell's order"""
    gates: dict[str, Tensor]
    """gate → its values [T, B, H]"""

    @property
    def h(self) -> Tensor:
        """[T, B, R] the layer's output, the first of its states."""
        return next(iter(self.states.values()))

    @property
    def c(self) -> Tensor | None:
        """[T, B, H] the state called c; None for a cell without one."""
        return self.states.get("c")


class SequenceLayer(nn.Module):
    """Runs a sequence layer by layer and direction by direction on `unvanish.engine`."""

    batch_first: bool
    dropout: float
    bidirectional: bool

    # Class attributes, so that accelerate() can turn a torch layer into this one, and back, without adding anything
    # to it.
    clip: float | None = None
    checkpoint_every: int | None = None
    h_detach: float | None = None
    _autocast_promotes: ClassVar[bool] = False
    """whether torch's layer returns the wider of autocast's dtype and the initial state's, as its GRU does"""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, Any]:
        """As torch's: (output, h_n), or (output, (h_n, c_n)) where the cell has several states.

        Args:
            input: `[T, B, I]`, `[B, T, I]` with batch_first, `[T, I]`, or packed.
            hx: the initial state; None: zeros.
            lengths: `[B]` steps of each sample of a padded input, of any integer dtype, on any device, zero allowed.
                Output is 0 from there on, and the final state is the one at the sample's own end.

        Raises:
            ValueError, RuntimeError: as torch's, and for lengths that do not fit.
        """
        return observed(
            self, input, hx, lengths, lambda state, recorders: self._forward(input, state, lengths, recorders)
        )

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | Sequence[int] | None,
        recorders: Recorders | None,
    ) -> tuple[Any, Any]:
        self._check(input, hx)
        inputs, layers = self._prepared(input, lengths)
        dtype = rounded_to(layers, inputs, hx, self._autocast_promotes)
        if dtype is None:
            y, final = self._run(layers, inputs, hx, recorders)
        else:
            with torch.autocast(inputs.x.device.type, enabled=False):
                y, final = self._run(*in_float32(layers, inputs, hx), recorders)
            y, final = y.to(dtype), tuple(s.to(dtype) for s in final)
        return in_layout(cast(SequenceModule, self), input, inputs, y, final)

    def states(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> dict[str, LayerStates]:
        """Every state and gate of every layer: "l0", "l1.reverse", … → LayerStates; 0 where a sample has no input.

        Differentiable where gradients are enabled. Dropout between layers is not applied: these are the states of
        evaluation, in float32 where the layer computes in it and rounds its output.

        Raises:
            ValueError, RuntimeError: as `forward`.
        """
        with evaluating(self):
            self._check(input, hx)
            inputs, layers = self._prepared(input, lengths)
        if rounded_to(layers, inputs, hx) is None:
            return self._states(layers, inputs, hx)
        with torch.autocast(inputs.x.device.type, enabled=False):
            return self._states(*in_float32(layers, inputs, hx))

    def _states(self, layers: list[LayerDirection], inputs: TimeMajor, hx: Any) -> dict[str, LayerStates]:
        def run(d: LayerDirection, x: Tensor, state: State) -> engine.Trace:
            return engine.trace(d.cell, x, state, d.weights, inputs.lengths, d.reverse)

        active = engine.active_steps(inputs.lengths, len(inputs.x), inputs.x.device)

        def arrange(v: Tensor) -> Tensor:
            return inputs.in_user_order(v if active is None else torch.where(active, v, 0.0), 1)

        found = {}
        for d, tr in zip(
            layers,
            run_layers(layers, inputs.x, initial_states(cast(SequenceModule, self), hx, inputs), run),
            strict=True,
        ):
            gates = zip(d.cell.gates, tr.gates.unbind(-2), strict=True)
            states = zip(d.cell.states, tr.after, strict=True)
            found[d.name] = LayerStates(*({name: arrange(v) for name, v in kind} for kind in (states, gates)))
        return found

    def _prepared(
        self, input: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None
    ) -> tuple[TimeMajor, list[LayerDirection]]:
        module = cast(SequenceModule, self)
        return time_major(module, input, lengths), layer_directions(module, used_weights(module))

    def _check(self, x: Tensor | PackedSequence, hx: Any) -> None:
        """Check the input and the initial state; errors have torch's wording."""
        raise NotImplementedError

    def _run(
        self, layers: list[LayerDirection], inputs: TimeMajor, hx: Any, recorders: Recorders | None
    ) -> tuple[Tensor, State]:
        """([T, B, D·R], ([L·D, B, R], ...)) in internal order."""
        module = cast(SequenceModule, self)
        states = initial_states(module, hx, inputs)
        cuts: list[Tensor | None] = draw_cuts(module, len(inputs.x)) if draws_cuts(module) else [None] * len(layers)
        x, finals, n_dir = inputs.x, [], 2 if self.bidirectional else 1
        for number, (here, initial) in enumerate(_by_layer(layers, states)):
            if number and self.dropout and self.training:
                x = x * inputs.dropout_mask(x.shape[-1], self.dropout)
            places = zip(here, initial, cuts[number * n_dir : (number + 1) * n_dir], strict=True)
            ran = [self._run_direction(d, x, s, inputs, recorders, cut) for d, s, cut in places]
            x = torch.cat([y for y, _ in ran], dim=-1) if len(ran) > 1 else ran[0][0]
            finals += [final for _, final in ran]
        # No views, which could not be detached in place, as loops over windows of a sequence do.
        return x, tuple(torch.stack(s) for s in zip(*finals, strict=True))

    def _run_direction(
        self,
        d: LayerDirection,
        x: Tensor,
        state: State,
        inputs: TimeMajor,
        recorders: Recorders | None,
        cut: Tensor | None,
    ) -> tuple[Tensor, State]:
        lengths, others = inputs.lengths, (*state, *d.weights)
        if recorders is not None and engine.explain(d.cell, x, others=others, cut=cut is not None).rung != "native":
            recorders = None
        if self.checkpoint_every is None:
            record = None if recorders is None else recorders(inputs, d, 0)
            return engine.run(d.cell, x, state, d.weights, lengths, d.reverse, self.clip, record=record, cut=cut)
        every = self.checkpoint_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"checkpoint_every: expected None or a whole number of steps, at least 1, got {every!r}")
        return run_in_pieces(
            every,
            x,
            state,
            d.weights,
            lengths,
            d.reverse,
            cut,
            lambda part, before, w, here, cut_here, record: engine.run(
                d.cell, part, before, w, here, d.reverse, self.clip, record=record, cut=cut_here
            ),
            None if recorders is None else lambda start: recorders(inputs, d, start),
        )


class EngineSequence(TorchTools, SequenceLayer, nn.RNNBase):
    """torch's layers on the engine."""

    def _torch_forward(self) -> Any:
        """torch's own forward."""
        return torch_forward.torchs_class(type(self)).forward

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, Any]:
        if type(input) is not Tensor:
            leaf = self._leaf(input, hx, lengths=lengths)
            if leaf is not None:
                return leaf
        why = torch_forward.reason(self, input, hx) if lengths is None and self._torch_can() else None
        ran = None if why is None else torch_forward.run(self, input, hx, why)
        if ran is not None:
            return ran
        return super().forward(input, hx, lengths=lengths)

    def _torch_can(self) -> bool:
        """Whether the layer uses no option that torch's does not have."""
        unused = self.clip is None and self.checkpoint_every is None and self.h_detach is None
        return unused and self.mode != "RNN_SIGMOID"

    def _as_torchs(self) -> nn.Module:
        from unvanish.nn.accelerate import restore

        return restore(copy(self))

    def extra_repr(self) -> str:
        """torch's description, and the options that were added."""
        added = ["nonlinearity='sigmoid'"] if self.mode == "RNN_SIGMOID" else []
        added += [f"{k}={getattr(self, k)}" for k in ADDED if getattr(self, k) is not None]
        return ", ".join([super().extra_repr(), *added])

    def _check(self, x: Tensor | PackedSequence, hx: Any) -> None:
        """Raise torch's errors where its layer raises one, and ours where it would read past the end of an array."""
        misfit = self._misfit(x, hx)
        if misfit is not None:
            if self._torch_can():
                self._torch_forward()(self, x, hx)
            raise misfit

    def _misfit(self, x: Tensor | PackedSequence, hx: Any) -> Exception | None:
        try:
            self._check_call(x, hx)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            return error
        return None

    def _check_call(self, x: Tensor | PackedSequence, hx: Any) -> None:
        torch_forward.update_flat_weights(self)
        if isinstance(x, PackedSequence):
            data, batch_sizes = x.data, x.batch_sizes
        else:
            if not isinstance(x, Tensor):
                raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(x).__name__}")
            if x.dim() not in (2, 3):
                raise ValueError(f"{self._get_name()}: Expected input to be 2D or 3D, got {x.dim()}D instead")
            if x.shape[1 if self.batch_first and x.dim() == 3 else 0] == 0:
                raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
            data, batch_sizes = x if x.dim() == 3 else x.unsqueeze(0 if self.batch_first else 1), None
        if hx is None:
            self.check_input(data, batch_sizes)
            return
        batched = isinstance(x, PackedSequence) or x.dim() == 3
        given = self._initial(hx)
        if any(h.dim() != 2 + batched for h in given):
            form, got = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2), [f"{h.dim()}-D" for h in given]
            raise RuntimeError(f"For {form[0]} input, hx should also be {form[1]}-D but got ({', '.join(got)}) tensors")
        if not batched:
            given = tuple(h.unsqueeze(1) for h in given)
        self.check_forward_args(data, given if self.mode == "LSTM" else given[0], batch_sizes)  # type: ignore[arg-type]

    def _initial(self, hx: Any) -> tuple[Tensor, ...]:
        """hx as (h_0,) or (h_0, c_0); errors have the types that torch's layers raise."""
        form = type(hx).__name__ if not isinstance(hx, tuple | list) else f"{len(hx)} of them"
        if self.mode != "LSTM":
            if not isinstance(hx, Tensor):
                raise AttributeError(f"hx: expected one tensor, h_0, got {form}")
            return (hx,)
        if not isinstance(hx, tuple | list | Tensor):
            raise TypeError(f"hx: expected two tensors, (h_0, c_0), got {form}")
        if len(hx) != 2:
            kind = IndexError if len(hx) < 2 else RuntimeError
            raise kind(f"hx: lstm expects two hidden states, (h_0, c_0), got {form}")
        if not all(isinstance(h, Tensor) for h in hx):
            raise AttributeError(f"hx: expected two tensors, got {', '.join(type(h).__name__ for h in hx)}")
        return hx[0], hx[1]


class RNN(EngineSequence, nn.RNN):
    """h_t = φ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), φ ∈ {tanh, relu, sigmoid}: torch.nn.RNN, and sigmoid.

    Arguments, shapes, weights and errors as torch.nn.RNN; see this module's docstring for what is added.

    >>> rnn = RNN(3, 4, nonlinearity="sigmoid")
    >>> rnn(torch.zeros(5, 2, 3), lengths=[5, 0])[0].shape
    torch.Size([5, 2, 4])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > 3 and "nonlinearity" not in kwargs:
            kwargs["nonlinearity"], args = args[3], (*args[:3], *args[4:])
        if kwargs.get("nonlinearity") == "sigmoid":
            super().__init__(*args, **{**kwargs, "nonlinearity": "tanh"})
            self.nonlinearity, self.mode = "sigmoid", "RNN_SIGMOID"
        else:
            super().__init__(*args, **kwargs)

    def flatten_parameters(self) -> None:
        """As torch's, except for a sigmoid, which cuDNN, for which the weights are arranged, does not have."""
        if self.nonlinearity != "sigmoid":
            super().flatten_parameters()


class LSTM(EngineSequence, nn.LSTM):
    """c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t,  h_t = o_t ⊙ tanh(c_t): torch.nn.LSTM.

    Arguments, shapes, weights and errors as torch.nn.LSTM; see this module's docstring for what is added.

    >>> lstm = LSTM(3, 4)
    >>> states = lstm.states(torch.zeros(5, 2, 3))["l0"]
    >>> states.c.shape, states.gates["f"].shape
    (torch.Size([5, 2, 4]), torch.Size([5, 2, 4]))
    """


class GRU(EngineSequence, nn.GRU):
    """h_t = (1 − z_t) ⊙ n_t + z_t ⊙ h_{t-1}: torch.nn.GRU.

    Arguments, shapes, weights and errors as torch.nn.GRU; see this module's docstring for what is added.

    >>> GRU(3, 4, bidirectional=True)(torch.zeros(5, 2, 3))[0].shape
    torch.Size([5, 2, 8])
    """

    _autocast_promotes = True


def _by_layer(layers: list[LayerDirection], states: list[State]) -> list[tuple[list[LayerDirection], list[State]]]:
    n_dir = 2 if any(d.reverse for d in layers) else 1
    return [(layers[k : k + n_dir], states[k : k + n_dir]) for k in range(0, len(layers), n_dir)]
