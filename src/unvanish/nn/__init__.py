"""Drop-in RNN, LSTM and GRU, run by the engine; `accelerate` and `restore` swap them in and out of a model."""

from unvanish.nn.accelerate import accelerate, restore
from unvanish.nn.cells import GRUCell, LSTMCell, RNNCell
from unvanish.nn.layers import GRU, LSTM, RNN, LayerStates

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "LayerStates", "RNNCell", "accelerate", "restore"]
