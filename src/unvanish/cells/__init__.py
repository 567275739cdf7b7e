"""One recurrent step, elementwise over the units, and the calculus that follows from it.

Belongs here: equations, and the derivatives that follow from them, for any leading dimensions.
Does not: layers, sequences, parameters and devices (`engine`, `nn`).
"""

from unvanish.cells import zoo
from unvanish.cells.calculus import Adjoint, Partials, Point
from unvanish.cells.cell import Cell, State, Weights
from unvanish.cells.gru import GRU
from unvanish.cells.lstm import LSTM
from unvanish.cells.rnn import RNN, ReluRNN, SigmoidRNN, TanhRNN
from unvanish.cells.torch_kernel import TorchKernel

CELLS: dict[str, Cell] = {cell.name: cell for cell in (TanhRNN(), ReluRNN(), SigmoidRNN(), LSTM(), GRU())}
"""torch's cells by name: rnn_tanh, rnn_relu, rnn_sigmoid, lstm, gru."""

ZOO: dict[str, type[Cell]] = {
    "rnn_tanh": TanhRNN,
    "rnn_relu": ReluRNN,
    "rnn_sigmoid": SigmoidRNN,
    "lstm": LSTM,
    "gru": GRU,
    "antisymmetric": zoo.AntisymmetricRNN,
    "brc": zoo.BRC,
    "cifg": zoo.CIFG,
    "cornn": zoo.CoRNN,
    "indrnn": zoo.IndRNN,
    "janet": zoo.JANET,
    "leaky": zoo.Leaky,
    "lem": zoo.LEM,
    "lif": zoo.LIF,
    "ligru": zoo.LiGRU,
    "mgu": zoo.MGU,
    "mingru": zoo.MinGRU,
    "minlstm": zoo.MinLSTM,
    "peephole": zoo.Peephole,
    "slstm": zoo.SLSTM,
    "star": zoo.STAR,
    "ur_lstm": zoo.URLSTM,
}
"""Every cell of the library by name: torch's, and those of `unvanish.cells.zoo`, each with its paper in its
docstring."""

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RNN",
    "ZOO",
    "Adjoint",
    "Cell",
    "Partials",
    "Point",
    "ReluRNN",
    "SigmoidRNN",
    "State",
    "TanhRNN",
    "TorchKernel",
    "Weights",
]
