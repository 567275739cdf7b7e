"""Constraining W_hh while it trains: orthogonal blocks keep a gradient's length, a fixed norm bounds its growth."""

import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unvanish.cures.layer_weights import M, finite, with_matrices


class OrthogonalBlocks(nn.Module):
    """W_hγ = scale · Q_γ exp(A_γ),  A_γ = X_γ − X_γᵀ of the strictly lower triangle of X: orthogonal for every X.

    Q is the block at which X = 0; a block `[H, P]` takes the first P columns, which stay orthonormal.
    Source: Lezcano-Casado & Martínez-Rubio 2019; Lezcano-Casado 2019 (trivializations).
    """

    base: Tensor

    def __init__(self, gates: int, scale: float, like: Tensor) -> None:
        super().__init__()
        self.gates, self.scale = gates, scale
        H = like.shape[0] // gates
        self.register_buffer("base", torch.eye(H, dtype=like.dtype, device=like.device).repeat(gates, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`[G·H, R]` free → `[G·H, R]` constrained."""
        blocks = x.unflatten(0, (self.gates, -1))
        H, R = blocks.shape[-2:]
        lower = torch.nn.functional.pad(blocks, (0, H - R)).tril(-1)
        q = self.base @ torch.linalg.matrix_exp(lower - lower.mT)
        return self.scale * q[..., :R].flatten(0, 1)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        """Set Q to the orthogonal blocks nearest to w (its polar factors), and X to 0."""
        blocks = w.double().unflatten(0, (self.gates, -1))
        u, _, vt = torch.linalg.svd(blocks, full_matrices=False)
        nearest = u @ vt
        # The remaining columns complete a basis; QR gives the first ones up to their signs.
        full = torch.linalg.qr(nearest, mode="complete")[0]
        full[..., : nearest.shape[-1]] = nearest
        self.base.copy_(full)
        return torch.zeros_like(w)


class SpectralBlocks(nn.Module):
    """W_hγ = scale · X_γ / σ_max(X_γ): every gate block has 2-norm `scale`, exactly.

    Source: Miyato et al. 2018, who estimate σ_max by power iteration; here it is computed.
    """

    def __init__(self, gates: int, scale: float) -> None:
        super().__init__()
        self.gates, self.scale = gates, scale

    def forward(self, x: Tensor) -> Tensor:
        """`[G·H, R]` free → `[G·H, R]` constrained."""
        blocks = x.unflatten(0, (self.gates, -1))
        return (self.scale * blocks / torch.linalg.matrix_norm(blocks, ord=2, keepdim=True)).flatten(0, 1)

    def right_inverse(self, w: Tensor) -> Tensor:
        """X for a given W: W itself, whatever its norm."""
        return w


def constrain_(module: M, kind: Literal["orthogonal", "spectral"] = "orthogonal", scale: float = 1.0) -> M:
    """Hold every gate's block of W_hh, through training, on the set

        "orthogonal"   W_hγᵀ W_hγ = scale² I        ‖W_hγᵀ δ‖ = scale · ‖δ‖ for every δ
        "spectral"     σ_max(W_hγ) = scale          ‖W_hγᵀ δ‖ ≤ scale · ‖δ‖

    It starts at the nearest orthogonal matrix (the polar factor), or at W scaled to the norm. The parameter an
    optimizer already holds stays the same object; it is now the free one, `parametrizations.weight_hh_l0.original`.
    `torch.nn.utils.parametrize.remove_parametrizations(rnn, "weight_hh_l0")` takes the constraint off and keeps the
    weight.

    Args:
        module: nn.RNN, nn.LSTM, nn.GRU, one of their cells, or any module that contains some; all directions and
            layers.
        kind: "orthogonal" or "spectral".
        scale: the length, or the norm, that is kept; for the RNN `scale` < 1/max|φ'| means that errors decay.

    Returns:
        module, changed in place: its recurrent modules' classes become torch's Parametrized… ones. state_dict and
        deepcopy work; pickling the whole module does not, as for every torch parametrization.

    Raises:
        TypeError: module is not a module, or scale not a number.
        ValueError: there is no recurrent layer, `kind` is neither, scale is not positive, or a W_hh is already
            parametrized, not finite, or (spectral) zero.

    Source: torch.nn.utils.parametrize; Arjovsky, Shah & Bengio 2016 and Vorontsov et al. 2017 for what it does to
    recurrent nets.

    Limits: the gradient of an orthogonal RNN still shrinks wherever φ' < 1, and in a gated cell only the path through
    W_hh is constrained. torch's recurrent modules read a parametrized weight four times per forward call: H³ work each,
    little compared with long sequences.

    >>> rnn = constrain_(nn.RNN(3, 4).double())
    >>> torch.allclose(rnn.weight_hh_l0.mT @ rnn.weight_hh_l0, torch.eye(4, dtype=torch.float64))
    True
    """
    if kind not in ("orthogonal", "spectral"):
        raise ValueError(f"kind: expected 'orthogonal' or 'spectral', got {kind!r}")
    scale = finite("scale", scale, above=0.0)
    layers = with_matrices(module, "constrain_")
    for layer, w in layers:
        for gate, block in layer.blocks("weight_hh", w.detach()).items():
            if not bool(block.isfinite().all()):
                raise ValueError(f"module: W_h{gate} of {layer.label!r} holds NaN or infinity; initialise it first")
            if kind == "spectral" and not bool(block.any()):
                raise ValueError(
                    f"module: W_h{gate} of {layer.label!r} is zero and has no direction; initialise it first"
                )
    for layer, w in layers:
        gates = len(layer.cell.sources)
        rule = OrthogonalBlocks(gates, scale, w) if kind == "orthogonal" else SpectralBlocks(gates, scale)
        parametrize.register_parametrization(layer.module, f"weight_hh{layer.suffix}", rule)
        if isinstance(layer.module, nn.RNNBase):
            _make_copyable(layer.module)
    return module


def _make_copyable(module: nn.RNNBase) -> None:
    """Let deepcopy work after a forward pass.

    nn.RNN and its kin keep the weights of the last pass in `_flat_weights`; of a parametrized one that is a computed
    tensor, which deepcopy refuses. The next pass refills the list. The class is torch's Parametrized…, made for
    this one module.
    """
    kind: Any = type(module)
    if "_copies_parametrized" in vars(kind):
        return
    copy_as_torch = kind.__deepcopy__

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:  # noqa: N807 (it is one)
        self._flat_weights = [w if w is None or w.is_leaf else w.detach() for w in self._flat_weights]
        self._flat_weight_refs = [None if w is None else weakref.ref(w) for w in self._flat_weights]
        return copy_as_torch(self, memo)

    kind.__deepcopy__, kind._copies_parametrized = __deepcopy__, True
