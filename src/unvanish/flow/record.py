"""Records of the gradient's flow: frozen data, saved without pickle.

Axes: `T` steps, `B` samples in the user's order, `G` gates in torch's order. Norms are float64, whatever the model's
dtype.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unvanish.extras import extra
from unvanish.flow.files import Record, write_page

if TYPE_CHECKING:
    import pandas as pd


class NoBackwardError(RuntimeError):
    """A record was accessed before any backward pass."""


class NonFiniteError(ArithmeticError):
    """A watched pass contained a NaN or an infinity; the message says where it first appeared."""


@dataclass(frozen=True, repr=False)
class LayerFlow(Record):
    """The gradient through one layer and direction over the steps of one forward pass.

    Steps are in input order, also for a reversed layer. Where a sample has no input (t ≥ its length) norms are 0 and
    gate statistics NaN. A field that does not exist for the cell is None: `dc` but for the LSTM, all but `dh` for
    `uv.mark`.
    """

    name: str
    """module path, layer, direction: "encoder.lstm.l0", "rnn.l1.reverse" """
    cell: str
    """"rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru", or "mark" """
    gate_names: tuple[str, ...]
    lengths: Tensor
    """[B] steps of each sample"""
    dh: Tensor
    """[T, B] ‖∂E/∂h_t‖₂"""
    dc: Tensor | None = None
    """[T, B] ‖∂E/∂c_t‖₂"""
    dgates: Tensor | None = None
    """[T, B, G] ‖∂E/∂a_t‖₂ of each gate's pre-activations"""
    dweight: Tensor | None = None
    """[T] ‖g_t‖_F, g_t = δa_tᵀ [h_{t-1}, x_t]: the T subgradients of ∂E/∂W = Σ_t g_t, W = [W_hh, W_ih]; where later
    calls go on from samples of different lengths, t counts the steps of the calls, padding included"""
    partial: Tensor | None = None
    """[T] ‖Σ_{s≥t} g_s‖_F, the partial sums from the end; with `watch(..., partial=True)`"""
    gates: Tensor | None = None
    """[T, B, G] each gate's mean value over its units"""
    saturation: Tensor | None = None
    """[T, B, G] share of a gate's units whose φ' is below 5 % of its maximum"""
    log_carry: Tensor | None = None
    """[H] mean over steps and samples of ln f (LSTM) or ln z (GRU), nats per step: what a unit keeps of its state"""
    residual: float = math.nan
    """‖Σ_t g_t − autograd's ∂E/∂W‖ / ‖autograd's‖ of a replayed layer or cell, the first norm estimated from 16 random
    combinations of the rows, with a standard error of at most 18 %. NaN when autograd computed no ∂E/∂W (weights
    frozen), and for layers of `unvanish.nn`, which measure while they run: use `uv.audit` to check them"""
    step: int = 0
    """the training step: how many times the watched model had been called"""
    detached: tuple[int, ...] = ()
    """steps whose incoming state came from the step before, but without its graph"""
    resets: Tensor | None = None
    """[T, B] True where a sample's state was set to zero before the step, as between episodes; None if none was"""
    problem: str | None = None
    """why the record can't be trusted; None if it can"""

    @property
    def valid(self) -> bool:
        """Whether the record can be trusted. Draw no conclusion from one that is not valid."""
        return self.problem is None

    def pieces(self, sample: int) -> list[range]:
        """The steps of one sample between resets, in order: the episodes that a policy was run through."""
        length = int(self.lengths[sample])
        starts = [0] if self.resets is None else [0, *self.resets[1:length, sample].nonzero().flatten().add(1).tolist()]
        return [range(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]

    def __repr__(self) -> str:
        from unvanish.flow.notebook import in_words

        T, B = self.dh.shape
        check = "" if math.isnan(self.residual) else f", residual {self.residual:.1e}"
        lines = [f"LayerFlow {self.name!r}: {self.cell}, T={T}, B={B}{check}"]
        if self.problem is not None:
            lines.append(f"  not valid: {self.problem}")
        state = "h" if self.dc is None else "c"
        lines.append(f"  ‖∂E/∂{state}_t‖, median over samples: {in_words(self)}")
        return "\n".join(lines)

    def _draw(self, ax: Any) -> Any:
        from unvanish import draw

        return draw.norms_over_time(self._norms(), ax)

    def _norms(self) -> list[Any]:
        from unvanish.draw.pictures import Norms

        found, name = (("h", self.dh), ("c", self.dc)), self.name if self.valid else f"{self.name} (not valid)"
        return [Norms(name, s, v.numpy(), self.lengths.numpy()) for s, v in found if v is not None]

    def _repr_html_(self) -> str:
        from unvanish.flow.notebook import card

        return card({self.name: self}, {})

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields that are present."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per step and sample with input: layer, t, sample, dh, dc, dweight, partial, and dgate_*, gate_*,
        saturation_* per gate; fields that are None have no column."""
        with extra("report"):
            import pandas as pd

        T, B = self.dh.shape
        t, b = torch.meshgrid(*(torch.arange(n, device="cpu") for n in (T, B)), indexing="ij")
        columns: dict[str, Any] = {"layer": self.name, "t": t, "sample": b, "dh": self.dh}
        for name in ("dc", "dweight", "partial"):
            value = getattr(self, name)
            if value is not None:
                columns[name] = value if value.dim() == 2 else value[:, None].expand(T, B)
        for prefix, value in (("dgate", self.dgates), ("gate", self.gates), ("saturation", self.saturation)):
            if value is not None:
                columns |= {f"{prefix}_{gate}": value[..., i] for i, gate in enumerate(self.gate_names)}
        present = (t < self.lengths[None, :]).reshape(-1)
        return pd.DataFrame(
            {k: v if isinstance(v, str) else v.reshape(-1)[present].numpy() for k, v in columns.items()}
        )


class Flow(Record, Mapping[str, LayerFlow]):
    """Layer name → LayerFlow."""

    def __init__(self, layers: Mapping[str, LayerFlow]) -> None:
        self._layers = dict(layers)

    @property
    def layers(self) -> dict[str, LayerFlow]:
        """Name → record, in the model's order."""
        return dict(self._layers)

    def __getitem__(self, name: str) -> LayerFlow:
        layers = self.layers
        if name not in layers:
            raise KeyError(f"no layer {name!r} in this flow; it has {', '.join(layers)}")
        return layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    # Not the Mapping's: a watch that has measured nothing yet can't be asked for its layers.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.layers.values()))

    def to_dataframe(self) -> "pd.DataFrame":
        """All layers' rows; see `LayerFlow.to_dataframe`."""
        with extra("report"):
            import pandas as pd

        return pd.concat([layer.to_dataframe() for layer in self.layers.values()], ignore_index=True)

    def contents(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def _draw(self, ax: Any) -> Any:
        from unvanish import draw

        return draw.norms_over_time([norm for layer in self.layers.values() for norm in layer._norms()], ax)

    @property
    def skipped(self) -> dict[str, str]:
        """Recurrent parts of the model that were not recorded, and why; a loaded flow names none."""
        return {}

    def _repr_html_(self) -> str:
        from unvanish.flow.notebook import card

        return card(self.layers, self.skipped)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the gradient's norms per layer, a table, and what was not recorded, as one self-contained page, which
        needs neither network nor script, and beside it its card, 1200 × 630, as PNG and SVG ("page-card.png").

        Raises:
            OSError: the file can't be written.
        """
        from unvanish.flow.flow_page import flow_page, flow_preview

        write_page(path, flow_page(self), flow_preview(self))
