"""One recurrent step, elementwise over the units, and the calculus that follows from it.

A cell's file holds its equations and nothing about layers, sequences or devices.
"""

from unvanish.cells.base import Cell, State, Weights
from unvanish.cells.calculus import Adjoint, Partials, Point
from unvanish.cells.gru import GRU
from unvanish.cells.lstm import LSTM
from unvanish.cells.rnn import RNN, ReluRNN, SigmoidRNN, TanhRNN

CELLS: dict[str, Cell] = {cell.name: cell for cell in (TanhRNN(), ReluRNN(), SigmoidRNN(), LSTM(), GRU())}
"""torch's cells by name: rnn_tanh, rnn_relu, rnn_sigmoid, lstm, gru."""

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RNN",
    "Adjoint",
    "Cell",
    "Partials",
    "Point",
    "ReluRNN",
    "SigmoidRNN",
    "State",
    "TanhRNN",
    "Weights",
]
