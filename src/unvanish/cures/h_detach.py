"""h-detach: at random steps the gradient passes through the carry alone."""

from typing import Any

import torch
from torch import nn

from unvanish.cures.layer_weights import M, finite, layers_of, recurrent_modules
from unvanish.cures.state_read import StateRead, set_state_read
from unvanish.nn import accelerate
from unvanish.nn.modules import SequenceModule


def h_detach_(module: M, p: float | None) -> M:
    """In training, stop the gradient through the recurrent matrices at each step with probability p:

        δs_{t-1} ← C_tᵀ δs_t + ξ_t Σ_γ W_γᵀ δq^γ_t,   ξ_t = 0 with probability p, else 1

    C_t is the carry (the LSTM's f at c, the GRU's z at h), which no ξ touches. The forward pass is unchanged, and so is
    each step's own share of ∂E/∂W. Where trajectories are long, the paths through W_hh grow in number and size and
    drown what the carry brings from far back; without them the gradient is biased towards the long term.

    nn.LSTM and nn.GRU become their `unvanish.nn` counterparts (`accelerate`), whose `h_detach` is set; the engine then
    leaves out the product of a blocked step, so that a step back costs less, not more. An nn.LSTMCell gets a hook on
    the h that it reads. ξ is drawn by torch's default generator, for every call, layer and direction anew and the same
    for all samples: `torch.manual_seed` replays it. Records of `uv.watch` see the gradient as it was handed back.

    Anneal it by calling `h_detach_(model, p)` again, with p falling to 0 over the epochs.

    Args:
        module: nn.LSTM, nn.GRU, nn.LSTMCell, `unvanish.nn.Recurrent` of a cell with a carry and a matrix, or any module
            whose recurrent layers are all of these.
        p: from 0 to 1; the paper uses 0.25 to 0.5; with 1 the gradient passes the carry alone. None removes it
            (layers stay `unvanish.nn`; see `restore`).

    Returns:
        module, changed in place; no weight is touched.

    Raises:
        TypeError: module is not a module, or p not a number; a cell has no carry or no recurrent matrix, or is an
            nn.GRUCell, whose carry and matrices read the same tensor.
        ValueError: there is no recurrent layer, p is not a probability, or a layer cannot be accelerated; nothing is
            changed then.

    Source: Kanuparthi, Arpit, Kerr, Ke, Mitliagkas & Bengio 2019, "h-detach: modifying the LSTM gradient towards better
    optimization", algorithm 1.

    Limits: the gradient is biased: it is that of no loss. What has to be learnt through W_hh (counting, rewriting the
    state) learns slower. Not with `checkpoint_every`. torch's five cells run on the manual rung then, by programs of
    their steps in the same kernels. For a GRU the law is the same, though the paper has the LSTM alone.

    >>> h_detach_(nn.LSTM(3, 4), 0.25)
    LSTM(3, 4, h_detach=0.25)
    """
    if p is not None and not 0 <= finite("p", p) <= 1:
        raise ValueError(f"p: expected a probability from 0 to 1, got {p}")
    found = recurrent_modules(module, "h_detach_", called=True)
    for path, m in found.items():
        _check(path, m)
    if any(isinstance(m, nn.RNNBase) for m in found.values()):
        accelerate(module, strict=True)
    for m in found.values():
        if isinstance(m, SequenceModule):
            m.h_detach = p  # type: ignore[assignment]
        else:
            set_state_read(m, _DetachRead, None if p is None else _DetachRead(p))
    return module


def _check(path: str, module: Any) -> None:
    layer = layers_of(module, path)[0]
    cell = layer.cell
    if not cell.carries:
        why = "it carries nothing, so that a blocked step would end every path; truncate it instead (TruncatedBPTT)"
    elif not cell.sources:
        why = "it has no recurrent matrix, so that the carry is all there is"
    elif not isinstance(module, SequenceModule) and cell.remembers in cell.sources.values():
        why = "its carry and its matrices read the same tensor; use the layer that runs sequences whole"
    else:
        return
    raise TypeError(f"module: h_detach_ does not fit {layer.label!r}, a {cell.name}: {why}")


class _DetachRead(StateRead):
    """In training h is read without its graph, with probability p."""

    def __init__(self, p: float) -> None:
        self.p = p

    def read(self, module: nn.Module, hx: Any) -> Any:
        if hx is None or not module.training or not bool(torch.rand((), device="cpu") < self.p):
            return hx
        h, *rest = hx
        return (h.detach(), *rest)
