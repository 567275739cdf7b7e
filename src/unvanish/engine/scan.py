"""A linear recurrence over time without a loop over time."""

from typing import Any

import torch
from torch import Tensor


def scan_(keep: Tensor, add: Tensor, backwards: bool = False) -> Tensor:
    """s_t = keep_t ⊙ s_{t-1} + add_t for all t, with s_{-1} = 0; `backwards`: s_t = keep_t ⊙ s_{t+1} + add_t, with
    s_T = 0. In log₂ T rounds of multiply–adds.

    Two neighbouring steps form one step of a sequence half as long, (keep_t keep_{t-1}, keep_t add_{t-1} + add_t); the
    states between follow from its states. There is no division, so a carry of 0 is not a special case, and no sum over
    all steps, so a state that has vanished keeps its relative precision.

    Args:
        keep: `[T, ...]`; the entry of the first step read has no effect.
        add: `[T, ...]`, overwritten: the states are computed in its place.

    Returns:
        The states: `add` itself, or with `backwards` a new tensor.

    Source: Blelloch 1990, "Prefix sums and their applications", section 1.4.
    """
    if backwards:
        return scan_(keep.flip(0), add.flip(0)).flip(0)
    T = len(add)
    if T > 1:
        pairs = T // 2
        odd = add[1::2]
        odd.addcmul_(keep[1::2], add[0 : 2 * pairs : 2])
        if pairs > 1:
            scan_(torch.mul(keep[1::2], keep[0 : 2 * pairs : 2]), odd)
        add[2::2].addcmul_(keep[2::2], odd[: (T - 1) // 2])
    return add


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: Tensor, add: Tensor, backwards: bool) -> Tensor:
        states = scan_(keep, add.clone(), backwards)
        ctx.save_for_backward(keep, states)
        ctx.backwards = backwards
        return states

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, Tensor, None]:
        keep, states = ctx.saved_tensors
        earlier = -1 if ctx.backwards else 1
        total = scan(keep.roll(-earlier, 0), errors[0], not ctx.backwards)
        before = states.roll(earlier, 0)
        first = torch.zeros_like(before[:1])
        before = torch.cat([before[:-1], first] if ctx.backwards else [first, before[1:]])
        return total * before, total, None


def scan(keep: Tensor, add: Tensor, backwards: bool = False) -> Tensor:
    """`scan_` in new memory, differentiable any number of times: δadd_t = δs_t + keep_{t+1} ⊙ δadd_{t+1} is a scan in
    the opposite direction, and δkeep_t = δadd_t ⊙ s_{t-1}."""
    return _Scan.apply(keep, add, backwards)  # type: ignore[no-any-return]
