"""Whether the engine or torch's own layer is faster for a call: a rule fitted by `benchmarks/dispatch.py`.

The time in the engine minus the time in torch's layer, for W = G·H·(I + H) weights and T steps of B samples, is

    F + p·W − T·(s + q·W + g·B·W)   microseconds

F is the overhead of the engine's Python code, p the cost of packing a weight, s torch's cost per step besides the
product, q the engine's gain per weight that a step reads, and g its gain per multiply-add: a loss where torch
multiplies in bfloat16 and the engine in float32.
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
    read: float = 0.0
    threads: float = 0.0
    """what a step in torch's layer takes longer on several threads than on one"""


CALLS: dict[tuple[str, bool], Call] = {
    ("RNN_TANH", False): Call(59.6, 0.000359, 3.92, 1.91e-05),
    ("RNN_TANH", True): Call(170, 0.00258, 28.9, 3.62e-05),
    ("RNN_RELU", False): Call(59.6, 0.000359, 3.92, 1.91e-05),
    ("RNN_RELU", True): Call(170, 0.00258, 28.9, 3.62e-05),
    ("LSTM", False): Call(20.5, 0, 0.551, 0),
    ("GRU", False): Call(56.4, 0.000396, 10.5, 1.69e-05),
    ("GRU", True): Call(154, 0.00255, 102, 3.82e-05),
    ("LSTM_LOOP", False): Call(113, 0.000949, 33.4, 1e-05),
    ("LSTM_LOOP", True): Call(384, 0.00307, 256, 2.13e-05),
}
"""(mode, training) → its costs in float32; without an entry the engine runs. Modes are torch's names, and `LOOP`.
Fitted on one thread of an AMD Zen 5 with AVX-512, `LOOP` on an Intel Xeon. An LSTM never trains on torch's kernel in
float32, however short the call: there it has no second derivatives and its output can't be modified"""
LOW: dict[tuple[str, bool], Call] = {
    ("RNN_TANH", False): Call(53.1, 0.000433, 14, -7.76e-06, 0.000136),
    ("RNN_TANH", True): Call(178, 0.00312, 74.8, -4.15e-05, 0.00106),
    ("RNN_RELU", False): Call(53.1, 0.000433, 14, -7.76e-06, 0.000136),
    ("RNN_RELU", True): Call(178, 0.00312, 74.8, -4.15e-05, 0.00106),
    ("LSTM", False): Call(17.8, 0.0003, 1.18, -1.55e-05, 0, 4.1),
    ("LSTM", True): Call(1.33, 0.000529, 1.33, -4.14e-05, 0.000232, 21.4),
    ("GRU", False): Call(49.2, 0.000283, 49.2, -8.53e-06, 5.32e-06),
    ("GRU", True): Call(381, 0.00276, 381, -4.76e-05, 0.000962),
    ("LSTM_LOOP", False): Call(89.5, 0.000399, 84.2, -1.04e-05, 7.97e-05),
    ("LSTM_LOOP", True): Call(301, 0.00284, 301, -3.33e-05, 0.000882),
}
"""the same where torch multiplies in bfloat16 or float16 by instructions of the processor, fitted in bfloat16 on an
Intel Xeon with AMX, of which no other processor has the speed: elsewhere the engine is taken too seldom, not too
often"""
LOOP = "LSTM_LOOP"
"""an LSTM that torch runs step by step, having no kernel for it: packed, with a projection, in float64, or trained in
float16"""
LAYER = "torch's layer is faster for so short a call"
STEP = "torch's cell is faster for a single step"
STEPPED = ("LSTM",)
"""modes that train a single step with torch's cell, which has no projection. An LSTM: 1.2 to 1.4 times as fast as
torch's layer at H ≤ 128, 1.6 to 6 times at 512, since that layer packs its weights again at each call. From two steps
on the engine is as fast"""
RAISING = ("LSTM",)
"""modes of which torch 2.13's layer can raise an error under autocast to a dtype that the processor does not multiply:
an LSTM does without AVX-512"""


def faster_in_torch(
    mode: str,
    T: int,
    B: float,
    weights: int,
    dtype: torch.dtype,
    training: bool,
    *,
    projected: bool = False,
    packed: bool = False,
) -> str | None:
    """Why torch is faster for a call, as the end of a sentence: `STEP` if its cell is; else the reason for its layer.
    None: the engine is faster.

    Below single precision the engine computes in float32. That is compared with torch's kernels in such a dtype where
    the processor multiplies in it; elsewhere they are slow, and the engine is chosen as for float32, and always for
    `RAISING`. For packed samples, B of which take part in a step on average, torch has no kernel at all: its loop is
    faster only where it multiplies faster.
    """
    calls = CALLS
    if dtype not in (torch.float32, torch.float64):
        if torch_internals.multiplies(dtype):
            calls = LOW
        elif mode in RAISING:
            return None
    if calls is CALLS:
        if packed:
            return None
        if training and T == 1 and mode in STEPPED and not projected and dtype in (torch.float32, torch.float64):
            return STEP
    loops = projected or packed or dtype is torch.float64 or (training and dtype is torch.float16)
    if mode == "LSTM" and loops:
        mode = LOOP
    cost = calls.get((mode, training))
    if cost is None:
        return None
    step = cost.step + (cost.threads if cost.threads and torch.get_num_threads() > 1 else 0.0)
    gain = step + (cost.read + cost.product * B) * weights
    if cost.fixed + cost.weight * weights <= T * gain:
        return None
    return LAYER if gain > 0 else f"torch multiplies faster, in {str(dtype).removeprefix('torch.')}"
