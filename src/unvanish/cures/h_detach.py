"""h-detach: at random steps the gradient passes through the carry alone."""

from typing import Any

import torch
from torch import Tensor, nn

from unvanish.cells import Cell, Point, Weights
from unvanish.cures.layer_weights import M, finite, layers_of, recurrent_modules
from unvanish.cures.state_read import StateRead, set_state_read, whole, without_gradient
from unvanish.engine.sequence import vjp
from unvanish.nn import accelerate
from unvanish.nn.modules import SequenceModule, as_states, cell_of, evaluating


def h_detach_(module: M, p: float | None) -> M:
    """In training, stop the gradient through the recurrent matrices at each step with probability p:

        δs_{t-1} ← C_tᵀ δs_t + ξ_t Σ_γ W_γᵀ δq^γ_t,   ξ_t = 0 with probability p, else 1

    C_t is the carry (the LSTM's f at c, the GRU's z at h), which no ξ touches. The forward pass is unchanged, and so is
    each step's own share of ∂E/∂W. Where trajectories are long, the paths through W_hh grow in number and size and
    drown what the carry brings from far back; without them the gradient is biased towards the long term.

    nn.LSTM and nn.GRU become their `unvanish.nn` counterparts (`accelerate`), whose `h_detach` is set; on the CPU the
    kernels then leave out the product of a blocked step, so that a step back costs less, not more. An nn.LSTMCell or
    GRUCell gets hooks on what its matrices read and, as a GRU carries the same h, on what it returns. ξ is drawn by
    torch's default generator, for every call, layer and direction anew and the same for all samples:
    `torch.manual_seed` replays it. Records of `uv.watch` see the gradient as it was handed back; `uv.flow.adjoint_map`
    and its like show the exact derivatives of the layer.

    Anneal it by calling `h_detach_(model, p)` again, with p falling to 0 over the epochs.

    Args:
        module: nn.LSTM, nn.GRU, their cells, `unvanish.nn.Recurrent` of a cell with a carry and a matrix, or any module
            whose recurrent layers are all of these.
        p: from 0 to 1; the paper uses 0.25 to 0.5; with 1 the gradient passes the carry alone. None removes it
            (layers stay `unvanish.nn`; see `restore`).

    Returns:
        module, changed in place; no weight is touched.

    Raises:
        TypeError: module is not a module, or p not a number; a cell has no carry or no recurrent matrix.
        ValueError: there is no recurrent layer, p is not a probability, or a layer cannot be accelerated; nothing is
            changed then.

    Source: Kanuparthi, Arpit, Kerr, Ke, Mitliagkas & Bengio 2019, "h-detach: modifying the LSTM gradient towards better
    optimization", algorithm 1.

    Limits: the gradient is biased: it is that of no loss. What has to be learnt through W_hh (counting, rewriting the
    state) learns slower. On CUDA layers run on the manual rung, in torch operations: cuDNN's kernels hand the gradient
    through at every step. For a GRU the law is the same, though the paper has the LSTM alone.

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
            _set_cell(m, p)
    return module


def _check(path: str, module: Any) -> None:
    layer = layers_of(module, path)[0]
    cell = layer.cell
    if not cell.carries:
        why = "it carries nothing, so that a blocked step would end every path; truncate it instead (TruncatedBPTT)"
    elif not cell.sources:
        why = "it has no recurrent matrix, so that the carry is all there is"
    else:
        return
    raise TypeError(f"module: h_detach_ does not fit {layer.label!r}, a {cell.name}: {why}")


def _set_cell(cell: nn.RNNCellBase, p: float | None) -> None:
    set_state_read(cell, _DetachRead, None if p is None else _DetachRead(p))
    mathematics = cell_of(cell)
    if mathematics.remembers not in mathematics.sources.values():
        return
    for key, hook in list(cell._forward_hooks.items()):
        if isinstance(hook, _CarryBack):
            del cell._forward_hooks[key]
            cell._forward_hooks_with_kwargs.pop(key, None)
    if p is not None:
        # Before all other hooks, whose changes to the output are not part of the cell's carry.
        cell.register_forward_hook(_CarryBack(), with_kwargs=True, prepend=True)


class _DetachRead(StateRead):
    """In training no gradient goes back through the h that a cell reads, with probability p."""

    def __init__(self, p: float) -> None:
        self.p = p

    def read(self, module: nn.Module, hx: Any) -> Any:
        if hx is None or not module.training or not bool(torch.rand((), device="cpu") < self.p):
            return hx
        h, *rest = as_states(hx)
        # With several states, the others keep a step connected to the graph of the one before.
        read = without_gradient(h, attached=not rest)
        return (read, *rest) if rest else read


class _CarryBack:
    """A forward hook of a cell whose one state is both read by its matrices and carried: where nothing goes back
    through the state that was read, δh_{t-1} = C_t ⊙ δh_t does, past the cell."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        x = args[0] if args else kwargs["input"]
        read = args[1] if len(args) > 1 else kwargs.get("hx")
        h = whole(read)
        if h is read:
            return None
        with evaluating(module):
            weights = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
        return _Carried.apply(cell_of(module), output, h, x, *weights)


class _Carried(torch.autograd.Function):
    """Returns h_t unchanged. The carry is computed in the backward pass, from tensors that the step keeps anyway."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, output: Tensor, h: Tensor, x: Tensor, *weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(h, x, *weights)
        ctx.cell = cell
        # Not a view, which the user could not change in place.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *errors: Any) -> Any:
        (d,), cell = errors, ctx.cell
        inputs: list[Any] = [None if v is None else v.view_as(v) for v in ctx.saved_tensors]
        h, x, *weights = inputs
        w = Weights(*weights)
        # Under autocast a step receives another dtype than the weights'.
        read, x = (v.to(w.w_ih.dtype) for v in (h.detach(), x))
        carry = cell.carry(Point(cell, w, x, (read,), ())).to(d.dtype)
        if not torch.is_grad_enabled():
            return None, d, carry * d, None, *(None for _ in weights)
        # The second factor is 0; its derivatives are not, nor are those of the product.
        passed = carry * (h - h.detach())
        wanted = [v is not None and v.requires_grad for v in inputs]
        return None, d, *vjp((passed,), (d,), inputs, wanted, graph=True)
