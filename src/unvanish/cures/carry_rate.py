"""A learning rate of their own for the biases that set the time constants."""

from typing import Any

import torch
from torch import Tensor, nn

from unvanish.cures.carry_bias import carry_biases
from unvanish.cures.layer_weights import finite


class CarryRate:
    """Scale the updates of the carry gates' biases, with any optimizer:

        b_f ← b_f + scale · Δb_f,  Δb_f the optimizer's own update

    This is a learning rate of scale · lr for these biases (the LSTM's f, the GRU's z; `Cell.carry_gate`). It also works
    with optimizers that divide by the size of the gradient, like Adam, where scaling the gradient would have no effect.
    A parameter group can't do this, because torch stacks all gates in one bias.

        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        slow = CarryRate(optimizer, model, scale=0.1)

    A scale below 1 keeps the time constants nearly fixed while the rest learns: the longer a unit remembers, the more
    sensitive the loss is to its carry. A scale above 1 helps if the time constants start far from the lags.

    Args:
        optimizer: any torch.optim.Optimizer that has the biases among its parameters.
        model: nn.LSTM, nn.GRU, their cells, `unvanish.nn.Recurrent` with a carry gate, or any module whose recurrent
            layers are all of these.
        scale: at least 0; can be changed at any time, e.g. by a schedule.

    Raises:
        TypeError: optimizer is not an optimizer, model is not a module or has a cell without a carry gate, or scale is
            not a number.
        ValueError: a layer has bias=False or a parametrized bias, the optimizer does not hold a bias, or scale is
            negative or not finite.

    Source: Zucchet & Orvieto 2024 for the sharpness; smaller learning rates for the recurrence of a linear unit are
    used by Gu, Goel & Ré 2022 and Orvieto et al. 2023.

    Limits: torch's bias_ih and bias_hh of a gate both learn, so their sum moves by both updates, scaled or not. The
    recurrent matrix moves the gate too, at the full rate. `remove()` takes it off; it is not part of a state_dict.

    >>> lstm = nn.LSTM(2, 3)
    >>> optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
    >>> still, before = CarryRate(optimizer, lstm, scale=0.0), lstm.bias_ih_l0.detach().clone()
    >>> lstm(torch.ones(4, 1, 2))[0].sum().backward()
    >>> optimizer.step()
    >>> [bool((now == was).all()) for now, was in zip(lstm.bias_ih_l0.chunk(4), before.chunk(4))]
    [False, True, False, False]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.scale = scale
        self._rows = [row for rows in carry_biases(model, "CarryRate") for row in rows]
        held = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
        for row in self._rows:
            if row._base is None or row._base.data_ptr() not in held:
                raise ValueError(
                    "optimizer: it does not hold a bias of the model's recurrent layers; make it from "
                    "model.parameters() after every cure that replaces layers"
                )
        self._before: list[Tensor] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._rescale),
        ]

    @property
    def scale(self) -> float:
        """The factor on the learning rate."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = finite("scale", value)
        if value < 0:
            raise ValueError(f"scale: expected a factor of at least 0, got {value}")

    def remove(self) -> None:
        """Leave the optimizer's updates as they are from now on."""
        for handle in self._handles:
            handle.remove()

    def _remember(self, *_: Any) -> None:
        self._before = [row.detach().clone() for row in self._rows]

    @torch.no_grad()
    def _rescale(self, *_: Any) -> None:
        for row, old in zip(self._rows, self._before, strict=True):
            row.copy_(old + self._scale * (row - old))
