"""Initialising W_hh: what one step does to the length of the gradient.

∂h_t/∂h_{t-1} = diag(φ'(a_t)) W_hh, so the gradient's length changes per step by at most max|φ'| σ_max(W_hh), and over
many steps, where φ' ≈ 1, by the spectral radius.
"""

import torch
from torch import Tensor

from unvanish.cures.layer_weights import M, draws_on, finite, is_plain, recurrent_layers, with_matrices


def orthogonal_(module: M, gain: float = 1.0, generator: torch.Generator | None = None) -> M:
    """Make every gate's block of W_hh orthogonal: W_hγ = gain · Q, QᵀQ = I.

    Q is drawn uniformly (Haar) through the QR decomposition of a Gaussian matrix, in float64, whatever the module's
    dtype. A block `[H, P]` of a projected LSTM gets orthonormal columns, so that it keeps every length too.

    Args:
        module: nn.RNN, nn.LSTM, nn.GRU, one of their cells, or any module that contains some.
        gain: the length that Q's image of a unit vector has; tanh networks are often given a little above 1.
        generator: the source of the draw, on its device; None: torch's default on the CPU.

    Returns:
        module, changed in place. Input weights, biases and projections keep their values.

    Raises:
        TypeError: module is not a module, or gain not a number.
        ValueError: there is no recurrent layer, a W_hh is parametrized, or gain is not finite and positive.

    Source: Saxe, McClelland & Ganguli 2014; per gate as in Henaff, Szlam & LeCun 2016.

    Limits: this is an initialisation: training moves W_hh away from it (`constrain_` prevents that). In a gated cell
    orthogonal blocks preserve the gradient's path through h; the path along the state depends on the carry gate
    (`forget_bias_`, `chrono_`).

    >>> rnn = orthogonal_(torch.nn.RNN(3, 4).double())
    >>> torch.allclose(rnn.weight_hh_l0.mT @ rnn.weight_hh_l0, torch.eye(4, dtype=torch.float64))
    True
    """
    gain = finite("gain", gain, above=0.0)
    layers = with_matrices(module, "orthogonal_")
    with torch.no_grad():
        for layer, w_hh in layers:
            for block in layer.blocks("weight_hh", w_hh).values():
                rows, columns = block.shape
                block.copy_(gain * _haar(rows, columns, generator))
    return module


def identity_(module: M, scale: float = 1.0) -> M:
    """Start as an integrator: W_hh = scale · I, b_ih = b_hh = 0, so that h_t = φ(W_ih x_t + scale · h_{t-1}).

    With φ = relu and scale 1 this is the IRNN: a unit that is on copies its state, and its error, unchanged.

    Args:
        module: nn.RNN, nn.RNNCell, or any module whose recurrent layers are all of these.
        scale: what a unit keeps per step; below 1 it forgets by 1/e in 1 / −ln(scale) steps.

    Returns:
        module, changed in place. Input weights keep their values.

    Raises:
        TypeError: module is not a module, or contains an LSTM or GRU; scale is not a number.
        ValueError: there is no recurrent layer, a weight is parametrized, or scale is not finite.

    Source: Le, Jaitly & Hinton 2015, "A simple way to initialize recurrent networks of rectified linear units".

    Limits: meant for nonlinearity="relu". tanh shrinks the state and its gradient wherever h is not near 0; relu is
    unbounded, so a learning rate that is too large makes it explode. In the paper the input weights start small; here
    they are not changed.

    >>> identity_(torch.nn.RNN(3, 2, nonlinearity="relu"), 0.5).weight_hh_l0.tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    scale = finite("scale", scale)
    layers = recurrent_layers(module, "identity_", is_plain, "the IRNN is an initialisation of the plain RNN")
    matrices = [layer.parameter("weight_hh", "identity_") for layer in layers]
    biases = [layer.parameter(b, "identity_") for layer in layers for b in ("bias_ih", "bias_hh") if layer.has(b)]
    with torch.no_grad():
        for w_hh in matrices:
            w_hh.copy_(scale * torch.eye(w_hh.shape[0], dtype=w_hh.dtype, device=w_hh.device))
        for b in biases:
            b.zero_()
    return module


def spectral_radius_(module: M, radius: float = 1.0) -> M:
    """Rescale every gate's block of W_hh to a spectral radius: W_hγ ← W_hγ · radius / max|λ(W_hγ)|.

    With a projection h = W_hr m the block closes the loop through W_hr: λ is then the eigenvalues of W_hr W_hγ `[P,
    P]`, and W_hγ is scaled. Eigenvalues are found in float64.

    Args:
        module: nn.RNN, nn.LSTM, nn.GRU, one of their cells, or any module that contains some.
        radius: the largest modulus of an eigenvalue afterwards. Below 1 (tanh, relu) or 4 (σ) the linearised network
            forgets.

    Returns:
        module, changed in place.

    Raises:
        TypeError: module is not a module, or radius no number.
        ValueError: there is no recurrent layer, a W_hh is parametrized, not finite or nilpotent (radius 0, which no
            factor changes), or radius is not finite and positive.

    Source: Jaeger 2001 (echo state networks); Pascanu, Mikolov & Bengio 2013, section 2.1, for what the radius means
        to the gradient.

    Limits: the radius is the rate over many steps of the linearised network; over few steps a matrix that is far from
    normal does much more (see σ_max), and a saturated φ much less.

    >>> rnn = spectral_radius_(torch.nn.RNN(3, 4).double(), 0.9)
    >>> round(torch.linalg.eigvals(rnn.weight_hh_l0).abs().max().item(), 12)
    0.9
    """
    radius = finite("radius", radius, above=0.0)
    layers = with_matrices(module, "spectral_radius_")
    scaled: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for layer, w_hh in layers:
            for gate, block in layer.blocks("weight_hh", w_hh).items():
                loop = layer.weight("weight_hr").double() @ block.double() if layer.has("weight_hr") else block.double()
                if not bool(loop.isfinite().all()):
                    raise ValueError(f"module: W_h{gate} of {layer.label!r} holds NaN or infinity; initialise it first")
                now = float(torch.linalg.eigvals(loop).abs().max())
                if now == 0.0:
                    raise ValueError(
                        f"module: W_h{gate} of {layer.label!r} has spectral radius 0, which no factor changes; "
                        "initialise it first, e.g. with orthogonal_"
                    )
                scaled.append((block, block.double() * (radius / now)))
        for block, value in scaled:
            block.copy_(value)
    return module


def _haar(n: int, k: int, generator: torch.Generator | None) -> Tensor:
    """A uniformly drawn `[n, k]` matrix with orthonormal columns (n ≥ k) or rows, float64."""
    gaussian = torch.randn(max(n, k), min(n, k), dtype=torch.float64, device=draws_on(generator), generator=generator)
    q, r = torch.linalg.qr(gaussian)
    # QR leaves the columns' signs to the algorithm; fixing them by R's diagonal makes the draw uniform (Mezzadri 2007).
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return q if n >= k else q.mT
