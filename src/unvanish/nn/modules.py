"""A torch recurrent module as the layers and directions it consists of, and its input as a time-major sequence."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.modules import rnn as torchs
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.hooks import RemovableHandle

from unvanish.cells import CELLS, Cell, State, Weights
from unvanish.engine.checks import whole_lengths


class CellModule(nn.Module):
    """A layer over sequences for a cell of `unvanish.cells`: the interface of `unvanish.nn.Recurrent` for code that
    also accepts torch's layers."""

    cell: Cell
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size = 0

    @property
    def columns(self) -> int:
        """The number of features of an input."""
        return self.input_size

    def direction_weights(self, layer: int, reverse: bool, named: Mapping[str, Tensor] | None = None) -> Weights:
        """The weights of one layer and direction as the engine takes them, from `named` learnt ones or its own."""
        raise NotImplementedError

    def learnt_gradients(self, layer: int, reverse: bool, gradients: Weights) -> tuple[Tensor, Tensor | None]:
        """∂E/∂(learnt W_ih, learnt W_hh) from those by the weights that the engine takes."""
        raise NotImplementedError


SequenceModule = nn.RNNBase | CellModule
"""The modules that read whole sequences."""
RecurrentModule = nn.RNNBase | nn.RNNCellBase | CellModule


class LayerDirection(NamedTuple):
    """One layer and direction of a stacked module."""

    cell: Cell
    weights: Weights
    layer: int
    reverse: bool
    name: str
    """ "l0", "l1.reverse" """


