"""The mathematics of one recurrent step: equations, hand-written adjoints, analytic Jacobians."""

from unvanish.cells.base import Adjoint, Cell, State, Weights
from unvanish.cells.gru import GRU
from unvanish.cells.lstm import LSTM
from unvanish.cells.rnn import RNN, ReluRNN, SigmoidRNN, TanhRNN

CELLS: dict[str, Cell] = {cell.name: cell for cell in (TanhRNN(), ReluRNN(), SigmoidRNN(), LSTM(), GRU())}
"""Every cell by name: rnn_tanh, rnn_relu, rnn_sigmoid, lstm, gru."""

CARRY = {"lstm": "f", "gru": "z"}
"""Cell → the gate that multiplies its old state; a plain RNN carries nothing. In torch's GRU, h_t = (1 − z) n + z
h_{t-1}."""

__all__ = [
    "CARRY",
    "CELLS",
    "GRU",
    "LSTM",
    "RNN",
    "Adjoint",
    "Cell",
    "ReluRNN",
    "SigmoidRNN",
    "State",
    "TanhRNN",
    "Weights",
]
