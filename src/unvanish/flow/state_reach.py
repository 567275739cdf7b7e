"""How far a gradient reaches back through states of which nothing but autograd's graph is known."""

from collections.abc import Sequence

import torch
from torch import Tensor


def log_norms_of_states(states: Sequence[Tensor], seed: int = 0) -> Tensor:
    """ln‖∂E_T/∂h_t‖ of an error made at the last state alone, relative to lag 0, over the lag, `[T, B]` float64; −inf
    where no gradient arrives.

    The error is one random unit vector, the same for all samples. The graph that leads from the first to the last state
    is kept.

    Args:
        states: h_1 … h_T, `[B, ...]` or `[H]` each, tensors of one graph.
    """
    last = _rows(states[-1])
    unit = torch.randn(last.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    error = (unit / unit.norm()).to(last).expand_as(last).reshape(states[-1].shape)
    earlier = [h for h in states[:-1] if h.requires_grad]
    found = dict(
        zip(
            map(id, earlier),
            torch.autograd.grad(states[-1], earlier, error, retain_graph=True, allow_unused=True) if earlier else (),
            strict=True,
        )
    )
    norms = []
    for h in reversed(states):
        d = error if h is states[-1] else found.get(id(h))
        rows = torch.zeros_like(last) if d is None else _rows(d)
        full = torch.zeros(len(last), dtype=torch.float64, device=last.device)
        full[: len(rows)] = torch.linalg.vector_norm(rows.double(), dim=1)
        norms.append(full)
    logs = torch.stack(norms).log()
    return logs - logs[0]


def _rows(v: Tensor) -> Tensor:
    v = v.detach()
    return v.unsqueeze(0) if v.dim() == 1 else v.flatten(1)
