"""The textbook's derivative of the LSTM's state, compared with the exact one.

The textbook takes ∂c_T/∂c_t = Π (A + B + C + D) for the whole. Both are the same step back, from a row q = (δh, δc),

    δc_{t−1} = f_t ⊙ δc_t + u_{t−1} ⊙ δh_{t−1},   δh_{t−1} = W_hhᵀ δa_t

but the textbook drops δh once it has been added to δc: it treats h_{t−1} as a function of c_{t−1} alone. So it
misses the path c_{t−2} → h_{t−2} → o_{t−1} → h_{t−1} → c_t, which skips c_{t−1}. The same comparison is possible for
every cell whose output is computed from its memory in the same step.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unvanish import engine
from unvanish.cells import Partials, State
from unvanish.extras import extra
from unvanish.flow.exponents import Rows, log_norms, times_power_of_two
from unvanish.flow.files import Record
from unvanish.flow.scaled_rows import Entering, Some, Step, backwards
from unvanish.flow.stack import Stack

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class TextbookProduct(Record):
    """The textbook product Π (A + B + C + D) compared with the exact ∂c_T/∂c_t of the full state.

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
        with extra("report"):
            import pandas as pd

        t, b = torch.meshgrid(*(torch.arange(n, device="cpu") for n in self.log_exact.shape), indexing="ij")
        columns = {"t": t, "sample": b, "apart": self.apart}
        columns |= {"log_exact": self.log_exact, "log_textbook": self.log_textbook}
        present = ~self.log_exact.isnan()
        return pd.DataFrame({name: v[present].numpy() for name, v in columns.items()})

    def __repr__(self) -> str:
        return f"TextbookProduct: textbook and exact derivative apart by {self.apart.nanmedian():.2e} in the median"


def textbook_product(stack: Stack, tr: engine.Trace, probes: int | None, seed: int) -> TextbookProduct:
    """Both derivatives at every step, from the last one read backwards.

    probes: rows Ω with E[ΩᵀΩ] = I in place of the identity, so that E‖Ω M‖_F² = ‖M‖_F²; None: the identity.
    """
    T, B = tr.x.shape[:2]
    memory, made = tr.cell.states.index(tr.cell.remembers), (tr.cell.states[0], tr.cell.remembers)
    rows = _rows(tr.final[memory].shape[-1], probes, seed, tr.x)
    out = torch.full((3, T, B), torch.nan, dtype=torch.float64, device=tr.x.device)

    def forget(d: Partials, arrived: State) -> State:
        """Add δh to δc, then drop it."""
        through = arrived[0] if tr.weights.w_hr is None else arrived[0] @ tr.weights.w_hr
        kept = list(arrived)
        kept[memory] = arrived[memory] + d.made[made] * through
        kept[0] = torch.zeros_like(arrived[0])
        return tuple(kept)

    entering = _at_the_end(tr, rows, memory)
    passes = [backwards(tr, len(rows), entering), backwards(tr, len(rows), entering, change=forget)]
    for exact, textbook in zip(*passes, strict=True):
        (total, e), (product, e_product) = (_whole(step, memory) for step in (exact, textbook))
        logs = [log_norms(total.flatten(1), e), log_norms(product.flatten(1), e_product)]
        # Past 2^1000 the two have nothing in common, and more would leave float64.
        shift = (e_product - e).clamp(max=1000)[:, None, None]
        apart = log_norms((times_power_of_two(product, shift) - total).flatten(1), e)
        out[:, exact.t] = torch.stack([(apart - logs[0]).exp(), *logs])
    if tr.active is not None:
        out = torch.where(tr.active.squeeze(-1), out, torch.nan)
    return TextbookProduct(*stack.inputs.in_user_order(out, 2).cpu())


def _rows(H: int, probes: int | None, seed: int, like: Tensor) -> Tensor:
    if probes is None:
        return torch.eye(H, dtype=like.dtype, device=like.device)
    random = torch.randn(probes, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (random / probes**0.5).to(like)


def _at_the_end(tr: engine.Trace, rows: Tensor, state: int) -> Entering:
    """The rows `[n, H]` entering at every sample's last step read."""
    T, B = tr.x.shape[:2]
    lengths = torch.full((B,), T, device=tr.x.device) if tr.active is None else tr.active.sum(0).flatten()
    last = torch.zeros_like(lengths) if tr.reverse else lengths - 1
    wide, ends = rows.expand(B, *rows.shape), set(last.tolist())

    def entering(t: int) -> Some | None:
        if t not in ends:
            return None
        here = (last == t)[:, None, None]
        return Some(slice(0, len(rows)), Rows.of(torch.where(here, wide, 0.0)), state)

    return entering


def _whole(step: Step, state: int) -> tuple[Tensor, Tensor]:
    """The rows of one state as a matrix per sample `[B, n, H]` in float64, and its one exponent `[B]`."""
    exponent = step.exponent.amax(1)
    return times_power_of_two(step.state[state].double(), (step.exponent - exponent[:, None]).unsqueeze(-1)), exponent
