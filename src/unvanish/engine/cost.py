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
"""(torch's name of the layer's mode, training) → its costs; else the engine runs. An LSTM trains on the engine, however
short the call: torch's in float32 has no second derivatives and forbids changing its output"""


def faster_in_torch(mode: str, T: int, B: int, weights: int, dtype: torch.dtype, training: bool) -> str | None:
    """Why torch's layer is the faster one for a call, as the end of a sentence; None: it is not.

    In less than single precision torch alone has kernels.
    """
    if dtype not in (torch.float32, torch.float64):
        return f"torch has kernels for {dtype}, the engine has none" if torch_internals.multiplies(dtype) else None
    cost = CALLS.get((mode, training))
    if cost is None:
        return None
    more = cost.fixed + cost.weight * weights - T * (cost.step + cost.product * B * weights)
    return "torch's layer is faster for so short a call" if more > 0 else None
