"""The mathematics of one recurrent step: equations, hand-written adjoints, analytic Jacobians."""

from unvanish.cells.base import Adjoint, Cell, State, Weights
from unvanish.cells.gru import GRU
from unvanish.cells.lstm import LSTM
from unvanish.cells.rnn import RNN, ReluRNN, SigmoidRNN, TanhRNN

CELLS: dict[str, Cell] = {cell.name: cell for cell in (TanhRNN(), ReluRNN(), SigmoidRNN(), LSTM(), GRU())}
"""Every cell by name: rnn_tanh, rnn_relu, rnn_sigmoid, lstm, gru."""

__all__ = ["CELLS", "GRU", "LSTM", "RNN", "Adjoint", "Cell", "ReluRNN", "SigmoidRNN", "State", "TanhRNN", "Weights"]
