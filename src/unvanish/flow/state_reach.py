"""How far a gradient reaches back through states for which only autograd's graph is known."""

from collections.abc import Sequence

import torch
from torch import Tensor


def log_norms_of_states(states: Sequence[Tensor], seed: int = 0, layer: int | None = None) -> Tensor:
    """ln‖∂E_T/∂h_t‖ of an error made at the last state alone, relative to lag 0, over the lag, `[T, B]` float64; −inf
    where no gradient arrives.

    The error is one random unit vector, the same for all samples. The graph that leads from the first to the last state
    is kept.

    Args:
        states: h_1 … h_T, `[B, ...]` or `[H]` each, tensors of one graph.
        layer: of states that hold several layers, `[L, B, H]` or `[L, H]` each, the one whose error is followed.
    """

    def rows(v: Tensor) -> Tensor:
        v = (v if layer is None else v[layer]).detach()
        return v.unsqueeze(0) if v.dim() == 1 else v.flatten(1)

    last = rows(states[-1])
    unit = torch.randn(last.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    error = torch.zeros_like(states[-1])
    part = error if layer is None else error[layer]
    part.copy_((unit / unit.norm()).to(last).expand_as(last).reshape(part.shape))
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
        found_rows = torch.zeros_like(last) if d is None else rows(d)
        full = torch.zeros(len(last), dtype=torch.float64, device=last.device)
        full[: len(found_rows)] = torch.linalg.vector_norm(found_rows.double(), dim=1)
        norms.append(full)
    logs = torch.stack(norms).log()
    return logs - logs[0]
