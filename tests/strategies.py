"""Random recurrent layers for hypothesis, shared by the tests."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from unvanish import engine
from unvanish.cells import CELLS, Cell, State, Weights

RUNG_CELLS = [
    (rung, name) for rung in engine.RUNGS for name in CELLS if rung != "fused" or CELLS[name].torch_kernel is not None
]
"""every rung with every cell that it runs"""


@dataclass
class LayerCase:
    """One layer and direction, with random weights, input and initial state, all requiring gradients."""

    cell: Cell
    x: Tensor
    state: State
    weights: Weights
    lengths: Tensor | None
    reverse: bool

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, *self.state, *(v for v in self.weights if v is not None)]


def runs(rung: str, case: LayerCase) -> bool:
    """Whether a rung can run a case; torch has no kernels for some."""
    try:
        engine.explain(case.cell, case.x, rung, (*case.state, *case.weights))
    except RuntimeError:
        return False
    return True


@st.composite
def layer_cases(
    draw: st.DrawFn, dtype: torch.dtype = torch.float64, cells: tuple[str, ...] = tuple(CELLS)
) -> LayerCase:
    cell = CELLS[draw(st.sampled_from(cells))]
    T, B, n_in, H = (draw(st.integers(1, most)) for most in (7, 4, 4, 5))
    P = draw(st.none() | st.integers(1, H)) if cell.name == "lstm" else None
    R, G = P or H, len(cell.gates)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    bias = draw(st.booleans())
    weights = Weights(
        normal(G * H, n_in),
        normal(G * H, R),
        normal(G * H) if bias else None,
        normal(G * H) if bias else None,
        None if P is None else normal(P, H),
    )
    state = (normal(B, R), normal(B, H))[: len(cell.states)]
    lengths = draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B).map(torch.tensor))
    return LayerCase(cell, normal(T, B, n_in), state, weights, lengths, draw(st.booleans()))


@dataclass
class ModuleCase:
    """A stock torch module with an input in its own layout, and an initial state or None."""

    module: nn.RNNBase
    x: Tensor | PackedSequence
    hx: Tensor | tuple[Tensor, Tensor] | None
    lengths: list[int]

    @property
    def names(self) -> list[str]:
        ends = ("", ".reverse")[: 2 if self.module.bidirectional else 1]
        return [f"l{k}{end}" for k in range(self.module.num_layers) for end in ends]

    @property
    def padded(self) -> Tensor:
        """x as [T, B, I], in the user's order."""
        if isinstance(self.x, PackedSequence):
            return nn.utils.rnn.pad_packed_sequence(self.x)[0]
        x = self.x.unsqueeze(1) if self.x.dim() == 2 else self.x
        return x.transpose(0, 1) if self.module.batch_first and self.x.dim() == 3 else x


@st.composite
def module_cases(
    draw: st.DrawFn, dtype: torch.dtype = torch.float64, dropout: float = 0.0, projections: bool = True
) -> ModuleCase:
    kind = draw(st.sampled_from(["rnn_tanh", "rnn_relu", "gru", "lstm"]))
    T, B, n_in, H = (draw(st.integers(least, most)) for least, most in ((1, 7), (1, 4), (1, 3), (2, 5)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dropout": dropout,
        "dtype": dtype,
    }
    if options["num_layers"] == 1:
        options["dropout"] = 0.0
    P = draw(st.integers(0, H - 1)) if kind == "lstm" and projections else 0
    if kind == "lstm":
        module: nn.RNNBase = nn.LSTM(n_in, H, proj_size=P, **options)
    elif kind == "gru":
        module = nn.GRU(n_in, H, **options)
    else:
        module = nn.RNN(n_in, H, nonlinearity=kind.removeprefix("rnn_"), **options)
    form = draw(st.sampled_from(["padded", "packed", "unbatched"]))
    lengths = [T] * B
    x: Tensor | PackedSequence = torch.randn(T, B, n_in, dtype=dtype)
    if form == "packed":
        lengths = draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
        x = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    elif form == "unbatched":
        x, lengths = x[:, 0], [T]
    elif module.batch_first:
        x = x.transpose(0, 1).contiguous()
    hx: Tensor | tuple[Tensor, Tensor] | None = None
    if draw(st.booleans()):
        rows = module.num_layers * (2 if module.bidirectional else 1)
        batch = () if form == "unbatched" else (len(lengths),)
        h = torch.randn(rows, *batch, P or H, dtype=dtype)
        hx = (h, torch.randn(rows, *batch, H, dtype=dtype)) if kind == "lstm" else h
    return ModuleCase(module, x, hx, lengths)
