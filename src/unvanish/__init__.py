"""unvanish: see, explain and cure vanishing gradients in recurrent networks.

import unvanish as uv

with uv.watch(model) as flow:
    loss_fn(model(x), y).backward()
flow["lstm.l0"].dh          # [T, B] ‖∂E/∂h_t‖
"""

from unvanish import cures, flow, nn
from unvanish.flow.watch import mark, watch
from unvanish.nn import accelerate, restore

__version__ = "0.1.0"

__all__ = ["__version__", "accelerate", "cures", "flow", "mark", "nn", "restore", "watch"]
