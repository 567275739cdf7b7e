"""torch's kernels for whole sequences (cuDNN's on a GPU, oneDNN's and its own on the CPU), called for one layer and
direction that reads from the first step on."""

from typing import Any

import torch
from torch import Tensor

from unvanish import torch_internals
from unvanish.cells import Cell, State, Weights


def flat(cell: Cell, w: Weights) -> list[Tensor]:
    """The weights as a kernel takes them: copies, outside any graph, in one block of memory where cuDNN wants that."""
    made = [w.w_ih, w.w_hh]
    if w.b_ih is not None or w.b_hh is not None:
        made += [w.w_ih.new_zeros(len(w.w_ih)) if b is None else b for b in (w.b_ih, w.b_hh)]
    if w.w_hr is not None:
        made.append(w.w_hr)
    copies = [v.detach().clone(memory_format=torch.contiguous_format) for v in made if v is not None]
    assert cell.torch_kernel is not None
    hidden, projected = len(w.w_ih) // len(cell.gates), 0 if w.w_hr is None else len(w.w_hr)
    torch_internals.flatten_for_cudnn(copies, cell.torch_kernel.name, hidden, projected)
    return copies


def identity(cell: Cell, w: Weights) -> list[Tensor]:
    """Weights for which a kernel's input `[..., G·H]` is the input's share p itself, so that its gradient is δp."""
    return flat(cell, w._replace(w_ih=torch.eye(len(w.w_ih), dtype=w.w_ih.dtype, device=w.w_ih.device), b_ih=None))


def run(cell: Cell, x: Tensor, sizes: Tensor | None, state: State, weights: list[Tensor]) -> tuple[Tensor, State]:
    """(y, final state) for x `[T, B, I]`, or packed `[Σ sizes, I]`; state `[B, n]` each. Differentiable once.

    Runs in training mode where gradients are enabled, whatever the mode of the user's layer, since cuDNN has no
    backward pass in evaluation mode; with a single layer there is no dropout between layers.
    """
    assert cell.torch_kernel is not None
    kernel: Any = getattr(torch, cell.torch_kernel.name)
    given = [s.unsqueeze(0).contiguous() for s in state]
    hx = given if len(given) > 1 else given[0]
    how = {"num_layers": 1, "dropout": 0.0, "train": torch.is_grad_enabled(), "bidirectional": False}
    how["has_biases"] = len(weights) > 3
    if sizes is None:
        y, *final = kernel(x.contiguous(), hx, weights, **how, batch_first=False)
    else:
        y, *final = kernel(x, sizes, hx, weights, **how)
    return y, tuple(s.squeeze(0) for s in final)
