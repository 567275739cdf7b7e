"""Clipping: bound what an exploding gradient can do.

    norm clipping       g ← g · min(1, θ / ‖g‖),  ‖g‖ over all parameters; θ from the norms observed so far
    in the recurrence   δ handed from step t+1 to step t  ←  δ · min(1, θ / ‖δ‖),  per sample and state

The first bounds the update, the second the gradient at each step, before it grows over the rest of the sequence.

Source: Pascanu, Mikolov & Bengio 2013, section 3.2 (norm clipping, and its threshold from statistics of the norm over a
number of updates); clipping of δ inside the recurrence as in Graves 2013, per sample instead of per component.

Limits: clipping never helps a gradient that vanishes. Clipped δ are not the gradient of any loss; the direction of the
sum over time changes.
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unvanish.cures.layer_weights import M, finite, recurrent_modules
from unvanish.cures.state_read import StateRead, set_state_read
from unvanish.engine.sequence import clip_rows
from unvanish.flow.transfer import numbers
from unvanish.nn import accelerate
from unvanish.nn.modules import SequenceModule


class GradientClipper:
    """Clip the global norm at a threshold taken from the norms observed:

        g ← g · min(1, θ / ‖g‖),  θ = scale · quantile_q(‖g‖ of the last updates)

    The norm that is being clipped does not enter its own threshold, and norms are remembered as they were before
    clipping: one explosion neither passes nor moves θ by more than one rank.

        clipper = GradientClipper(model.parameters())
        ...
        loss.backward()
        clipper.clip_()
        optimizer.step()

    Args:
        parameters: whose gradients count as one vector.
        quantile: q in (0, 1]; 0.5 is the median. Pascanu et al. report thresholds from half to ten times the average.
        scale: a factor on the quantile.
        history: how many norms are remembered.
        warmup: updates that are only observed before any is clipped.
        maximum: θ never exceeds it, also during warm-up; None: no bound.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Under data parallelism every process sees the same averaged gradients and so clips alike. With a GradScaler, call
    `scaler.unscale_(optimizer)` before `clip_`.

    >>> w = nn.Parameter(torch.zeros(1))
    >>> clipper = GradientClipper([w], quantile=0.5, warmup=3)
    >>> for norm in (1.0, 2.0, 3.0, 100.0):
    ...     w.grad = torch.tensor([norm])
    ...     _ = clipper.clip_()
    >>> w.grad, clipper.clipped
    (tensor([2.]), 1)
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Tensor,
        quantile: float = 0.9,
        scale: float = 1.0,
        history: int = 1000,
        warmup: int = 20,
        maximum: float | None = None,
    ) -> None:
        self.parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not self.parameters or not all(isinstance(p, Tensor) for p in self.parameters):
            raise ValueError("parameters: expected at least one tensor, and only tensors, e.g. model.parameters()")
        self.quantile, self.scale = finite("quantile", quantile, above=0.0), finite("scale", scale, above=0.0)
        if self.quantile > 1:
            raise ValueError(f"quantile: expected a share in (0, 1], got {quantile}")
        if warmup < 1 or history < warmup:
            raise ValueError(f"history, warmup: expected 1 ≤ warmup ≤ history, got warmup {warmup}, history {history}")
        self.warmup = warmup
        self.maximum = math.inf if maximum is None else finite("maximum", maximum, above=0.0)
        self.norms: deque[float] = deque(maxlen=history)
        """the last norms, before clipping"""
        self.clipped = 0
        """updates that were clipped"""

    @property
    def threshold(self) -> float:
        """θ for the next update; inf (or `maximum`) during warm-up."""
        if len(self.norms) < self.warmup:
            return self.maximum
        observed = torch.tensor(self.norms, dtype=torch.float64)
        return min(self.maximum, self.scale * float(observed.quantile(self.quantile)))

    @torch.no_grad()
    def clip_(self) -> float:
        """Clip `.grad` in place; returns ‖g‖ as it was. Call it once per update, after backward.

        Raises:
            ValueError: no parameter has a gradient.
            ArithmeticError: ‖g‖ is NaN or infinite, which no factor repairs; gradients stay as they are, so that
                the caller may skip the update.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not grads:
            raise ValueError("parameters: none has a gradient; call clip_ after loss.backward()")
        # float64, because squares of float32 overflow at 1e19: just where a gradient explodes.
        norm = math.hypot(*numbers([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]))
        if not math.isfinite(norm):
            bad = [i for i, p in enumerate(self.parameters) if p.grad is not None and not bool(p.grad.isfinite().all())]
            raise ArithmeticError(
                f"the gradient's norm is {norm}: NaN or infinity in parameters {bad[:8]} (by position); "
                "skip this update, or find where it first appeared with uv.watch"
            )
        threshold = self.threshold
        self.norms.append(norm)
        if norm > threshold:
            self.clipped += 1
            for g in grads:
                g.mul_(threshold / norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs to clip as if it had never stopped."""
        return {"norms": list(self.norms), "clipped": self.clipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.clipped = state["clipped"]


def clip_recurrence_(module: M, limit: float | None) -> M:
    """Bound the gradient inside the recurrence: its 2-norm from step t+1 to step t is at most `limit` per sample.

        δh_t = ∂E_t/∂h_t + clip(W_hhᵀ δa_{t+1})          (LSTM: also δc_t, each state clipped by its own norm)

    The forward pass is unchanged. nn.RNN, nn.LSTM and nn.GRU become their `unvanish.nn` counterparts (`accelerate`),
    whose `clip` is set; nn.RNNCell, nn.LSTMCell and nn.GRUCell get a hook on the state they read.

    Args:
        module: any module with recurrent layers; all of them are clipped.
        limit: the largest norm; None removes the bound (layers stay `unvanish.nn`; see `restore`).

    Returns:
        module, changed in place; no weight is touched.

    Raises:
        TypeError: module is not a module, or limit not a number.
        ValueError: there is no recurrent layer, one cannot be accelerated (a subclass with its own forward), or limit
            is not finite and positive; nothing is changed then.

    >>> rnn = clip_recurrence_(nn.RNN(3, 4), 1.0)
    >>> rnn.clip
    1.0
    """
    limit = None if limit is None else finite("limit", limit, above=0.0)
    found = recurrent_modules(module, "clip_recurrence_", called=True).values()
    if any(isinstance(m, nn.RNNBase) for m in found):
        accelerate(module, strict=True)
    for m in found:
        if isinstance(m, SequenceModule):
            m.clip = limit  # type: ignore[assignment]
        else:
            set_state_read(m, _ClipRead, None if limit is None else _ClipRead(limit), outermost=True)
    return module


class _ClipRead(StateRead):
    """The state is read through a view whose gradient is clipped, so that its other uses are not affected."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def read(self, module: nn.Module, hx: Any) -> Any:
        if hx is None:
            return None
        if isinstance(hx, tuple | list):
            return tuple(self.read(module, s) for s in hx)
        if not hx.requires_grad:
            return hx
        read, limit = hx.view_as(hx), self.limit
        read.register_hook(lambda d: None if d is None else clip_rows(d, limit))
        return read
