"""How far a gradient reaches: the norm of the last step's gradient over the lag, at one moment of training."""

from copy import deepcopy

import torch

from unvanish import flow
from unvanish.train.gradient_breakdown import ending_together
from unvanish.train.models import SequenceModel
from unvanish.train.records import Reach
from unvanish.train.tasks import Task

PROBES = 32
"""validation samples on which the gradient is measured"""


def measure(model: SequenceModel, task: Task, update: int, fraction: float = 0.01) -> Reach:
    """‖∂E_T/∂s_{T−ℓ}‖ of the task's own error at the last step, s = c for the LSTM and h for the others, in float64.

    The rows of the map are renormalised as they go, so `log_norm` is right far below what the training's float32 can
    hold.

    Raises:
        ArithmeticError: the error is NaN or infinite.
    """
    double = deepcopy(model).double().train(False)
    x, y = ending_together(task, PROBES)
    states, _ = double.recurrent(x)
    last = states[:, -1].detach().requires_grad_()
    error = task.loss(double.head(last), y) * len(y)
    if not error.isfinite():
        raise ArithmeticError(f"the loss became {error.item()} at update {update}; try a smaller lr")
    (source,) = torch.autograd.grad(error, last)
    found = flow.adjoint_map(double.recurrent, x, sources=[-1], error=source.unsqueeze(0))
    log_norms = found.over_lag(0)
    relative = log_norms - log_norms[0]
    # No interpolation: between two exact zeros, −inf, it would make a NaN.
    middle, low, high = (torch.quantile(relative, q, dim=1, interpolation="lower") for q in (0.5, 0.1, 0.9))
    decay = flow.decay(middle, fraction=fraction)
    return Reach(
        update=update,
        lag=list(range(len(middle))),
        log_norm=middle.tolist(),
        low=low.tolist(),
        high=high.tolist(),
        rate=decay.rate,
        half_life=decay.half_life,
        reach=decay.reach,
        fraction=fraction,
    )
