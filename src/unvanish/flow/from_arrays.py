"""The record of a layer that another framework ran: from its weights, its input and the gradient at its outputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import CELLS, Cell, State, Weights
from unvanish.engine.precision import cpu_by_default
from unvanish.flow.frameworks import Sizes, as_float64, as_weights
from unvanish.flow.nonfinite import NonFiniteOrigin, origin_of_nonfinite
from unvanish.flow.record import LayerFlow, NonFiniteError
from unvanish.flow.summary import healthy, summarise


@cpu_by_default()
def from_arrays(
    cell: str,
    weights: Any,
    x: Any,
    dy: Any,
    h0: Any = None,
    c0: Any = None,
    layout: str = "torch",
    reverse: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    *,
    batch_first: bool = False,
) -> LayerFlow:
    """The same record as `watch` makes, for one layer and direction that any framework trained.

    The forward pass is run again from the weights, and δ is propagated back through it, all in float64:

        δh_t = dy_t + W_hhᵀ δa_{t+1}        (LSTM: also δc_t; GRU: also the carry z_{t+1} ⊙ δh_{t+1})

    Arrays may be of NumPy, torch, JAX or anything else that NumPy reads. `residual` of the record is NaN: there is no
    gradient of the weights to compare with.

    Args:
        cell: "lstm", "gru", "rnn_tanh", "rnn_relu" or "rnn_sigmoid".
        weights: those of one layer and direction, in the given `layout`: a dict or a sequence; for "flax" a dict.
        x: `[T, B, I]`, the layer's input.
        dy: `[T, B, R]`, ∂E/∂(output): the gradient that arrives at the layer's output at each step; 0 where the loss
            does not read it. A gradient at the final h is added at each sample's last step.
        h0: `[B, R]`, the initial state; None: zeros.
        c0: `[B, H]`, the LSTM's; None: zeros.
        layout: how `weights` are named and ordered.
            "torch": weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, with or without "_l0";
            "keras": kernel, recurrent_kernel, bias, as `layer.get_weights()`; a GRU with reset_after=True;
            "flax": the parameters of a `flax.linen` LSTMCell, OptimizedLSTMCell, GRUCell or SimpleCell.
        reverse: the layer reads from the last step to the first. x and dy stay in input order: flip the outputs of a
            Keras layer with go_backwards=True, which come in reading order.
        lengths: `[B]` steps of each sample of a padded batch; None: T for all.
        batch_first: x and dy are `[B, T, ...]`, as in Keras and flax. The record is time-major all the same.

    Activations are those of the cell's equation, the frameworks' defaults. Dropout inside the layer is not replayed.

    Returns:
        A LayerFlow named after the cell.

    Raises:
        ValueError: cell or layout is unknown, a shape does not fit, or dy is not 0 where a sample has no input.
        TypeError: an array does not hold real numbers.
        NonFiniteError: a NaN or infinity turned up; the message says where.

    >>> from torch import nn
    >>> lstm, x, dy = nn.LSTM(3, 4), torch.randn(20, 2, 3), torch.zeros(20, 2, 4)
    >>> dy[-1] = 1
    >>> from_arrays("lstm", lstm.state_dict(), x, dy).dh.shape
    torch.Size([20, 2])
    """
    if cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    kind = CELLS[cell]
    if c0 is not None and "c" not in kind.states:
        raise ValueError(f"c0: expected None, a {cell} has no cell state")
    x, dy = _sequence("x", x, batch_first), _sequence("dy", dy, batch_first)
    if x.shape[:2] != dy.shape[:2]:
        order = ("B, T" if batch_first else "T, B", "batch_first=False" if batch_first else "batch_first=True")
        raise ValueError(
            f"dy: expected the steps and samples of x, [T, B] = {tuple(x.shape[:2])}, got {tuple(dy.shape[:2])}; "
            f"both are read as [{order[0]}, ...], see {order[1]}"
        )
    w = as_weights(layout, kind, weights, Sizes(x.shape[-1], dy.shape[-1]))
    state = _initial(kind, w, x, h0, c0)
    record, origin = _measure(kind, w, x, dy, state, lengths, reverse)
    if origin is not None:
        raise NonFiniteError(origin.sentence)
    return record


def _measure(
    cell: Cell, w: Weights, x: Tensor, dy: Tensor, state: State, lengths: Tensor | Sequence[int] | None, reverse: bool
) -> tuple[LayerFlow, NonFiniteOrigin | None]:
    """The record, and the origin of a NaN or infinity if there is one."""
    T, B = x.shape[:2]
    with torch.no_grad():
        tr = engine.trace(cell, x, state, w, None if lengths is None else torch.as_tensor(lengths), reverse)
        if tr.active is not None:
            _check_padding(dy, tr.active)
        flow = engine.adjoint(tr, dy, tuple(None for _ in state))
        steps = torch.full((B,), T) if tr.active is None else tr.active.sum((0, 2))
        record = summarise(cell.name, tr, flow, False, steps)
        return record, None if healthy(record) else origin_of_nonfinite(cell.name, tr, dy, flow)


def _sequence(name: str, value: Any, batch_first: bool) -> Tensor:
    tensor = as_float64(name, value)
    if tensor.dim() != 3 or 0 in tensor.shape[:2]:
        order = "[B, T, ...]" if batch_first else "[T, B, ...]"
        raise ValueError(f"{name}: expected {order} with at least one step and one sample, got {tuple(tensor.shape)}")
    return (tensor.transpose(0, 1) if batch_first else tensor).contiguous()


def _initial(cell: Cell, w: Weights, x: Tensor, h0: Any, c0: Any) -> State:
    B, H = x.shape[1], w.w_ih.shape[0] // len(cell.gates)
    state = []
    for name, value, size in (("h0", h0, H if w.w_hr is None else w.w_hr.shape[0]), ("c0", c0, H))[: len(cell.states)]:
        tensor = x.new_zeros(B, size) if value is None else as_float64(name, value)
        if tensor.shape != (B, size):
            raise ValueError(f"{name}: expected {(B, size)}, got {tuple(tensor.shape)}")
        state.append(tensor)
    return tuple(state)


def _check_padding(dy: Tensor, active: Tensor) -> None:
    """dy `[T, B, R]` must be 0 where a sample has no input: the engine would leave it out."""
    stray = ((dy != 0) & ~active).any(-1)
    if bool(stray.any()):
        t, b = (int(i) for i in stray.nonzero()[0])
        raise ValueError(
            f"dy: expected 0 where a sample has no input, got {float(dy[t, b].abs().max()):.2g} at step {t} of sample "
            f"{b}, whose length is {int(active[:, b].sum())}; if a framework repeats the last output there, add "
            "these gradients to the sample's last step"
        )
