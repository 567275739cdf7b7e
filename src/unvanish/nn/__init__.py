"""Drop-in RNN, LSTM and GRU, and `Recurrent` for any cell, run by the engine; `accelerate` and `restore` swap torch's
layers in and out of a model.

Belongs here: torch modules that run on the engine, and the layers and directions of a torch module.
Does not: a layer's arithmetic (`engine`), measurements (`flow`).
"""

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
