"""Whether the engine or torch's own layer is faster for a call: a rule fitted by `benchmarks/dispatch.py`.

The time in the engine minus the time in torch's layer, for W = G·H·(I + H) weights and T steps of B samples, is

    F + p·W − T·(s + g·B·W)   microseconds

F is the overhead of the engine's Python code, p the cost of packing a weight, s torch's cost per step besides the
product, and g the engine's gain per multiply-add. Fitted on one thread of an AMD Zen 5 with AVX-512, in float32.
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
"""(torch's name of the layer's mode, training) → its costs; without an entry the engine runs. An LSTM never trains on
torch's layer, however short the call: in float32 it has no second derivatives and its output can't be modified"""
LAYER = "torch's layer is faster for so short a call"
STEP = "torch's cell is faster for a single step"
STEPPED = ("LSTM",)
"""modes that train a single step with torch's cell. An LSTM: 1.2 to 1.4 times as fast as torch's layer at H ≤ 128, 1.6
to 6 times at 512, since that layer packs its weights again at each call. From two steps on the engine is as fast"""

RAISING = ("LSTM",)
"""modes of which torch 2.13's layer raises an error under autocast to a dtype that the processor does not multiply"""


def faster_in_torch(mode: str, T: int, B: int, weights: int, dtype: torch.dtype, training: bool) -> str | None:
    """Why torch is faster for a call, as the end of a sentence: `STEP` if its cell is; else the reason for its layer.
    None: the engine is faster.

    Below single precision only torch has kernels. Where the processor does not multiply in such a dtype they are slow:
    the engine, in float32, is then chosen as for float32, and always for `RAISING`.
    """
    if dtype not in (torch.float32, torch.float64):
        if torch_internals.multiplies(dtype):
            return f"torch has kernels for {dtype}, the engine has none"
        if mode in RAISING:
            return None
    if training and T == 1 and mode in STEPPED:
        return STEP
    cost = CALLS.get((mode, training))
    if cost is None:
        return None
    more = cost.fixed + cost.weight * weights - T * (cost.step + cost.product * B * weights)
    return LAYER if more > 0 else None
