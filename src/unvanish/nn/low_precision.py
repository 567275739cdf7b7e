"""Layers in bfloat16 and float16, under autocast or by their own dtype: computed in float32, and rounded at the end."""

from typing import Any

import torch
from torch import Tensor

from unvanish.nn.modules import LayerDirection, TimeMajor, as_states

LOW = (torch.bfloat16, torch.float16)


def rounded_to(layers: list[LayerDirection], inputs: TimeMajor, hx: Any, promotes: bool = False) -> torch.dtype | None:
    """The dtype of the results, where they are computed `in_float32` and rounded; None: computed as given.

    Autocast rounds to its dtype, with `promotes` to the wider of that and the initial state's, and does not change
    float64. Without autocast a GPU multiplies in the dtype of a layer, and torch raises an error where several meet.
    """
    x, states = inputs.x, as_states(hx)
    dtypes = {v.dtype for v in (x, layers[0].weights.w_ih, *states)}
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        dtype = torch.get_autocast_dtype(device)
        return torch.promote_types(dtype, states[0].dtype if states else x.dtype) if promotes else dtype
    return x.dtype if device == "cpu" and x.dtype in LOW and dtypes == {x.dtype} else None


def in_float32(
    layers: list[LayerDirection], inputs: TimeMajor, hx: Any
) -> tuple[list[LayerDirection], TimeMajor, tuple[Tensor, ...] | None]:
    """Weights, input and initial states in float32, by differentiable casts."""
    layers = [d._replace(weights=d.weights.to(torch.float32)) for d in layers]
    return layers, inputs._replace(x=inputs.x.float()), None if hx is None else tuple(h.float() for h in as_states(hx))
