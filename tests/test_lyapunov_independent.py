"""Lyapunov spectra against an implementation that shares nothing with ours: plain numpy, complex-step derivatives, and
modified Gram–Schmidt written out (Benettin et al. 1980)."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import unvanish as uv

T, WARMUP, H, INPUTS = 900, 450, 4, 2
Array = np.ndarray


def sigmoid(a: Array) -> Array:
    return 1 / (1 + np.exp(-a))


def rnn_step(a_x: Array, w: Array, b: Array, s: Array) -> Array:
    return np.tanh(a_x + w @ s + b)


def gru_step(a_x: Array, w: Array, b: Array, s: Array) -> Array:
    x_r, x_z, x_n = np.split(a_x, 3)
    h_r, h_z, h_n = np.split(w @ s + b, 3)
    z = sigmoid(x_z + h_z)
    return (1 - z) * np.tanh(x_n + sigmoid(x_r + h_r) * h_n) + z * s


def lstm_step(a_x: Array, w: Array, b: Array, s: Array) -> Array:
    h, c = np.split(s, 2)
    i, f, g, o = np.split(a_x + w @ h + b, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return np.concatenate([sigmoid(o) * np.tanh(c), c])


def gram_schmidt(a: Array) -> tuple[Array, Array]:
    """(Q, diagonal of R)."""
    q, sizes = a.copy(), np.empty(a.shape[1])
    for i in range(a.shape[1]):
        for j in range(i):
            q[:, i] -= (q[:, j] @ q[:, i]) * q[:, j]
        sizes[i] = np.sqrt(q[:, i] @ q[:, i])
        q[:, i] /= sizes[i]
    return q, sizes


def spectrum(layer: nn.RNNBase, x: Array, step: Callable[..., Array], size: int) -> Array:
    w_ih, w, b_ih, b = (p.detach().numpy() for p in layer.parameters())
    a_x = x @ w_ih.T + b_ih
    s, total, tiny = np.zeros(size), np.zeros(size), 1e-200
    q = np.eye(size)
    for t in range(len(x)):
        moved = [step(a_x[t], w, b, s + 1j * tiny * e).imag / tiny for e in np.eye(size)]
        q, sizes = gram_schmidt(np.stack(moved, axis=1) @ q)
        s = step(a_x[t], w, b, s)
        if t >= WARMUP:
            total += np.log(sizes)
    return np.sort(total / (len(x) - WARMUP))[::-1]


@pytest.mark.parametrize("gain", [1.0, 3.0])
@pytest.mark.parametrize(
    ("kind", "step", "size"), [(nn.RNN, rnn_step, H), (nn.GRU, gru_step, H), (nn.LSTM, lstm_step, 2 * H)]
)
def test_spectrum_agrees_with_plain_numpy(kind: type[nn.RNNBase], step: Callable[..., Array], size: int, gain: float):
    torch.manual_seed(3)  # whose exponents lie apart: both first Q turn to the same directions while warming up
    layer = kind(INPUTS, H, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(gain)
    x = np.random.default_rng(0).standard_normal((T, INPUTS))
    found = uv.flow.lyapunov(layer, torch.as_tensor(x)[:, None], warmup=WARMUP).exponents.numpy()
    np.testing.assert_allclose(found, spectrum(layer, x, step, size), rtol=0, atol=1e-9)