class TimeMajor(NamedTuple):
    """An input as the engine takes it, in internal batch order: the packed one's, else the user's."""

    x: Tensor
    """[T, B, I]"""
    lengths: Tensor | None
    """[B], None when all have T steps"""
    order: Tensor | None
    """[B] the user's index of each internal sample; None when they are the same"""
    batch_sizes: Tensor | None = None
    """[T] of a packed input: how many samples are active at each step"""

    def in_user_order(self, v: Tensor, dim: int) -> Tensor:
        """Samples back into the order in which the user gave them."""
        return v if self.order is None else v.index_select(dim, torch.argsort(self.order).to(v.device))

    def in_internal_order(self, v: Tensor, dim: int) -> Tensor:
        """The user's samples in the order in which they are run."""
        return v if self.order is None else v.index_select(dim, self.order.to(v.device))

    def dropout_mask(self, width: int, p: float) -> Tensor:
        """The factors by which torch's dropout between layers multiplies `[T, B, width]`: 0 or 1/(1 − p), drawn as
        torch draws them."""
        T, B = self.x.shape[:2]
        if self.batch_sizes is None:
            return dropout(self.x.new_ones(T, B, width), p)
        packed = dropout(self.x.new_ones(int(self.batch_sizes.sum()), width), p)
        return pad_packed_sequence(PackedSequence(packed, self.batch_sizes))[0]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Read weights without side effects: in training a parametrisation may update its own state when it is read, as
    spectral_norm does."""
    training = [m for m in module.modules() if m.training] if isinstance(module, nn.Module) else []
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True


def cell_of(module: RecurrentModule) -> Cell:
    """The mathematics of a recurrent module.

    Raises:
        TypeError: it is not torch's RNN, LSTM or GRU, one of their cells, or `unvanish.nn.Recurrent`.
    """
    if isinstance(module, CellModule):
        return module.cell
    if isinstance(module, nn.RNNBase) and module.mode.lower() in CELLS:
        return CELLS[module.mode.lower()]
    if isinstance(module, torchs.LSTMCell):
        return CELLS["lstm"]
    if isinstance(module, torchs.GRUCell):
        return CELLS["gru"]
    if isinstance(module, torchs.RNNCell):
        return CELLS[f"rnn_{module.nonlinearity}"]
    raise TypeError(
        f"module: expected torch's RNN, LSTM, GRU, one of their cells, or unvanish.nn.Recurrent, got "
        f"{type(module).__name__}; write its step as an unvanish.Cell, or watch its state with uv.mark(h, name)"
    )


def used_weights(module: SequenceModule) -> list[Tensor] | None:
    """The weights of its last forward pass, in torch's order; parametrized ones are not recomputed. None for a layer
    that does not keep this list."""
    return [w for w in module._flat_weights if w is not None] if isinstance(module, nn.RNNBase) else None


def layer_directions(module: SequenceModule, weights: Sequence[Tensor] | None = None) -> list[LayerDirection]:
    """The module's layers and directions in torch's order, with `weights`, or with its own current ones.

    Raises:
        TypeError: module is neither one of torch's recurrent modules nor `unvanish.nn.Recurrent`.
    """
    if isinstance(module, CellModule):
        return directions_of_a_cell(module)
    if not isinstance(module, nn.RNNBase) or module.mode.lower() not in CELLS:
        raise TypeError(
            f"layer: expected torch.nn.RNN, LSTM or GRU, or unvanish.nn.Recurrent, got {type(module).__name__}"
        )
    if weights is None:
        module._update_flat_weights()
        weights = used_weights(module)
        assert weights is not None
    cell = cell_of(module)
    directions = (False, True) if module.bidirectional else (False,)
    places = [(layer, reverse) for layer in range(module.num_layers) for reverse in directions]
    per_place = len(weights) // len(places)
    found = []
    for k, (layer, reverse) in enumerate(places):
        w_ih, w_hh, *rest = weights[k * per_place : (k + 1) * per_place]
        w_hr = rest.pop() if module.proj_size else None
        b_ih, b_hh = rest if module.bias else (None, None)
        weights_here = Weights(w_ih, w_hh, b_ih, b_hh, w_hr)
        found.append(LayerDirection(cell, weights_here, layer, reverse, place(layer, reverse)))
    return found


def directions_of_a_cell(module: CellModule, named: Mapping[str, Tensor] | None = None) -> list[LayerDirection]:
    """The layers and directions of `unvanish.nn.Recurrent`, with the learnt weights `named`, or its own."""
    return [
        LayerDirection(module.cell, module.direction_weights(k, reverse, named), k, reverse, place(k, reverse))
        for k in range(module.num_layers)
        for reverse in ((False, True) if module.bidirectional else (False,))
    ]


def place(layer: int, reverse: bool) -> str:
    """The name of a layer and direction: "l0", "l1.reverse"."""
    return f"l{layer}" + ".reverse" * reverse


def time_major(
    module: SequenceModule, x: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None = None
) -> TimeMajor:
    """x as `[T, B, I]`, from `[T, B, I]`, `[B, T, I]` (batch_first), `[T, I]` or packed; `lengths` are those of a
    padded one.

    Raises:
        TypeError: x is neither a tensor nor packed.
        ValueError: it has the wrong number of axes, or no steps; lengths don't fit.
    """
    if isinstance(x, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths: a packed input carries its own; leave lengths out")
        padded, found = pad_packed_sequence(PackedSequence(x.data, x.batch_sizes))
        whole = bool((found == len(x.batch_sizes)).all())
        return TimeMajor(padded, None if whole else found.to(padded.device), x.sorted_indices, x.batch_sizes)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor or a PackedSequence, got {type(x).__name__}")
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected 2 or 3 axes, got shape {tuple(x.shape)}")
    if x.dim() == 2:
        x = x.unsqueeze(1)
    elif module.batch_first:
        x = x.transpose(0, 1)
    if x.shape[0] == 0:
        raise ValueError("x: expected at least one step, got a sequence of length 0")
    return TimeMajor(x, None if lengths is None else whole_lengths(lengths, x), None)


def in_layout(
    module: SequenceModule, given: Tensor | PackedSequence, inputs: TimeMajor, y: Tensor, final: State
) -> tuple[Any, Any]:
    """(output, final state) as torch returns them for an input as the user gave it."""
    if isinstance(given, PackedSequence):
        T, B = y.shape[:2]
        lengths = torch.full((B,), T, device="cpu") if inputs.lengths is None else inputs.lengths.cpu()
        data = pack_padded_sequence(y, lengths).data
        final = tuple(inputs.in_user_order(s, 1) for s in final)
        output: Any = PackedSequence(data, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
    elif given.dim() == 2:
        output, final = y.squeeze(1), tuple(s.squeeze(1) for s in final)
    else:
        output = y.transpose(0, 1) if module.batch_first else y
    return output, (final if len(final) > 1 else next(iter(final)))


class Ran(Protocol):
    """A layer and direction that ran."""

    @property
    def y(self) -> Tensor:
        """[T, B, R]"""
        ...


R = TypeVar("R", bound=Ran)


def run_layers(
    layers: list[LayerDirection],
    x: Tensor,
    states: list[State],
    run: Callable[[LayerDirection, Tensor, State], R],
    masks: Sequence[Tensor] = (),
) -> list[R]:
    """`run(layer, x, state)` of each layer and direction in torch's order; each layer reads the output of the one
    below, multiplied by `masks`, one between any two layers."""
    D, ran = 2 if any(layer.reverse for layer in layers) else 1, []
    for first in range(0, len(layers), D):
        if first and masks:
            x = x * masks[first // D - 1]
        places = zip(layers[first : first + D], states[first : first + D], strict=True)
        here = [run(layer, x, state) for layer, state in places]
        ran += here
        x = torch.cat([one.y for one in here], dim=-1) if D > 1 else here[0].y
    return ran


def descend_layers(
    layers: list[LayerDirection],
    dy: Tensor | None,
    dfinal: Sequence[Tensor | None],
    masks: Sequence[Tensor],
    back: Callable[[int, Tensor | None, tuple[Tensor | None, ...], bool], Tensor | None],
) -> None:
    """`run_layers` backwards: `back(place, ∂E/∂y, ∂E/∂(final states), whether ∂E/∂x is wanted)` → ∂E/∂x of each layer
    and direction, from the last to the first; each layer receives the gradient from the one above."""
    D = 2 if any(layer.reverse for layer in layers) else 1
    for first in range(len(layers) - D, -1, -D):
        handed = []
        for d in reversed(range(D)):
            own = None if dy is None else dy.tensor_split(D, dim=-1)[d]
            ends = tuple(None if f is None else f[first + d] for f in dfinal)
            handed.append(back(first + d, own, ends, first > 0))
        if first:
            parts = [dx for dx in handed if dx is not None]
            dy = sum(parts[1:], parts[0])
            if masks:
                dy = None if dy is None else dy * masks[first // D - 1]


def as_states(hx: Any) -> tuple[Tensor, ...]:
    """(h,) or (h, c) from the state that a module or cell received or returned; () for None."""
    return () if hx is None else tuple(hx) if isinstance(hx, tuple | list) else (hx,)


def state_sizes(module: SequenceModule) -> tuple[int, ...]:
    """The width of each state."""
    cell = cell_of(module)
    return module.proj_size or module.hidden_size, *((module.hidden_size,) * (len(cell.states) - 1))


def initial_states(module: SequenceModule, hx: Any, inputs: TimeMajor) -> list[State]:
    """The initial states of each layer and direction in internal batch order; the cell's own (0 as a rule) where hx is
    None."""
    x, B, cell = inputs.x, inputs.x.shape[1], cell_of(module)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = state_sizes(module)
    if hx is None:
        return [cell.start(x, sizes)] * rows
    given = as_states(hx)
    if len(given) != len(sizes) or not all(isinstance(h, Tensor) for h in given):
        names = ", ".join(f"{s}_0" for s in cell.states)
        expected, found = names if len(sizes) == 1 else f"({names})", ", ".join(type(h).__name__ for h in given)
        raise ValueError(f"hx: expected {expected}, {len(sizes)} of tensors, got {len(given)}: {found}")
    given = tuple(h.unsqueeze(1) if h.dim() == 2 else h for h in given)
    for h, n in zip(given, sizes, strict=True):
        if h.shape != (rows, B, n):
            raise ValueError(f"hx: expected {(rows, B, n)}, got {tuple(h.shape)}")
    given = tuple(inputs.in_internal_order(h, 1) for h in given)
    return [tuple(h[k] for h in given) for k in range(rows)]


def weights_dtype(module: RecurrentModule) -> torch.dtype:
    """Of the weights that it computes with; a replica of nn.DataParallel has no parameters."""
    if isinstance(module, nn.RNNBase):
        return next(w.dtype for w in module._flat_weights if w is not None)
    if isinstance(module, nn.RNNCellBase):
        return module.weight_ih.dtype
    return next(w.dtype for w in directions_of_a_cell(module)[0].weights if w is not None)


def detached_call(
    module: SequenceModule, x: Tensor | PackedSequence, hx: Any, lengths: Tensor | Sequence[int] | None = None
) -> tuple[TimeMajor, list[State]]:
    """A call's input and initial states, to run it again: detached from any graph, and in the weights' dtype where
    autocast received another one."""
    inputs, dtype = time_major(module, x, lengths), weights_dtype(module)
    inputs = inputs._replace(x=inputs.x.detach().to(dtype))
    return inputs, [tuple(s.detach().to(dtype) for s in state) for state in initial_states(module, hx, inputs)]


def output_error(module: SequenceModule, inputs: TimeMajor, d: Tensor | None) -> Tensor | None:
    """∂E/∂y of a call, as autograd passed it, as `[T, B, D·R]` in internal order and the input's dtype."""
    if d is None:
        return None
    if inputs.batch_sizes is None:
        return time_major(module, d).x.to(inputs.x.dtype)
    return pad_packed_sequence(PackedSequence(d, inputs.batch_sizes))[0].to(inputs.x.dtype)


