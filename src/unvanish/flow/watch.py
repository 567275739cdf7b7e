"""Watch the error travel back through the recurrent layers of any model: the two functions a user calls."""

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
    """Record, per recurrent layer and direction, how the error flows back: ‖∂E/∂h_t‖, ‖∂E/∂c_t‖, gates and
    subgradients.

        with uv.watch(model) as flow:
            loss_fn(model(x), y).backward()
        flow["encoder.lstm.l0"].dh          # [T, B]

    δh_t = ∂E_t/∂h_t + W_hhᵀ δa_{t+1} and so on: exact total derivatives of whatever `backward` was called on, for every
    nn.RNN, nn.LSTM, nn.GRU and `unvanish.nn.Recurrent` in the model (layers, directions, packed, projected, with
    dropout between layers; subclasses as their kernel is called), every nn.*Cell stepped in a loop, every state named
    in `states` or handed to `uv.mark`. Records name layers "path.l0", "path.l1.reverse"; a cell by its path.

    The model's outputs, gradients, hooks, generator state and attributes are what they would be without the watch,
    also when the block raises; nothing in the watch raises in a forward or backward pass. What can't be recorded is
    named in `flow.skipped`, with the reason; a record that can't be trusted has `valid` False and a `problem`.

    What counts as a pass. Each forward call of a module under enabled gradients starts one; calls under
    `torch.no_grad()` are not recorded. Calls that start from the state the same module or cell returned last, or from
    something computed from it, go on with the same pass (a decoder's loop, a cell's loop), even if that state was
    detached: `detached` then lists the steps. Samples whose state is set to zero in between are marked in `resets`, and
    `LayerFlow.pieces` gives the steps between. A backward pass ends all passes: what runs after it is new. So truncated
    BPTT gives one pass per chunk.

    - Several forwards: `flow[name]` is the latest pass that an error came back to; `flow.passes(name)` the last `keep`.
    - Several backwards through one forward (`retain_graph=True`): errors add, as `.grad` does; the record shows the
      sum.
    - No backward, or a loss that does not depend on the layer: access raises NoBackwardError, never zeros.
    - Backward after the block: not seen.
    - NaN or infinity: access raises NonFiniteError naming layer, step, sample and gate where it was born.
    - `torch.autograd.grad`, and frozen weights: recorded; `residual` is NaN where autograd computed no ∂E/∂W.

    `residual` compares the record with autograd's ∂E/∂W of the same backward pass. It is large if a weight takes part
    elsewhere in the loss too (tied weights, a penalty): then it measures that part. Under autocast a layer of torch's
    is replayed in its weights' own dtype, and `residual` is what autocast rounded.

    Args:
        model: any module.
        states: module name → where its state is in what it returns: an index, a path of indices, or a function (module,
            args, output) → the state; for recurrent modules of other libraries, one step per call.
        partial: also record `partial`, ‖Σ_{s≥t} g_s‖_F; costs about as much as ∂E/∂W again.
        keep: passes remembered per layer; older ones are dropped and counted in `flow.dropped`.
        every: record one training step in so many, the first included; a step is a call of `model` with gradients
            enabled, and a record's `step` counts them from 1. The other steps cost nothing.
        stream: a new or empty folder that each recorded step is written to, one file per backward pass, for
            `unvanish.flow.read_stream`; memory stays bounded by `keep`.

    Raises:
        TypeError: model is no nn.Module.
        FileExistsError: the folder of `stream` holds files.
        OSError: a record can't be written to it.
        ValueError: a name in `states` is that of no module; on leaving the block, if the model has no recurrent layer
        and
            nothing was marked.
    """
    return Watch(model, states=states, partial=partial, keep=keep, every=every, stream=stream)


def mark(h: Tensor, name: str) -> Tensor:
    """Show a custom cell's state h_t `[B, H]` or `[H]` to the active watch, once per step: `h = uv.mark(step(x[t],
    h), "mycell")`.

    Records ‖∂E/∂h_t‖ under `flow[name].dh`, t counting the calls of one forward pass. Outside a watch, and under
    `torch.no_grad()`, it does nothing. Returns h itself. It never raises: what can't be recorded (h is no tensor or
    requires no gradient, the name is that of a layer) stands in `flow.skipped`.
    """
    if Watch._active and torch.is_grad_enabled():
        Watch._active[-1].mark(name, h)
    return h
