"""Drop-in RNN, LSTM and GRU, and `Recurrent` for any cell, run by the engine; `accelerate` and `restore` swap torch's
layers in and out of a model."""

from unvanish.nn.accelerate import accelerate, restore
from unvanish.nn.cells import GRUCell, LSTMCell, RNNCell
from unvanish.nn.layers import GRU, LSTM, RNN, LayerStates
from unvanish.nn.recurrent import Recurrent
from unvanish.nn.torch_forward import explain

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LayerStates",
    "RNNCell",
    "Recurrent",
    "accelerate",
    "explain",
    "restore",
]
