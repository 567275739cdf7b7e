"""LSTM with a refine gate and uniform gate initialisation (Gu et al. 2020).

f, r = σ(p + q)      u = tanh(p + q)      o = σ(p + q)
g = r ⊙ (1 − (1 − f)²) + (1 − r) ⊙ f²          c_t = g ⊙ c_{t-1} + (1 − g) ⊙ u      h_t = o ⊙ tanh(c_t)

The carry is g: r moves it within [f², 1 − (1 − f)²], so that a nearly saturated f still gets a gradient. The biases
start as b_f = logit U(1/H, 1 − 1/H), b_r = −b_f: carries spread over all time scales up to H steps.
"""

from typing import Any

import torch
from torch import Tensor

from unvanish.cells.cell import Cell


class URLSTM(Cell):
    """Gates f (forget), r (refine), u (candidate), o (output)."""

    name = "ur_lstm"
    gates, states = ("f", "r", "u", "o"), ("h", "c")

    def step(self, p: Any, q: Any, s: Any, v: Any) -> tuple[Tensor, Tensor]:
        f, r = (p.f + q.f).sigmoid(), (p.r + q.r).sigmoid()
        g = r * (1 - (1 - f) ** 2) + (1 - r) * f**2
        c = g * s.c + (1 - g) * (p.u + q.u).tanh()
        return (p.o + q.o).sigmoid() * c.tanh(), c

    def initialise_(self, w: Any, generator: torch.Generator | None = None) -> None:
        """b_f = logit U(1/H, 1 − 1/H), b_r = −b_f, where there are biases (equation 13 of the paper)."""
        if w.b_ih is None:
            return
        H = w.b_ih.shape[0] // 4
        drawn = torch.empty(H, dtype=torch.float64, device=w.b_ih.device)
        drawn.uniform_(1 / max(H, 2), 1 - 1 / max(H, 2), generator=generator)
        logit = drawn.logit().to(w.b_ih)
        w.b_ih[:H], w.b_ih[H : 2 * H] = logit, -logit
        if w.b_hh is not None:
            w.b_hh[: 2 * H] = 0
