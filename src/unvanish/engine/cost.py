"""Which is faster over a call, the engine or torch's own layer: a rule fitted by `benchmarks/dispatch.py`.

In the engine less in torch's layer, a call of W = G·H·(I + H) weights over T steps of B samples costs

    F + p·W − T·(s + g·B·W)   microseconds

F the overhead of the engine's Python, p the cost of laying out a weight, s what torch spends on a step beside its
product, g what the engine gains on a multiply-add. Fitted on one thread of an AMD Zen 5 with AVX-512, in float32.
"""

from typing import NamedTuple

import torch

from unvanish import torch_internals


class Call(NamedTuple):
    """What a kind of call costs, in microseconds."""

    fixed: float
    weight: float
    step: float
    product: float


CALLS: dict[tuple[str, bool], Call] = {
    ("RNN_TANH", False): Call(59.6, 0.000359, 3.92, 1.91e-05),
    ("RNN_TANH", True): Call(170, 0.00258, 28.9, 3.62e-05),
    ("RNN_RELU", False): Call(59.6, 0.000359, 3.92, 1.91e-05),
    ("RNN_RELU", True): Call(170, 0.00258, 28.9, 3.62e-05),
    ("LSTM", False): Call(20.5, 0, 0.551, 0),
    ("GRU", False): Call(56.4, 0.000396, 10.5, 1.69e-05),
    ("GRU", True): Call(154, 0.00255, 102, 3.82e-05),
}
"""(torch's name of the layer's mode, training) → its costs; else the engine runs. An LSTM does not train on torch's
layer, however short the call: in float32 that has no second derivatives and forbids changing its output"""
LAYER = "torch's layer is faster for so short a call"
STEPS = "torch's cell is faster for so few steps"
FEW = 2
"""steps over which an LSTM trains by torch's LSTMCell: 1.4 to 3 times as fast as torch's layer over one step, 1.0 to
1.3 times over two, slower from three on; that layer lays out its weights anew at each call"""


def faster_in_torch(mode: str, T: int, B: int, weights: int, dtype: torch.dtype, training: bool) -> str | None:
    """Why torch is faster over a call, as the end of a sentence: `STEPS` where its cell is, step by step; else its
    layer. None: it is not.

    In less than single precision torch alone has kernels.
    """
    if dtype not in (torch.float32, torch.float64):
        return f"torch has kernels for {dtype}, the engine has none" if torch_internals.multiplies(dtype) else None
    if mode == "LSTM" and training and 0 < T <= FEW:
        return STEPS
    cost = CALLS.get((mode, training))
    if cost is None:
        return None
    more = cost.fixed + cost.weight * weights - T * (cost.step + cost.product * B * weights)
    return LAYER if more > 0 else None
