"""torch.nn's contract for a layer of any cell."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import PackedSequence

from unvanish.cells import Cell, Weights
from unvanish.cells.derived import structure
from unvanish.nn.layers import ADDED, SequenceLayer
from unvanish.nn.modules import CellModule, as_states, state_sizes


class Recurrent(SequenceLayer, CellModule):
    """Layers of a cell over whole sequences, with the interface of torch.nn.LSTM:

        s_t = cell.step(W_ih x_t + b_ih, W_hh s_{t-1} + b_hh, s_{t-1}; v)

    Args:
        cell: an instance of a subclass of `unvanish.Cell`; with `given` shares for a single layer only.
        input_size: I; for a cell with `given` shares x has D·M·H columns more, M of them `given`: each direction's H
            columns per share, behind the I that W_ih reads.
        hidden_size: H, of every state.
        num_layers: how many layers, each reading the output of the one below.
        bias: whether there are b_ih and b_hh.
        batch_first: input and output are `[B, T, ·]`; states stay `[L·D, B, H]`.
        dropout: between layers, in training.
        bidirectional: a second cell per layer reads from the end; outputs are joined, `[T, B, 2·H]`.
        device, dtype: of the weights.

    Returns of a call `layer(x, hx, lengths=...)`: (output, final state), the state a tuple in the order of the cell's
    `states`, or a single tensor where there is one. Packed and unbatched input, `lengths=`, `states`, `clip`,
    `checkpoint_every` and `h_detach` as in `unvanish.nn.LSTM`.

    Weights are named as torch's: `weight_ih_l0` `[G·H, I]`, `weight_hh_l0` `[G·H, H]`, `bias_ih_l0`, `bias_hh_l0`,
    `…_reverse`, and each of the cell's vectors `{name}_l0` `[H]`; those of gates without an input, or without a matrix,
    are absent. They are drawn from U(−1/√H, 1/√H), then given to `Cell.initialise_`.

    Raises:
        TypeError: cell is no `unvanish.Cell`.
        ValueError: the cell's declarations contradict each other, its step is not elementwise, or a size does not fit.

    >>> from unvanish.cells import ZOO
    >>> layer = Recurrent(ZOO["mgu"](), 3, 4, num_layers=2, bidirectional=True, batch_first=True)
    >>> y, h = layer(torch.zeros(2, 5, 3))
    >>> y.shape, h.shape
    (torch.Size([2, 5, 8]), torch.Size([4, 2, 4]))
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(cell, type) and issubclass(cell, Cell):
            raise TypeError(f"cell: expected an instance, got the class {cell.__name__}; pass {cell.__name__}()")
        if not isinstance(cell, Cell):
            raise TypeError(f"cell: expected an unvanish.Cell, got {type(cell).__name__}")
        structure(cell)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a whole number, at least 1, got {size!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout!r}")
        if cell.given and num_layers > 1:
            raise ValueError(f"num_layers: expected 1 for a cell that is given {', '.join(cell.given)} with its input")
        self.cell, self.input_size, self.hidden_size, self.num_layers = cell, input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        D = 2 if bidirectional else 1
        for layer, reverse in self._places():
            width = input_size if layer == 0 else hidden_size * D
            for name, shape in self._shapes(width).items():
                value = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name + _suffix(layer, reverse), nn.Parameter(value))
        self.reset_parameters()

    def _places(self) -> Iterator[tuple[int, bool]]:
        for layer in range(self.num_layers):
            yield layer, False
            if self.bidirectional:
                yield layer, True

    def _shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Name → shape of the weights of a layer that reads `width` features."""
        H, G, Q = self.hidden_size, len(self.cell.learnt_gates), len(self.cell.sources)
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (G * H, width)}
        if Q:
            shapes["weight_hh"] = (Q * H, H)
        if self.bias:
            shapes["bias_ih"] = (G * H,)
            if Q:
                shapes["bias_hh"] = (Q * H,)
        clash = [v for v in self.cell.vectors if v in shapes]
        if clash:
            raise ValueError(f"cell: its vectors can't be called {', '.join(clash)}, as the layer's weights are")
        return shapes | dict.fromkeys(self.cell.vectors, (H,))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights again: U(−1/√H, 1/√H), then `Cell.initialise_`."""
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)
        for layer, reverse in self._places():
            w = self._weights(layer, reverse)
            self.cell.initialise_(w)
            if w.v is not None:
                for name, value in zip(self.cell.vectors, w.v, strict=True):
                    getattr(self, name + _suffix(layer, reverse)).copy_(value)

    def direction_weights(self, layer: int, reverse: bool, named: Mapping[str, Tensor] | None = None) -> Weights:
        """The weights of one layer and direction as the engine takes them, from `named` learnt ones or its own;
        differentiable."""
        return self._with_given(self.cell.effective(self._weights(layer, reverse, named)), reverse)

    def learnt_gradients(self, layer: int, reverse: bool, gradients: Weights) -> tuple[Tensor, Tensor | None]:
        """∂E/∂(learnt W_ih, learnt W_hh) from those by the weights that the step multiplies with."""
        with torch.enable_grad():
            weights = self._weights(layer, reverse)
            learnt = Weights(*(None if w is None else w.detach().requires_grad_() for w in weights))  # type: ignore[arg-type]
            used = self._with_given(self.cell.effective(learnt), reverse)
        if used is learnt:
            return gradients.w_ih, gradients.w_hh
        pairs = [(u, g) for u, g in zip(used[:2], gradients[:2], strict=True) if u is not None and u.requires_grad]
        ends, arrived = zip(*pairs, strict=True)
        wanted = [w for w in learnt[:2] if w is not None]
        found = torch.autograd.grad(ends, wanted, arrived, allow_unused=True, materialize_grads=True)
        return (*found, None)[:2]  # type: ignore[return-value]

    def _weights(self, layer: int, reverse: bool, named: Mapping[str, Tensor] | None = None) -> Weights:
        end, vectors = _suffix(layer, reverse), self.cell.vectors

        def weight(name: str) -> Any:
            return getattr(self, name + end, None) if named is None else named.get(name + end)

        w_ih, w_hh, b_ih, b_hh = map(weight, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        v = torch.stack([weight(name) for name in vectors]) if vectors else None
        return Weights(w_ih, w_hh, b_ih, b_hh, None, v)  # type: ignore[arg-type]

    def _with_given(self, w: Weights, reverse: bool) -> Weights:
        """The weights with columns that pass the `given` shares through: W_ih and, below it, an identity for them."""
        M = len(self.cell.given) * self.hidden_size
        if not M:
            return w
        columns = w.w_ih.new_zeros(M, self.columns)
        first = self.input_size + (M if reverse else 0)
        columns[:, first : first + M] = torch.eye(M, dtype=w.w_ih.dtype, device=w.w_ih.device)
        w_ih = torch.cat([pad(w.w_ih, (0, self.columns - self.input_size)), columns])
        return w._replace(w_ih=w_ih, b_ih=None if w.b_ih is None else pad(w.b_ih, (0, M)))

    @property
    def columns(self) -> int:
        """The number of columns of x: those that W_ih reads and each direction's given shares."""
        return self.input_size + len(self.cell.given) * self.hidden_size * (2 if self.bidirectional else 1)

    def flatten_parameters(self) -> None:
        """Nothing to do; torch's layers arrange their weights for cuDNN here."""

    def _check(self, x: Tensor | PackedSequence, hx: Any) -> None:
        if isinstance(x, PackedSequence):
            features, batch = x.data.shape[-1], int(x.batch_sizes[0])
        else:
            if not isinstance(x, Tensor):
                raise TypeError(f"input: expected a Tensor or a PackedSequence, got {type(x).__name__}")
            if x.dim() not in (2, 3):
                raise ValueError(f"Recurrent: expected input to be 2-D or 3-D, got {x.dim()}-D")
            if x.shape[1 if self.batch_first and x.dim() == 3 else 0] == 0:
                raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
            features, batch = x.shape[-1], 1 if x.dim() == 2 else x.shape[0 if self.batch_first else 1]
        if features != self.columns:
            given = f" and the given shares, {self.columns}" if self.cell.given else ""
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}{given}, got {features}"
            )
        if hx is None:
            return
        given, names = as_states(hx), ", ".join(f"{s}_0" for s in self.cell.states)
        if len(given) != len(self.cell.states) or not all(isinstance(h, Tensor) for h in given):
            expected = names if len(self.cell.states) == 1 else f"({names})"
            raise ValueError(f"hx: expected {expected}, got {', '.join(type(h).__name__ for h in given)}")
        batched = isinstance(x, PackedSequence) or x.dim() == 3
        rows = self.num_layers * (2 if self.bidirectional else 1)
        for name, h, n in zip(self.cell.states, given, state_sizes(self), strict=True):
            shape = (rows, batch, n) if batched else (rows, n)
            if h.shape != shape:
                raise RuntimeError(f"hx: expected {name}_0 of {shape}, got {tuple(h.shape)}")

    def extra_repr(self) -> str:
        """The cell and what differs from the defaults."""
        parts = [repr(self.cell), str(self.input_size), str(self.hidden_size)]
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        defaults |= dict.fromkeys(ADDED)
        parts += [f"{k}={getattr(self, k)}" for k, usual in defaults.items() if getattr(self, k) != usual]
        return ", ".join(parts)


def _suffix(layer: int, reverse: bool) -> str:
    return f"_l{layer}" + "_reverse" * reverse
