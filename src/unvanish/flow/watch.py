"""Watch the gradient on its way back through the recurrent layers of any model: the two functions that a user calls."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unvanish.capture.named_states import Getter
from unvanish.flow.watcher import Watch


def watch(
    model: nn.Module,
    *,
    states: Mapping[str, Getter] | None = None,
    partial: bool = False,
    keep: int = 8,
    every: int = 1,
    stream: str | os.PathLike[str] | None = None,
) -> Watch:
    """Record the gradient at every step of every recurrent layer and direction: ‖∂E/∂h_t‖, ‖∂E/∂c_t‖, gates and
    subgradients.

        with uv.watch(model) as flow:
            loss_fn(model(x), y).backward()
        flow["encoder.lstm.l0"].dh          # [T, B]

    δh_t = ∂E_t/∂h_t + W_hhᵀ δa_{t+1} and so on: exact total derivatives of whatever `backward` was called on, for every
    nn.RNN, nn.LSTM, nn.GRU and `unvanish.nn.Recurrent` in the model (layers, directions, packed, projected, with
    dropout between layers; subclasses where they call torch's kernel), every nn.*Cell called in a loop, and every state
    named in `states` or passed to `uv.mark`. Records are named "path.l0", "path.l1.reverse"; a cell's by its path.

    The model's outputs, gradients, hooks, generator state and attributes are the same as without the watch, even if the
    block raises; the watch raises nothing in a forward or backward pass. What can't be recorded is listed in
    `flow.skipped`, with the reason; a record that can't be trusted has `valid` False and a `problem`.

    What counts as a pass: each forward call of a module with gradients enabled starts one; calls under
    `torch.no_grad()` are not recorded. Calls that start from the state that the same module or cell returned last, or
    from something computed from it, continue the pass (a decoder's loop, a cell's loop), even if that state was
    detached; `detached` then lists the steps. Samples whose state is set to zero in between are marked in `resets`, and
    `LayerFlow.pieces` returns the steps between resets. A backward pass ends all passes, so truncated BPTT gives one
    pass per chunk.

    - Several forwards: `flow[name]` is the latest pass that a gradient reached; `flow.passes(name)` the last `keep`.
    - Several backwards through one forward (`retain_graph=True`): gradients add up, as in `.grad`; the record shows
      the sum.
    - No backward, or a loss that does not depend on the layer: access raises NoBackwardError; it never returns zeros.
    - Backward after the block: not recorded.
    - NaN or infinity: access raises NonFiniteError, which names the layer, step, sample and gate of its origin.
    - `torch.autograd.grad`, and frozen weights: recorded; `residual` is NaN if autograd computed no ∂E/∂W.

    `residual` compares the record with autograd's ∂E/∂W of the same backward pass. It is large if a weight is also used
    elsewhere in the loss (tied weights, a penalty): then it measures that part. Under autocast torch's layers are
    replayed in the dtype of their weights, and `residual` is the rounding of autocast.

    Args:
        model: any module.
        states: module name → the position of its state in what it returns: an index, a path of indices, or a function
            (module, args, output) → the state; for recurrent modules of other libraries, with one step per call.
        partial: also record `partial`, ‖Σ_{s≥t} g_s‖_F; costs about as much as ∂E/∂W again.
        keep: number of passes kept per layer; older ones are dropped and counted in `flow.dropped`.
        every: record one training step in `every`, beginning with the first. A step is a call of `model` with gradients
            enabled, and a record's `step` counts them from 1. The other steps cost nothing.
        stream: a new or empty folder to write each recorded step to, one file per backward pass, for
            `unvanish.flow.read_stream`; memory stays bounded by `keep`.

    Raises:
        TypeError: model is not an nn.Module.
        FileExistsError: the folder of `stream` is not empty.
        OSError: a record can't be written to it.
        ValueError: `states` names a module that does not exist; or, when the block ends, the model has no recurrent
            layer and nothing was marked.
    """
    return Watch(model, states=states, partial=partial, keep=keep, every=every, stream=stream)


def mark(h: Tensor, name: str) -> Tensor:
    """Show a custom cell's state h_t `[B, H]` or `[H]` to the active watch, once per step: `h = uv.mark(step(x[t],
    h), "mycell")`.

    Records ‖∂E/∂h_t‖ as `flow[name].dh`, where t counts the calls in one forward pass. Returns h itself. Outside a
    watch, and under `torch.no_grad()`, it does nothing. It never raises: what can't be recorded (h is not a tensor or
    requires no gradient, or the name is that of a layer) is listed in `flow.skipped`.
    """
    if Watch._active and torch.is_grad_enabled():
        Watch._active[-1].mark(name, h)
    return h
