"""How one step changes the mean square of a gradient: the quantity behind criticality and local stability.

With independent random weights the gradients at a cell's states are uncorrelated, so a step back maps their mean
squares v_b linearly:

    v_b(t − 1) = Σ_a A_ab v_a(t),   A_ab = 1/H E‖∂s^a_t/∂s^b_{t-1}‖_F²

and they grow per step by χ, the spectral radius of A: for a cell with one state the mean squared singular value of its
Jacobian.
"""

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import calculus
from unvanish.flow.stack import full_jacobians, reading_order


def mean_square_gain(tr: engine.Trace, steps: int, samples: int) -> Tensor:
    """χ of a trace, a scalar, float64; differentiable if the trace is. Measured at most at `steps` steps, evenly over
    the second half in reading order, in which the states have settled, and for the first `samples` samples.

    Raises:
        ValueError: no sample has a step there.
    """
    sizes = [s.shape[-1] for s in tr.final]
    A = tr.x.new_zeros(len(sizes), len(sizes), dtype=torch.float64)
    counted = 0
    for t in settled(tr, steps):
        J = full_jacobians(tr, t)
        chosen = J if tr.active is None else J[tr.active[t].squeeze(-1)]
        chosen = chosen[:samples].double()
        rows = [torch.stack([b.square().sum() for b in a.split(sizes, 2)]) for a in chosen.split(sizes, 1)]
        A = A + torch.stack(rows) / torch.tensor(sizes, dtype=A.dtype, device=A.device)
        counted += len(chosen)
    if not counted:
        raise ValueError("x: none of its samples has steps in the second half; pass longer ones")
    return spectral_radius(A / counted)


def spectral_radius(A: Tensor) -> Tensor:
    """The spectral radius of a matrix without negative entries, with its exact gradient."""
    values, right = torch.linalg.eig(A.detach())
    top = int(values.real.argmax())
    v = right[:, top].real.abs()
    values, left = torch.linalg.eig(A.detach().mT)
    u = left[:, int(values.real.argmax())].real.abs()
    return u @ A @ v / (u @ v).clamp_min(torch.finfo(A.dtype).tiny)


def input_gain(tr: engine.Trace, steps: int, samples: int) -> Tensor:
    """1/R E‖∂h_t/∂x_t‖_F², a scalar, float64, of the layer's output h; as `mean_square_gain`."""
    n, B = tr.final[0].shape[-1], tr.x.shape[1]
    eye = torch.eye(n, dtype=tr.x.dtype, device=tr.x.device).unsqueeze(1).expand(n, B, n)
    rows = (eye, *(tr.x.new_zeros(n, B, s.shape[-1]) for s in tr.final[1:]))
    total, counted = tr.x.new_zeros((), dtype=torch.float64), 0
    for t in settled(tr, steps):
        J = calculus.adjoint(tr.cell, tr.partials_by_step[t], rows, tr.weights).da @ tr.weights.w_ih
        chosen = J if tr.active is None else J[:, tr.active[t].squeeze(-1)]
        chosen = chosen[:, :samples].double()
        total = total + chosen.square().sum() / n
        counted += chosen.shape[1]
    return total / max(counted, 1)


def settled(tr: engine.Trace, most: int) -> list[int]:
    """At most `most` steps, evenly over the second half in reading order."""
    order = list(reading_order(tr))
    half = order[len(order) // 2 :]
    return half[:: max(1, -(-len(half) // most))]