def final_error(inputs: TimeMajor, d: Tensor | None) -> Tensor | None:
    """∂E/∂(final state) of a call, as autograd passed it, as `[L·D, B, ·]` in internal order and the input's dtype."""
    if d is None:
        return None
    d = d.to(inputs.x.dtype)
    return d.unsqueeze(1) if d.dim() == 2 else inputs.in_internal_order(d, 1)


class Drawn(NamedTuple):
    """The random draws of a call in training."""

    masks: list[Tensor]
    """dropout between layers: the factors of the output of each layer but the last, `[T, B, D·R]`"""
    cuts: list[Tensor | None]
    """for each layer and direction its cut steps `[T]`, as `unvanish.engine.run` takes them"""


def draws_dropout(module: nn.Module) -> bool:
    """Whether a call of this module draws dropout between its layers."""
    return isinstance(module, SequenceModule) and module.training and module.dropout > 0 and module.num_layers > 1


def draws_cuts(module: nn.Module) -> bool:
    """Whether a call of this module draws steps at which no gradient passes through the matrices."""
    return module.training and getattr(module, "h_detach", None) is not None


def draw_cuts(module: SequenceModule, T: int) -> list[Tensor | None]:
    """The cut steps of a call that draws them: each with probability `h_detach`, separately for every layer and
    direction, from torch's default generator of the CPU."""
    p: float = module.h_detach  # type: ignore[assignment]
    return [torch.rand(T, device="cpu") < p for _ in range(module.num_layers * (2 if module.bidirectional else 1))]


def drawn_again(module: SequenceModule, inputs: TimeMajor, rng: Tensor | None) -> Drawn:
    """Repeat a call's draws: same generator state, shapes and order; `rng` is None where it drew nothing."""
    uncut: list[Tensor | None] = [None] * (module.num_layers * (2 if module.bidirectional else 1))
    if rng is None:
        return Drawn([], uncut)
    width = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(rng)
        cuts = draw_cuts(module, len(inputs.x)) if getattr(module, "h_detach", None) is not None else uncut
        layers = module.num_layers - 1 if module.dropout > 0 else 0
        return Drawn([inputs.dropout_mask(width, module.dropout) for _ in range(layers)], cuts)


def on_gradient(tensor: Tensor, notify: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `notify` with every gradient that reaches `tensor`."""

    def hook(d: Tensor | None) -> None:
        # If a node has several outputs, the gradient of one that was never used may be undefined.
        if d is not None:
            notify(d)

    return tensor.register_hook(hook)
