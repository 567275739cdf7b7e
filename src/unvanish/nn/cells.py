"""torch.nn.LSTMCell and GRUCell themselves, and torch.nn.RNNCell with a sigmoid and the mathematics of
`unvanish.cells`.

For a single step there is no sequence to speed up; these classes exist so that a model can use a single family of
layers, and for the sigmoid.
"""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import rnn as torchs
from torch.nn.modules.rnn import GRUCell, LSTMCell

from unvanish.cells import CELLS, Weights
from unvanish.nn.torch_tools import TorchTools

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


class RNNCell(TorchTools, torchs.RNNCell):
    """h' = φ(W_ih x + b_ih + W_hh h + b_hh), φ ∈ {tanh, relu, sigmoid}: torch.nn.RNNCell, and sigmoid."""

    def _as_torchs(self) -> nn.Module:
        if self.nonlinearity == "sigmoid":
            raise ValueError("nonlinearity: torch's RNNCell, which is used here, has no sigmoid")
        twin: Any = copy.copy(self)
        if type(self) is RNNCell:
            twin.__class__ = torchs.RNNCell
        return twin

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """As torch's: `[B, I]` or `[I]` → `[B, H]` or `[H]`."""
        if type(input) is not Tensor:
            leaf = self._leaf(input, hx)
            if leaf is not None:
                return leaf
        if self.nonlinearity != "sigmoid":
            return super().forward(input, hx)
        if input.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input: expected {self.input_size} features, got {input.shape[-1]}")
        if hx is None:
            hx = input.new_zeros(*input.shape[:-1], self.hidden_size)
        if hx.shape != (*input.shape[:-1], self.hidden_size):
            raise RuntimeError(f"hx: expected {(*input.shape[:-1], self.hidden_size)}, got {tuple(hx.shape)}")
        weights = Weights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        cell = CELLS["rnn_sigmoid"]
        return cell.advance(cell.project(input, weights), (hx,), weights)[0]
