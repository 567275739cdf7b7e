"""The textbook's derivative of the LSTM's state, held against the exact one.

The textbook takes ∂c_T/∂c_t = Π (A + B + C + D) for the whole. Both are the same step back, from a row q = (δh, δc),

    δc_{t−1} = f_t ⊙ δc_t + u_{t−1} ⊙ δh_{t−1},   δh_{t−1} = W_hhᵀ δa_t

but the textbook forgets δh once it has been counted into δc: it takes h_{t−1} for a function of c_{t−1} alone. So it
loses the path c_{t−2} → h_{t−2} → o_{t−1} → h_{t−1} → c_t, which skips c_{t−1}.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import LSTM
from unvanish.flow.exponents import log_norms, renormalisation, times_power_of_two
from unvanish.flow.files import Record
from unvanish.flow.stack import Stack, reading_order, saved_at

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Article(Record):
    """The textbook product Π (A + B + C + D) held against the exact ∂c_T/∂c_t of the full state.

    T stands for a sample's last step read; NaN where a sample has no input.
    """

    apart: Tensor
    """[T, B] ‖textbook − exact‖_F / ‖exact‖_F; 0 only over one step or if W_ho = 0; NaN where the exact one is zero"""
    log_exact: Tensor
    """[T, B] ln‖∂c_T/∂c_t‖_F"""
    log_textbook: Tensor
    """[T, B] ln‖Π (A + B + C + D)‖_F"""

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per step and sample with input: t, sample, apart, log_exact, log_textbook."""
        import pandas as pd

        t, b = torch.meshgrid(*map(torch.arange, self.log_exact.shape), indexing="ij")
        columns = {"t": t, "sample": b, "apart": self.apart}
        columns |= {"log_exact": self.log_exact, "log_textbook": self.log_textbook}
        present = ~self.log_exact.isnan()
        return pd.DataFrame({name: v[present].numpy() for name, v in columns.items()})

    def __repr__(self) -> str:
        return f"Article: textbook and exact derivative apart by {self.apart.nanmedian():.2e} in the median"


def article_product(stack: Stack, tr: engine.Trace, probes: int | None, seed: int) -> Article:
    """Both derivatives at every step, from the last one read backwards.

    probes: rows Ω with E[ΩᵀΩ] = I in place of the identity, so that E‖Ω M‖_F² = ‖M‖_F²; None: the identity.
    """
    assert isinstance(tr.cell, LSTM)
    T, B, H = tr.saved.c.shape
    rows = _rows(H, probes, seed, tr.saved.c).unsqueeze(1).expand(-1, B, -1)
    zero_h = tr.y.new_zeros(len(rows), B, tr.y.shape[-1])
    exact: tuple[Tensor, ...] = (zero_h, rows)
    textbook = rows
    exponents = [torch.zeros(B, dtype=torch.float64, device=tr.x.device) for _ in range(2)]
    out = torch.full((3, T, B), torch.nan, dtype=torch.float64, device=tr.x.device)
    later: int | None = None
    for t in reversed(list(reading_order(tr))):
        u = tr.cell.exposure(saved_at(tr, t))
        if later is not None:
            exact = _back(tr, later, exact)
            h, c = _back(tr, later, (zero_h, textbook))
            textbook = c + u * _through_projection(h, tr)
        total = exact[1] + u * _through_projection(exact[0], tr)
        logs = [log_norms(_flat(m), e) for m, e in zip((total, textbook), exponents, strict=True)]
        # Past 2^1000 the two have nothing in common, and more would leave float64.
        shift = (exponents[1] - exponents[0]).clamp(max=1000).unsqueeze(-1)
        apart = log_norms(_flat(times_power_of_two(textbook.double(), shift) - total.double()), exponents[0])
        out[:, t] = torch.stack([(apart - logs[0]).exp(), *logs])
        exact, exponents[0] = _near_one(exact, exponents[0])
        (textbook,), exponents[1] = _near_one((textbook,), exponents[1])
        later = t
    if tr.active is not None:
        out = torch.where(tr.active.squeeze(-1), out, torch.nan)
    return Article(*stack.inputs.in_user_order(out, 2).cpu())


def _rows(H: int, probes: int | None, seed: int, like: Tensor) -> Tensor:
    if probes is None:
        return torch.eye(H, dtype=like.dtype, device=like.device)
    random = torch.randn(probes, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (random / probes**0.5).to(like)


def _back(tr: engine.Trace, t: int, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows of s_t carried to s_{t−1}; held where a sample is inactive."""
    back = tr.cell.adjoint(rows, saved_at(tr, t), tr.weights).previous
    if tr.active is None:
        return back
    return tuple(torch.where(tr.active[t], new, old) for new, old in zip(back, rows, strict=True))


def _through_projection(h: Tensor, tr: engine.Trace) -> Tensor:
    return h if tr.weights.w_hr is None else h @ tr.weights.w_hr


def _flat(m: Tensor) -> Tensor:
    """[rows, B, H] as one vector per sample."""
    return m.transpose(0, 1).flatten(1)


def _near_one(parts: tuple[Tensor, ...], exponent: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The parts, scaled together per sample by a power of two, and the exponent that makes up for it."""
    shift, exponent = renormalisation(tuple(_flat(m) for m in parts), exponent)
    return tuple(times_power_of_two(m, -shift) for m in parts), exponent
