"""Gate statistics: how open the gates are, how often they saturate, and how long each unit remembers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unvanish.engine import SATURATED, Trace
from unvanish.engine.precision import full_precision
from unvanish.extras import extra
from unvanish.flow.files import Record
from unvanish.flow.stack import Stack, run_stack
from unvanish.nn.modules import SequenceModule

if TYPE_CHECKING:
    import pandas as pd

STRETCH = 256
"""steps read at a time"""


@dataclass(frozen=True, repr=False)
class GateStatistics(Record):
    """Gate statistics of one layer and direction, over all steps and samples with input."""

    cell: str
    gate_names: tuple[str, ...]
    mean: Tensor
    """[G, H] float64"""
    saturation: Tensor
    """[G, H] share of steps at which φ' is below 5 % of its maximum"""
    log_carry: Tensor | None
    """[H] mean ln|∂m_t/∂m_{t−1}| of the memory m at fixed shares, nats per step: ln f of the LSTM, ln z of the GRU;
    None for a cell that carries nothing, as the plain RNN"""
    steps: int
    """T"""

    def _draw(self, ax: Any) -> Any:
        if self.log_carry is None:
            return None
        from unvanish import draw

        counts, edges = self.histogram()
        return draw.histogram(counts.numpy(), edges.numpy(), self.steps, ax)

    @property
    def half_life(self) -> Tensor:
        """[H] steps after which the carry alone has halved a unit's gradient: ln 2 / −mean ln f; inf where f rounds to
        1."""
        return math.log(2) * self.time_constant

    @property
    def time_constant(self) -> Tensor:
        """[H] τ, steps until it has fallen to 1/e: 1 / −mean ln f; inf where f rounds to 1. A gate that is constantly
        1 − 1/τ' has τ ≈ τ' − 1/2."""
        return 1 / self._carried().abs()

    def histogram(self, bins: int = 20) -> tuple[Tensor, Tensor]:
        """(counts [bins], edges [bins + 1] in steps) of the time constants, bins equal in the logarithm.

        Time constants outside 10⁻³ … 10⁹ steps, 0 and infinity among them, count as these."""
        tau = self.time_constant.clamp(1e-3, 1e9).log10()
        low, high = float(tau.min()), float(tau.max())
        edges = torch.linspace(low, high if high > low else low + 1, bins + 1, dtype=torch.float64, device="cpu")
        return torch.histogram(tau, edges).hist, 10**edges

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per unit: unit, mean_* and saturation_* of each gate, and where a gate carries, log_carry."""
        with extra("report"):
            import pandas as pd

        columns: dict[str, Any] = {"unit": torch.arange(self.mean.shape[1], device="cpu")}
        for prefix, value in (("mean", self.mean), ("saturation", self.saturation)):
            columns |= {f"{prefix}_{gate}": v for gate, v in zip(self.gate_names, value, strict=True)}
        if self.log_carry is not None:
            columns["log_carry"] = self.log_carry
        return pd.DataFrame({name: v.numpy() for name, v in columns.items()})

    def _carried(self) -> Tensor:
        if self.log_carry is None:
            raise ValueError(f"a {self.cell} has no gate that carries its state, so no time constant")
        return self.log_carry

    def __repr__(self) -> str:
        means = ", ".join(f"{g} {float(m.mean()):.3f}" for g, m in zip(self.gate_names, self.mean, strict=True))
        if self.log_carry is None:
            return f"GateStatistics of {self.cell}: mean {means}"
        tau = self.time_constant
        return f"GateStatistics of {self.cell}: mean {means}; time constants {tau.min():.3g} to {tau.max():.3g} steps"


@torch.no_grad()
@full_precision()
def gate_statistics(
    layer: SequenceModule,
    x: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    at: str | None = None,
) -> GateStatistics:
    """Mean, saturation and implied memory of every unit's gates: τ = 1 / −mean_t ln f_t.

    Args:
        layer, x, hx, lengths, at: as in `adjoint_map`.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: Tallec & Ollivier 2018, section 2 (gates as time constants).
    """
    return gates_of(run_stack(layer, x, hx, lengths), at)


@torch.no_grad()
@full_precision()
def gates_of(stack: Stack, at: str | None) -> GateStatistics:
    """`gate_statistics` of a module that has been run."""
    tr = stack.traces[stack.index(at)]
    T = tr.x.shape[0]
    # Every value is read once, so a stretch of steps at a time stays in the cache.
    sums = [_sums(tr.stretch(slice(t, t + STRETCH))) for t in range(0, T, STRETCH)]
    read = sum(n for n, *_ in sums)

    def mean(number: int) -> Tensor:
        return (torch.stack([found[number] for found in sums]).sum(0) / read).cpu()

    log_carry = mean(3) if len(sums[0]) > 3 else None
    return GateStatistics(tr.cell.name, tr.cell.gates, mean(1), mean(2), log_carry, T)


def _sums(tr: Trace) -> tuple[Any, ...]:
    """(number of values of each gate, their sum, how many are saturated, and where there is a carry the sum of
    ln|carry|) over steps and samples; the gates' `[G, H]`, the carry's `[H]`."""

    def read(v: Tensor) -> Tensor:
        """[N, ...] the values at the steps that samples have."""
        return v.flatten(0, 1) if tr.active is None else v[tr.active.squeeze(-1)]

    gates, carry = read(tr.gates).double(), tr.cell.carry(tr)
    closed = (read(tr.cell.sensitivity(tr)) < SATURATED).sum(0, dtype=torch.float64)
    logs = () if carry is None else (read(carry).double().abs().log().sum(0),)
    return (len(gates), gates.sum(0), closed, *logs)
